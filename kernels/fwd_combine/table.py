"""Which variants of `fwd_combine` can be built, and which serves a call: one for each dtype of the output."""

from kernels.trunk import limits
from registry.contract.dispatch import Condition, DispatchRow
from registry.contract.storage import ALL_DTYPES
from registry.contract.variant import Variant


def invalid(variant: Variant) -> str | None:
    """Why such a kernel cannot be built; None if it can."""
    if variant.head_dim_v % 128 or variant.head_dim != variant.head_dim_v:
        return "head_dim and head_dim_v are the same multiple of 128, the most that a call may have"
    return limits.uneven(variant, "rows")


def rows() -> list[DispatchRow]:
    """A warp takes whatever head_dim_v there is."""
    return [
        DispatchRow(
            "fwd_combine",
            (Condition("dtype", "==", dtype), Condition("head_dim_v", "<=", 256)),
            f"fwd_combine-{dtype}-d256-dv256-m4",
        )
        for dtype in ALL_DTYPES
    ]
