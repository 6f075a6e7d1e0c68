"""Which variants of `fwd_paged` can be built, and which serves a call."""

from pathlib import Path

from kernels.fwd_paged.smem import smem
from kernels.tables import Tiles
from kernels.trunk import limits
from registry.contract.dispatch import DispatchRow
from registry.contract.variant import Variant
from registry.ops.attention import E4M3

TILES = Path(__file__).with_name("tiles.json")  # `python -m benchmarks.decode --sweep` measures its tiles

__all__ = ["TILES", "invalid", "rows", "smem"]


def invalid(variant: Variant) -> str | None:
    """Why a tile cannot be built; None if it can."""
    unit = 2 if E4M3 in variant.features else 1  # elements of K and V in two bytes
    return (
        limits.odd_head_dims(variant, 32 * unit)
        or _uncopied(variant, unit)
        or limits.undivided(variant)
        or _unstaged(variant)
        or limits.too_large(smem(variant))
    )


def _uncopied(variant: Variant, unit: int) -> str | None:
    """As `limits.uncopied`, where K and V are copied in units of two bytes and have panels of one width."""
    m, n, warps = (variant.size(letter) for letter in "mnw")
    panel = min(64 if dim // unit % 64 == 0 else 32 for dim in (variant.head_dim, variant.head_dim_v))
    of_keys, of_queries = (32 * warps * 8 // width for width in (panel, 64 if variant.head_dim % 64 == 0 else 32))
    if n % of_keys or m % of_queries:
        return f"{32 * warps} threads copy {of_queries} rows of Q and {of_keys} of K: no divisors of m{m} and n{n}"
    return None


def _unstaged(variant: Variant) -> str | None:
    stages, steps, all_steps = variant.size("s"), variant.size("q"), variant.head_dim // 16
    if stages < 1:
        return "s0: there is one stage or more"
    if stages > 1 and steps not in (0, all_steps):
        return f"q{steps}: with several stages none of Q stays in registers or all of it, q{all_steps}"
    if E4M3 in variant.features and steps != all_steps:
        return f"{E4M3} needs Q in registers, q{all_steps}"
    return limits.uncovered(variant) if stages == 1 and steps else None


def rows() -> list[DispatchRow]:
    return Tiles.read(TILES).rows()
