"""How much shared memory a tile of `fwd` takes."""

from registry.contract.variant import Variant

NOTES = 32  # bytes in which a block keeps what it needs again after its loops


def smem(variant: Variant) -> int:
    """Dynamic shared memory in bytes: `s` pairs of K and V tiles, Q (later O), notes.

    With Q in registers (`q`), Q and O begin where V does.
    """
    q_or_o = variant.size("m") * max(variant.head_dim, variant.head_dim_v)
    k, v = (variant.size("s") * variant.size("n") * dim for dim in (variant.head_dim, variant.head_dim_v))
    return 2 * (k + max(v, q_or_o) if variant.size("q") else k + v + q_or_o) + NOTES
