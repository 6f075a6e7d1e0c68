"""Which variants of `fwd` can be built, and which serves a call."""

from pathlib import Path

from kernels.fwd.smem import smem
from kernels.tables import Tiles
from kernels.trunk import limits
from registry.contract.dispatch import DispatchRow
from registry.contract.variant import Variant

TILES = Path(__file__).with_name("tiles.json")  # `python -m builder accept` writes it

__all__ = ["TILES", "invalid", "rows", "smem"]


def invalid(variant: Variant) -> str | None:
    """Why a tile cannot be built; None if it can."""
    shape = limits.odd_head_dims(variant, 32) or limits.uncopied(variant) or limits.undivided(variant)
    if shape:
        return shape
    stages, steps = variant.size("s"), variant.size("q")
    if stages not in (1, 2):
        return f"s{stages}: one or two stages are implemented"
    if steps and stages != 1:
        return f"q{steps}: Q passes through the place of V, which one stage leaves free"
    return (limits.uncovered(variant) if steps else None) or limits.too_large(smem(variant))


def rows() -> list[DispatchRow]:
    return Tiles.read(TILES).rows()
