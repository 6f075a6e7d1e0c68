"""The dispatch table of all ops: which variants exist and which call gets which. No cutlass import.

The builder compiles `variants()`, the index carries `rows()`, the runtime evaluates what the index carries.
"""

from __future__ import annotations

from kernels.parts import TABLE, part
from registry import ops
from registry.contract.dispatch import DispatchRow
from registry.contract.variant import Variant


def rows() -> tuple[DispatchRow, ...]:
    """All dispatch rows, in order: the first of an op whose conditions hold serves the call."""
    return tuple(row for op in ops.OPS for row in part(op, TABLE).rows())


def variants() -> tuple[Variant, ...]:
    """Every variant that a row names, once, sorted by key."""
    return tuple(Variant.parse(key) for key in sorted({row.variant for row in rows()}))
