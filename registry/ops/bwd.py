"""`bwd`: dK and dV of a tile of keys, and that tile's part of dQ."""

import registry.ops.attention as a
import registry.ops.workspaces as w
from registry.ops.describe import Letter, Op, Scalar

BWD = Op(
    name="bwd",
    version=2,
    computes="dK and dV of n keys of a key/value head, and their part of dQ; of one split of its query heads",
    tensors=(
        *(a.Q, a.K, a.V, w.DOUT, w.LSE_LOG2, w.DELTA, w.DQ_ACCUM),
        a.vectors("dk", "out", ("call",), (a.DENSE_K, a.PACKED_K), "k's gradient"),
        a.vectors("dv", "out", ("call",), (a.DENSE_V, a.PACKED_V), "v's gradient"),
        # Written in place of dk and dv where they are given.
        a.workspace("dk_partial", "splits elements_k", "fp32 parts of dk", strides=("split",), optional=True),
        a.workspace("dv_partial", "splits elements_v", "fp32 parts of dv", strides=("split",), optional=True),
        *(a.CU_SEQLENS_Q, a.CU_SEQLENS_K, a.SEQUSED_Q, a.SEQUSED_K, a.LEFTPAD_K, a.ALIBI_SLOPES),
        a.workspace("dalibi", "key_tiles heads_q", "a tile's part of the slopes' gradient", optional=True,
                    gradient_of="alibi_slopes"),
        w.SEMAPHORES,
    ),
    scalars=(
        *a.numbers("rows batch heads_q heads_kv seqlen_q seqlen_k head_dim head_dim_v window_left window_right"),
        Scalar("splits", "i32", "blocks that share the query heads of a key/value head; divides the group"),
        *a.numbers("alibi_stride_b scale_log2 softcap_scale"),
        Scalar("slope_scale", "f32", "log2(e) / scale_log2"),
        *a.numbers("softmax_scale"),
    ),
    letters=(
        Letter("m", "query rows"),
        Letter("n", "keys"),
        Letter("w", "warps"),
        Letter("s", "stages of Q"),
        Letter("o", "2: two stages of dO", "2", optional=True),
        Letter("c", "chunks of query rows that are taken one after the other", "[2-9]", optional=True),
        Letter("x", "warps side by side, which share rows", "[2-9]", optional=True),
        Letter("r", "steps of 16 columns of V that stay in registers", r"[1-9]\d*", optional=True),
        Letter("t", "1: addresses are computed anew in each part of a query tile", "1", optional=True),
        Letter("u", "1: scores are computed of all rows at once, before the chunks", "1", optional=True),
    ),
    grid="key_tiles_heads_batch",
    shared_by="splits",
    facts=a.BACKWARD_FACTS,
    ptx="sm_90",
    launched_with=("bwd_preprocess", "bwd_sum", "bwd_postprocess"),
    after=("fwd",),
)  # fmt: skip
