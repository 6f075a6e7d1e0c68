"""What tiles can be built, and why others cannot. Pure arithmetic, no cutlass.

Apart from the table: a change of the table is then no change of a kernel's sources.
"""

from registry.contract import MAX_SMEM, Variant

NOTES = 32  # bytes of shared memory in which a block keeps what it needs again after its loops


def fwd_smem(variant: Variant) -> int:
    """Dynamic shared memory of a forward variant in bytes: `s` pairs of K and V tiles, Q (later O), notes.

    With Q in registers, Q and O lie where V does.
    """
    q_or_o = variant.size("m") * max(variant.head_dim, variant.head_dim_v)
    k, v = (variant.size("s") * variant.size("n") * dim for dim in (variant.head_dim, variant.head_dim_v))
    return 2 * (k + max(v, q_or_o) if q_in_registers(variant) else k + v + q_or_o) + NOTES


def q_in_registers(variant: Variant) -> bool:
    return ("q", 1) in variant.tile


def fwd_invalid(variant: Variant) -> str | None:
    """Why the forward kernel cannot be built with this tile and head_dim; None if it can."""
    m, n, warps = (variant.size(letter) for letter in "mnw")
    for dim in (variant.head_dim, variant.head_dim_v):
        if dim % 32:
            return f"head_dim {dim} is no multiple of 32"
        rows_at_once = 32 * warps // (8 if dim % 64 == 0 else 4)  # 16 bytes a thread along a panel of 64 or 32 columns
        if m % rows_at_once or n % rows_at_once:
            return (
                f"{32 * warps} threads copy {rows_at_once} rows of head_dim {dim} at once: no divisor of m{m} and n{n}"
            )
    if m % (16 * warps) or n % 16:
        return f"m{m} is no multiple of 16 rows for each of {warps} warps, or n{n} none of 16"
    if variant.size("s") not in (1, 2):
        return f"s{variant.size('s')}: one or two stages are implemented"
    if q_in_registers(variant) and variant.size("s") != 1:
        return "q1: Q passes through the place of V, which one stage leaves free"
    if fwd_smem(variant) > MAX_SMEM:
        return f"{fwd_smem(variant)} bytes of shared memory, a block has {MAX_SMEM}"
    return None
