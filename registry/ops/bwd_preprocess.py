"""`bwd_preprocess`: what the backward needs of each query row, and a cleared accumulator of dQ."""

import registry.ops.attention as a
import registry.ops.workspaces as w
from registry.ops.describe import Letter, Op, Tensor

BWD_PREPROCESS = Op(
    name="bwd_preprocess",
    version=1,
    computes="128 query rows of a query head: lse_log2, delta, zeros in dq_accum and semaphores",
    tensors=(
        a.vectors("o", "in", ("call",), (a.DENSE_OUT, a.PACKED_OUT), "the forward's output", argument="out"),
        w.DOUT,
        Tensor("lse", "in", ("fp32",), a.LSE, "the forward's LSE", strides=("b", "h"), access="anywhere"),
        Tensor("dlse", "in", ("fp32",), a.LSE, "its gradient", strides=a.BSH, access="anywhere", optional=True),
        *(w.LSE_LOG2, w.DELTA, w.DQ_ACCUM, w.SEMAPHORES, a.CU_SEQLENS_Q, a.SEQUSED_Q),
    ),
    scalars=(*a.numbers("rows batch heads_q seqlen_q head_dim_v"), w.HEAD_DIM_ACCUM),
    letters=(Letter("m", "query rows"),),
    grid="tiles_heads_batch",
    facts=a.BACKWARD_FACTS,
)
