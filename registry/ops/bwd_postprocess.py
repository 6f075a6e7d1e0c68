"""`bwd_postprocess`: dq of its fp32 accumulator."""

import registry.ops.attention as a
import registry.ops.workspaces as w
from registry.ops.describe import Letter, Op

BWD_POSTPROCESS = Op(
    name="bwd_postprocess",
    version=1,
    computes="128 query rows of a query head: dq of dq_accum",
    tensors=(
        w.DQ_ACCUM,
        a.vectors("dq", "out", ("call",), (a.DENSE_Q, a.PACKED_Q), "q's gradient"),
        *(a.CU_SEQLENS_Q, a.SEQUSED_Q),
    ),
    scalars=(*a.numbers("rows batch heads_q seqlen_q head_dim"), w.HEAD_DIM_ACCUM, *a.numbers("softmax_scale")),
    letters=(Letter("m", "query rows"),),
    grid="tiles_heads_batch",
    facts=a.BACKWARD_FACTS,
)
