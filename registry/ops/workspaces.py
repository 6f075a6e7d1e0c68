"""The backward's workspaces, which several of its ops share.

They hold rows of queries in tiles of ROWS: entry b of a dense q begins at row b · ⌈seqlen_q / ROWS⌉ · ROWS, and of a
packed one that begins at token t at row (⌊t / ROWS⌋ + b) · ROWS. `rows` counts those of all entries.
"""

from __future__ import annotations

import registry.ops.attention as a
from registry.ops.describe import Scalar

ROWS = 128
DOUT = a.vectors("dout", "in", ("call",), (a.DENSE_OUT, a.PACKED_OUT), "the output's gradient")
LSE_LOG2 = a.workspace("lse_log2", "heads_q rows", "LSE · log2(e); +∞ for rows without a query")
DELTA = a.workspace("delta", "heads_q rows", "rowsum(dO ∘ O) − dLSE")
# Lane l of a unit of 16 rows × 8 columns holds rows l // 4 and l // 4 + 8 of columns 2·(l % 4) and the next, as an mma
# leaves them.
DQ_ACCUM = a.workspace("dq_accum", "heads_q rows/16 head_dim_accum/8 32 4", "fp32 sums of dQ")
SEMAPHORES = a.workspace("semaphores", "heads_q rows/16", "whose turn it is to add; null: in any order", dtype="i32",
                         optional=True)  # fmt: skip
HEAD_DIM_ACCUM = Scalar("head_dim_accum", "i32", "of dq_accum, a multiple of 32: the `bwd` variant's head_dim")
