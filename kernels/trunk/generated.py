"""What comes of compiling a variant, and the name of its kernel. No cutlass import."""

from dataclasses import dataclass

from registry.contract.grid import Grid
from registry.contract.variant import Variant


@dataclass(frozen=True)
class Generated:
    """A variant's PTX and launch facts. smem: dynamic shared memory in bytes; ptx holds exactly the entry `symbol`."""

    ptx: str
    symbol: str
    threads: int
    smem: int
    grid: Grid


def symbol(variant: Variant) -> str:
    """The kernel's entry name: readable, stable across folders, short enough that the DSL never cuts it."""
    return "cubinery_" + variant.key.replace("-", "_")
