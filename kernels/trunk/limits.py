"""Why tiles cannot be built: the reasons that several ops share. Pure arithmetic, no cutlass."""

from __future__ import annotations

from registry.contract.arch import MAX_SMEM
from registry.contract.variant import Variant

ALL_HEAD_DIMS = 256  # of a kernel that serves every head_dim


def uncopied(variant: Variant) -> str | None:
    """Why a block's threads cannot copy tiles of m and n rows, 16 bytes each along a panel of 64 or 32 columns."""
    m, n, warps = (variant.size(letter) for letter in "mnw")
    for dim in (variant.head_dim, variant.head_dim_v):
        rows_at_once = 32 * warps // (8 if dim % 64 == 0 else 4)
        if m % rows_at_once or n % rows_at_once:
            return (
                f"{32 * warps} threads copy {rows_at_once} rows of head_dim {dim} at once: no divisor of m{m} and n{n}"
            )
    return None


def undivided(variant: Variant) -> str | None:
    """Why warps cannot share out m query rows, 16 or a multiple each, against n keys."""
    m, n, warps = (variant.size(letter) for letter in "mnw")
    if m % (16 * warps) or n % 16:
        return f"m{m} is no multiple of 16 rows for each of {warps} warps, or n{n} none of 16"
    return None


def odd_head_dims(variant: Variant, multiple: int) -> str | None:
    for dim in (variant.head_dim, variant.head_dim_v):
        if dim % multiple:
            return f"head_dim {dim} is no multiple of {multiple}"
    return None


def too_large(smem: int) -> str | None:
    return f"{smem} bytes of shared memory, a block has {MAX_SMEM}" if smem > MAX_SMEM else None


def uncovered(variant: Variant) -> str | None:
    """Why `q` steps of Q cannot stay in registers while one stage of V takes the place through which Q came."""
    steps, least = variant.size("q"), q_covered(variant)
    if least <= steps <= variant.head_dim // 16:
        return None
    return f"q{steps}: from q{least}, what lies in V's place, to q{variant.head_dim // 16}, all of Q"


def q_covered(variant: Variant) -> int:
    """Steps of Q, in whole panels, that lie in V's place if Q begins there: at least those must stay in registers."""
    panel = 64 if variant.head_dim % 64 == 0 else 32
    panels = -(-variant.size("n") * variant.head_dim_v // (variant.size("m") * panel))
    return min(panels * panel, variant.head_dim) // 16


def partial_head_dims(variant: Variant) -> str | None:
    """Why a kernel of which there is one for all head dims is not of these."""
    if (variant.head_dim, variant.head_dim_v) != (ALL_HEAD_DIMS, ALL_HEAD_DIMS):
        return f"head_dim and head_dim_v are {ALL_HEAD_DIMS}, the most that a call may have"
    return None


def uneven(variant: Variant, what: str) -> str | None:
    """Why a block cannot have m warps with one of `what` each."""
    if not 1 <= variant.size("m") <= 32:
        return f"m{variant.size('m')}: a block has 1 to 32 {what}, a warp each"
    return None
