"""How a tile of `bwd` lies in shared memory, and how its warps share out dQ."""

from registry.contract.variant import Variant

NOTES = 80  # bytes in which a block keeps what it needs again in each part of its loop


def smem(variant: Variant) -> int:
    """Dynamic shared memory in bytes: K, V but for what is in registers, `s` tiles of Q and `o` of dO, dS, P where it
    is needed, LSE and delta of each query tile, a float for each warp, notes."""
    m, n, dim = variant.size("m"), variant.size("n"), variant.head_dim
    keys = n * dim + n * (variant.head_dim_v - v_lent(variant))
    stats = m * (variant.size("s") + max(variant.size("o"), 1))
    return 2 * (keys + queries_and_scores(variant)) + 4 * (stats + variant.size("w")) + NOTES


def v_lent(variant: Variant) -> int:
    """Columns of V, in whole panels, that are needed in registers alone: their memory is lent to queries and scores."""
    panel = 64 if variant.head_dim_v % 64 == 0 else 32
    return variant.size("r") * 16 // panel * panel


def queries_and_scores(variant: Variant) -> int:
    """Elements of Q, dO, dS and P in shared memory."""
    m, n = variant.size("m"), variant.size("n")
    queries = m * (variant.size("s") * variant.head_dim + max(variant.size("o"), 1) * variant.head_dim_v)
    return queries + n * m * (2 if variant.size("x") > 1 else 1)


def dq_warps(variant: Variant) -> tuple[int, int] | None:
    """(warps along the rows, warps along the columns) of dQ's product: 32 rows a warp where they fit; None: no way."""
    warps = variant.size("w")
    for down in (variant.size("m") // 32, variant.size("m") // 16):
        if down and warps % down == 0 and variant.head_dim % (16 * (warps // down)) == 0:
            return down, warps // down
    return None
