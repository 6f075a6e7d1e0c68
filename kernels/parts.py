"""An op's parts by convention: `kernels.<op>.kernel` and `kernels.<op>.table`, for each of `registry.ops.OPS`.

`kernel` has `generate(variant, dump_dir)`, and is all that the op's fingerprint begins with. `table`, without cutlass,
has `invalid(variant)`, `rows()` and, where there is dynamic shared memory, `smem(variant)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

KERNEL, TABLE = "kernel", "table"


def name(op: str, which: str) -> str:
    """The module's full name."""
    return f"{__package__}.{op}.{which}"


def part(op: str, which: str) -> Any:
    """The module, imported now."""
    return import_module(name(op, which))
