"""`fwd_combine`: the weighted sum of partial outputs."""

import registry.ops.attention as a
from registry.contract.storage import ALL_DTYPES
from registry.ops.describe import Fact, Letter, Op, Scalar, Tensor, layout

PARTIAL = (layout("splits batch seqlen heads head_dim_v"), layout("splits tokens heads head_dim_v"))
LSE_PARTIAL = (layout("splits batch seqlen heads"), layout("splits tokens heads"))
OUT = (layout("batch seqlen heads head_dim_v"), layout("tokens heads head_dim_v"))

FWD_COMBINE = Op(
    name="fwd_combine",
    version=1,
    computes="m rows (a query head of a token), a warp each",
    tensors=(
        a.vectors("o_partial", "in", ("fp32",), PARTIAL, "outputs over parts of the keys, contiguous within a split",
               strides=("split",), argument="out_partial"),
        Tensor("lse_partial", "in", ("fp32",), LSE_PARTIAL, "their log-sum-exps", strides=("split", *a.BSH),
               access="anywhere"),
        a.vectors("o", "out", ALL_DTYPES, OUT, "the output", argument="out"),
        Tensor("lse", "out", ("fp32",), (layout("batch heads seqlen"), layout("heads tokens")), "its log-sum-exp",
               strides=a.BSH, access="anywhere", optional=True),
    ),
    scalars=(
        *a.numbers("num_splits"),
        Scalar("rows", "i32", "batch · seqlen · heads", source="partial_rows"),
        Scalar("seqlen", "i32", "tokens of an entry, or all of a packed array"),
        Scalar("heads", "i32", "query heads"),
        *a.numbers("head_dim_v"),
    ),
    letters=(Letter("m", "rows of a block"),),
    grid="rows",
    no_gradient="of combined outputs",
    facts=(Fact("dtype", "'bf16', 'fp16' or 'fp32': of the output"), *a.HEAD_DIMS, a.COUNTED_ROWS),
    dtypes=ALL_DTYPES,
)  # fmt: skip
