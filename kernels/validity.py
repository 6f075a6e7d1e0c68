"""Whether a variant can be built, and why not. Pure arithmetic, no cutlass: each op's `table` has its own reasons."""

from __future__ import annotations

from kernels.parts import TABLE, part
from registry import ops
from registry.contract.variant import Variant


def invalid(variant: Variant) -> str | None:
    """Why a variant cannot be built; None if it can. ContractError for an op that there is not."""
    op = ops.get(variant.op)
    if variant.dtype not in op.dtypes:
        return f"dtype {variant.dtype}: variants of {op.name} are of {', '.join(op.dtypes)}"
    if not op.tile.fullmatch("-".join(variant.key.split("-")[4:])):
        return f"a tile of {op.name} is like {op.tile_form}"
    found: str | None = part(variant.op, TABLE).invalid(variant)
    return found


def smem(variant: Variant) -> int:
    """Dynamic shared memory of a variant that can be built, in bytes."""
    of_op = getattr(part(variant.op, TABLE), "smem", None)
    return of_op(variant) if of_op else 0
