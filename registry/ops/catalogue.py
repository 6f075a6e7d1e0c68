"""Every op there is: `OPS`, in the order in which documents list them, and `get(name)`.

An op's description is imported when it is first asked for, so that a process pays for those that it uses.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from registry.contract.errors import ContractError

if TYPE_CHECKING:
    from registry.ops.describe import Op

# Of each the description is in the module of its name, under its name in capitals.
OPS = ("fwd", "fwd_paged", "fwd_combine", "kv_append", "bwd_preprocess", "bwd", "bwd_sum", "bwd_postprocess")


@cache
def get(name: str) -> Op:
    """An op's description. ContractError for a name that is none of OPS."""
    if name not in OPS:
        raise ContractError(f"op {name!r:.100} is none of {', '.join(OPS)}; update this code")
    found: Op = getattr(import_module(f"registry.ops.{name}"), name.upper())
    return found


def together(name: str) -> frozenset[str]:
    """An op and all that calls launch with it, or before it: what builder and benchmarks build together."""
    found = {name}
    for op in map(get, OPS):
        if name in (op.name, *op.launched_with):
            found.update((op.name, *op.launched_with, *op.after))
    return frozenset(found)
