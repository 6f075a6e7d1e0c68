"""From a checked call's sizes to the numbers that its kernels take, and to the facts by which they are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from registry.contract import WINDOW_OPEN, fast_divmod
from registry.ops.describe import stride
from registry.ops.workspaces import ROWS

LOG2E = math.log2(math.e)
Numbers = dict[str, int | float]  # of scalars and strides, by name
LENGTH_FACTS = frozenset(("seqlen_q", "seqlen_k", "total_q", "total_k", "packed_rows", "rows"))  # lengths decide them


def steps(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int]:
    """Strides of batch (0 of a packed array), tokens, heads; 0 where there is but one entry: torch leaves that open."""
    found = [step if n > 1 else 0 for n, step in zip(shape[:-1], strides[:-1], strict=True)]
    batch, tokens, heads = found if len(found) == 3 else (0, *found)
    return batch, tokens, heads


def strides(name: str, shape: Sequence[int], along: Sequence[int]) -> Numbers:
    """The stride parameters of a kernel's tensor `name`: ([batch,] tokens, heads, head_dim)."""
    return {stride(name, axis): step for axis, step in zip("bsh", steps(shape, along), strict=True)}


def contiguous(name: str, shape: Sequence[int]) -> Numbers:
    """The same of a new contiguous tensor."""
    *outer, tokens, heads, head_dim = shape
    row = (heads * head_dim, head_dim, 1)
    return strides(name, shape, (tokens * row[0], *row) if outer else row)


def of_lse(sizes: Mapping[str, int], heads: int) -> Numbers:
    """Of a contiguous LSE, (batch, heads, seqlen) or (heads, tokens)."""
    packed = "total_q" in sizes
    seqlen = sizes["total_q"] if packed else sizes["seqlen_q"]
    return {"lse_stride_b": 0 if packed else heads * seqlen, "lse_stride_h": seqlen}


def of_scores(softmax_scale: float, softcap: float) -> Numbers:
    """How a product becomes a score: `kernels.trunk.score_mods` has the formula."""
    return {
        "scale_log2": (softcap or softmax_scale) * LOG2E,
        "softcap_scale": 2 * LOG2E * softmax_scale / softcap if softcap else 0.0,
        "slope_scale": 1 / (softcap or softmax_scale),
        "softmax_scale": softmax_scale,
    }


def of_pages(page_size: int) -> Numbers:
    magic, shift = fast_divmod(max(page_size, 1))
    return {"page_size": page_size, "page_magic": magic, "page_shift": shift}


def of_pack(pack: int) -> Numbers:
    """pack: query heads that share a tile."""
    magic, shift = fast_divmod(pack)
    return {"pack": pack, "pack_magic": magic, "pack_shift": shift}


def output_rows(sizes: Mapping[str, int]) -> int:
    """Rows of the output: a row is one head of one query."""
    tokens = sizes["total_q"] if "total_q" in sizes else sizes["batch"] * sizes["seqlen_q"]
    return tokens * sizes["heads_q"]


def workspace_rows(sizes: Mapping[str, int]) -> int:
    """Rows of a head in the backward's workspaces; `registry.ops.workspaces` says which query has which."""
    if "total_q" in sizes:
        return (sizes["total_q"] // ROWS + sizes["batch"]) * ROWS
    return sizes["batch"] * -(-sizes["seqlen_q"] // ROWS) * ROWS


def facts(*, dtype: str, head_dim: int, head_dim_v: int, batch: int, heads_q: int, heads_kv: int, seqlen_q: int,
          seqlen_k: int, window: tuple[int, int], total_q: int | None = None) -> dict[str, Any]:  # fmt: skip
    """All call facts of `fwd`. window: as `options.window_bounds` gives it. total_q: tokens of a packed q, None if
    dense."""
    group = heads_q // heads_kv if heads_kv else 0
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "group": group,
        "causal": int(window[1] == 0),
        "varlen": int(total_q is not None),
        "total_q": batch * seqlen_q if total_q is None else total_q,
        "packed_rows": seqlen_q * group,
        "window": int(window[0] != WINDOW_OPEN),
    }


def backward_facts(forward: dict[str, Any], total_k: int | None = None) -> dict[str, Any]:
    """All call facts of the backward's ops, from those of `fwd`. total_k: tokens of a packed k, None if dense."""
    tokens = forward["batch"] * forward["seqlen_k"] if total_k is None else total_k
    return forward | {"varlen_k": int(total_k is not None), "total_k": tokens}
