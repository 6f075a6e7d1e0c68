"""Which variants of `bwd_sum` can be built, and which serves a call: one for each dtype."""

from kernels.tables import all_head_dims
from kernels.trunk import limits
from registry.contract.dispatch import DispatchRow
from registry.contract.storage import DTYPES
from registry.contract.variant import Variant


def invalid(variant: Variant) -> str | None:
    """Why such a kernel cannot be built; None if it can."""
    return limits.partial_head_dims(variant) or limits.uneven(variant, "units")


def rows() -> list[DispatchRow]:
    return [all_head_dims("bwd_sum", dtype, "m8") for dtype in DTYPES]
