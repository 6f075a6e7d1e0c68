"""Which variants of `bwd` can be built, and which serves a call."""

from pathlib import Path

from kernels.bwd.smem import dq_warps, queries_and_scores, smem, v_lent
from kernels.tables import Tiles
from kernels.trunk import limits
from registry.contract.dispatch import DispatchRow
from registry.contract.variant import Variant
from registry.ops.workspaces import ROWS

TILES = Path(__file__).with_name("tiles.json")  # nothing writes it but people

__all__ = ["TILES", "invalid", "rows", "smem"]


def invalid(variant: Variant) -> str | None:
    """Why a tile cannot be built; None if it can."""
    across = max(variant.size("x"), 1)
    return (
        limits.odd_head_dims(variant, 32)
        or limits.odd_head_dims(variant, 16 * across)
        or limits.uncopied(variant)
        or _undivided(variant, across)
        or _unstaged(variant)
        or _without_room(variant)
    )


def _undivided(variant: Variant, across: int) -> str | None:
    m, n, warps = (variant.size(letter) for letter in "mnw")
    chunks = max(variant.size("c"), 1)
    if warps % across or n % (16 * warps // across):
        return f"n{n} is no multiple of 16 rows for each of {warps} / {across} warps"
    if m not in (32, 64, 128):
        return f"m{m}: a query tile has 32, 64 or 128 rows, so that {ROWS} are whole tiles"
    if m % chunks or m // chunks % (16 * across):
        return f"c{chunks}: chunks of m{m} are no multiple of 16 columns for each of {across} warps"
    if dq_warps(variant) is None:
        return f"{warps} warps do not divide the {m} x {variant.head_dim} of dQ"
    return None


def _unstaged(variant: Variant) -> str | None:
    steps = variant.size("r")
    if variant.size("s") not in (1, 2) or variant.size("o") > 2:
        return f"s{variant.size('s')} and o{variant.size('o')}: one or two stages are implemented"
    if steps > variant.head_dim_v // 16:
        return f"r{steps}: head_dim_v {variant.head_dim_v} has {variant.head_dim_v // 16} steps"
    return None


def _without_room(variant: Variant) -> str | None:
    n = variant.size("n")
    if n * v_lent(variant) > queries_and_scores(variant):
        return f"r{variant.size('r')}: what V lends does not fit into the memory of queries and scores at first"
    if n * (variant.head_dim_v - variant.head_dim) > queries_and_scores(variant):
        return f"dV of n{n} x {variant.head_dim_v} does not fit into the tiles' memory at the end"
    return limits.too_large(smem(variant))


def rows() -> list[DispatchRow]:
    return Tiles.read(TILES).rows()
