"""How much shared memory a tile of `fwd_paged` takes."""

from registry.contract.variant import Variant
from registry.ops.attention import E4M3

NOTES = 48  # bytes in which a block keeps what it needs again after its loops


def smem(variant: Variant) -> int:
    """Dynamic shared memory in bytes: `s` pairs of K and V tiles, Q, notes; later O.

    A Q that stays in registers begins where the last stage of V does.
    """
    element = 1 if E4M3 in variant.features else 2
    v_stage = variant.size("n") * variant.head_dim_v * element
    stages = variant.size("s") * (variant.size("n") * variant.head_dim * element + v_stage)
    q_end = stages - (v_stage if variant.size("q") else 0) + 2 * variant.size("m") * variant.head_dim
    return max(stages, q_end, 2 * variant.size("m") * variant.head_dim_v) + NOTES
