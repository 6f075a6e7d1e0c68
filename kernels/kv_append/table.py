"""Which variants of `kv_append` can be built, and which serves a call: one for each dtype and each kind of cache."""

from kernels.tables import all_head_dims
from kernels.trunk import limits
from registry.contract.dispatch import Condition, DispatchRow
from registry.contract.storage import DTYPES
from registry.contract.variant import Variant
from registry.ops.attention import E4M3


def invalid(variant: Variant) -> str | None:
    """Why such a kernel cannot be built; None if it can."""
    return limits.partial_head_dims(variant) or limits.uneven(variant, "rows")


def rows() -> list[DispatchRow]:
    found = []
    for dtype in DTYPES:
        for cache, tile in ((dtype, "m4"), ("e4m3", f"m4-{E4M3}")):
            found.append(all_head_dims("kv_append", dtype, tile, Condition("kv_dtype", "==", cache)))
    return found
