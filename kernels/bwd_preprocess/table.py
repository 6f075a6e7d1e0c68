"""Which variants of `bwd_preprocess` can be built, and which serves a call: one for each dtype."""

from kernels.tables import all_head_dims
from kernels.trunk import limits
from registry.contract.dispatch import DispatchRow
from registry.contract.storage import DTYPES
from registry.contract.variant import Variant
from registry.ops.workspaces import ROWS


def invalid(variant: Variant) -> str | None:
    """Why such a kernel cannot be built; None if it can."""
    if variant.size("m") != ROWS:
        return f"m{variant.size('m')}: a block has the {ROWS} rows in which workspaces are laid out"
    return limits.partial_head_dims(variant)


def rows() -> list[DispatchRow]:
    return [all_head_dims("bwd_preprocess", dtype, f"m{ROWS}") for dtype in DTYPES]
