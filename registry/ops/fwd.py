"""`fwd`: the forward over dense and packed keys."""

import registry.ops.attention as a
from registry.ops.describe import Letter, Op, Tensor

LSE = Tensor("lse", "out", ("fp32",), a.LSE, "log-sum-exp of the scores", strides=("b", "h"), access="anywhere",
             optional=True)  # fmt: skip

FWD = Op(
    name="fwd",
    version=3,
    computes="(query tile, tile head, batch entry)",
    tensors=(
        *(a.Q, a.K, a.V, a.OUT, LSE),
        *(a.CU_SEQLENS_Q, a.CU_SEQLENS_K, a.SEQUSED_Q, a.SEQUSED_K, a.LEFTPAD_K, a.SINK, a.ALIBI_SLOPES),
    ),
    scalars=a.numbers(
        "pack_magic batch heads_q heads_kv seqlen_q seqlen_k head_dim head_dim_v window_left window_right "
        "pack pack_shift sink_low alibi_stride_b scale_log2 softcap_scale"
    ),
    letters=(
        *a.TILE,
        a.Q_STEPS,
        Letter("a", "1: addresses of K and V are carried from block to block", "1", optional=True),
    ),
    grid="tiles_heads_batch",
    backward="bwd",
    facts=a.CALL_FACTS,
)
