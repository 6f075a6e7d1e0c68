"""`bwd_sum`: dK and dV as the sums of what the group splits of a backward computed."""

import registry.ops.attention as a
from registry.ops.describe import Letter, Op, Scalar

UNIT = 256  # elements that a warp takes: the rows of its grid

BWD_SUM = Op(
    name="bwd_sum",
    version=1,
    computes="m units of 256 elements of dk, then of dv, a warp each: the sum over splits, the first split first",
    tensors=(
        a.workspace("dk_partial", "splits elements_k", "fp32 parts of dk", strides=("split",)),
        a.workspace("dv_partial", "splits elements_v", "fp32 parts of dv", strides=("split",)),
        a.vectors("dk", "out", ("call",), (a.DENSE_K, a.PACKED_K), "k's gradient", strides=()),
        a.vectors("dv", "out", ("call",), (a.DENSE_V, a.PACKED_V), "v's gradient", strides=()),
    ),
    scalars=(
        Scalar("dk_elements", "i64", "elements of dk, a multiple of 8"),
        Scalar("dv_elements", "i64", "elements of dv, likewise"),
        Scalar("splits", "i32", "blocks that shared the query heads of a key/value head"),
    ),
    letters=(Letter("m", "units of a block"),),
    grid="rows",
    facts=(a.DTYPE, *a.HEAD_DIMS, a.COUNTED_ROWS),
)
