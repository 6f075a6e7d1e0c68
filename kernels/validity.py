"""What tiles can be built, and why others cannot. Pure arithmetic, no cutlass.

The letters of a forward tile: m query rows, n key columns, w warps, s stages; and, where they are not 0, q steps of 16
columns of Q that stay in registers, a 1 for addresses of K and V that are carried from block to block.

Apart from the table: a change of the table is then no change of a kernel's sources.
"""

from registry.contract.arch import MAX_SMEM
from registry.contract.variant import Variant
from registry.ops.attention import E4M3
from registry.ops.workspaces import ROWS

NOTES = 32  # bytes of shared memory in which a block keeps what it needs again after its loops
PAGED_NOTES = 48  # the same of the paged forward
BWD_NOTES = 80  # and of the backward


def fwd_smem(variant: Variant) -> int:
    """Dynamic shared memory of a forward variant in bytes: `s` pairs of K and V tiles, Q (later O), notes.

    With Q in registers (`q`), Q and O begin where V does.
    """
    q_or_o = variant.size("m") * max(variant.head_dim, variant.head_dim_v)
    k, v = (variant.size("s") * variant.size("n") * dim for dim in (variant.head_dim, variant.head_dim_v))
    return 2 * (k + max(v, q_or_o) if variant.size("q") else k + v + q_or_o) + NOTES


def q_covered(variant: Variant) -> int:
    """Steps of Q, in whole panels, that lie in V's place if Q begins there: at least those must stay in registers."""
    panel = 64 if variant.head_dim % 64 == 0 else 32
    panels = -(-variant.size("n") * variant.head_dim_v // (variant.size("m") * panel))
    return min(panels * panel, variant.head_dim) // 16


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
    if variant.size("a") not in (0, 1):
        return f"a{variant.size('a')}: addresses are carried (a1) or not (no a)"
    if steps := variant.size("q"):
        if variant.size("s") != 1:
            return f"q{steps}: Q passes through the place of V, which one stage leaves free"
        if not q_covered(variant) <= steps <= variant.head_dim // 16:
            return (
                f"q{steps}: from q{q_covered(variant)}, what lies in V's place, to q{variant.head_dim // 16}, all of Q"
            )
    if fwd_smem(variant) > MAX_SMEM:
        return f"{fwd_smem(variant)} bytes of shared memory, a block has {MAX_SMEM}"
    return None


def paged_smem(variant: Variant) -> int:
    """Dynamic shared memory of a paged forward in bytes: `s` pairs of K and V tiles, Q, notes; later O.

    A Q that stays in registers begins where the last stage of V does.
    """
    element = 1 if E4M3 in variant.features else 2
    v_stage = variant.size("n") * variant.head_dim_v * element
    stages = variant.size("s") * (variant.size("n") * variant.head_dim * element + v_stage)
    q_end = stages - (v_stage if variant.size("q") else 0) + 2 * variant.size("m") * variant.head_dim
    return max(stages, q_end, 2 * variant.size("m") * variant.head_dim_v) + PAGED_NOTES


def paged_invalid(variant: Variant) -> str | None:
    """Why the paged forward cannot be built with this tile and head_dim; None if it can.

    Letters as for the forward, with any number of stages; with several, q is none or all of Q's steps.
    """
    m, n, warps, stages, steps = (variant.size(letter) for letter in "mnwsq")
    e4m3 = E4M3 in variant.features
    if set(variant.features) - {E4M3}:
        return f"features {variant.features}: the only one is {E4M3}"
    unit = 2 if e4m3 else 1
    for dim in (variant.head_dim, variant.head_dim_v):
        if dim % (32 * unit):
            return f"head_dim {dim} is no multiple of {32 * unit}"
    panel = min(64 if dim // unit % 64 == 0 else 32 for dim in (variant.head_dim, variant.head_dim_v))
    at_once = [32 * warps * 8 // width for width in (panel, *(64 if d % 64 == 0 else 32 for d in (variant.head_dim,)))]
    if n % at_once[0] or m % at_once[1]:
        return f"{32 * warps} threads copy {at_once[1]} rows of Q and {at_once[0]} of K: no divisors of m{m} and n{n}"
    if m % (16 * warps) or n % 16:
        return f"m{m} is no multiple of 16 rows for each of {warps} warps, or n{n} none of 16"
    if stages < 1:
        return "s0: there is one stage or more"
    if stages > 1 and steps not in (0, variant.head_dim // 16):
        return f"q{steps}: with several stages none of Q stays in registers or all of it, q{variant.head_dim // 16}"
    if stages == 1 and steps and not q_covered(variant) <= steps <= variant.head_dim // 16:
        return f"q{steps}: from q{q_covered(variant)}, what lies in V's place, to q{variant.head_dim // 16}, all of Q"
    if e4m3 and steps != variant.head_dim // 16:
        return f"{E4M3} needs Q in registers, q{variant.head_dim // 16}"
    if paged_smem(variant) > MAX_SMEM:
        return f"{paged_smem(variant)} bytes of shared memory, a block has {MAX_SMEM}"
    return None


def combine_invalid(variant: Variant) -> str | None:
    """Why `fwd_combine` cannot be built so; None if it can. m: rows of a block, a warp each."""
    if variant.head_dim_v % 128 or variant.head_dim != variant.head_dim_v or variant.features:
        return "head_dim and head_dim_v are the same multiple of 128, the most that a call may have; no features"
    if not 1 <= variant.size("m") <= 32:
        return f"m{variant.size('m')}: a block has 1 to 32 rows, a warp each"
    return None


def append_invalid(variant: Variant) -> str | None:
    """Why `kv_append` cannot be built so; None if it can. m: rows of a block, a warp each."""
    if variant.head_dim != 256 or variant.head_dim_v != 256 or set(variant.features) - {E4M3}:
        return f"head_dim and head_dim_v are 256, 8 columns a lane; the only feature is {E4M3}"
    if not 1 <= variant.size("m") <= 32:
        return f"m{variant.size('m')}: a block has 1 to 32 rows, a warp each"
    return None


def rows_invalid(variant: Variant) -> str | None:
    """Why `bwd_preprocess` or `bwd_postprocess` cannot be built so; None if it can. m: rows of a block."""
    if variant.head_dim != 256 or variant.head_dim_v != 256 or variant.features:
        return "head_dim and head_dim_v are 256, the most that a call may have; no features"
    if variant.size("m") != ROWS:
        return f"m{variant.size('m')}: a block has the {ROWS} rows in which workspaces are laid out"
    return None


def sum_invalid(variant: Variant) -> str | None:
    """Why `bwd_sum` cannot be built so; None if it can. m: units of SUM_UNIT elements of a block, a warp each."""
    if variant.head_dim != 256 or variant.head_dim_v != 256 or variant.features:
        return "head_dim and head_dim_v are 256, the most that a call may have; no features"
    if not 1 <= variant.size("m") <= 32:
        return f"m{variant.size('m')}: a block has 1 to 32 units, a warp each"
    return None


def v_lent(variant: Variant) -> int:
    """Columns of V, in whole panels, that are needed in registers alone: their memory is lent to queries and scores."""
    panel = 64 if variant.head_dim_v % 64 == 0 else 32
    return variant.size("r") * 16 // panel * panel


def bwd_smem(variant: Variant) -> int:
    """Dynamic shared memory of a backward variant in bytes: K, V but for what is in registers, `s` tiles of Q and `o`
    of dO, dS, P where it is needed, LSE and delta of each query tile, a float for each warp, notes."""
    m, n, dim = variant.size("m"), variant.size("n"), variant.head_dim
    keys = n * dim + n * (variant.head_dim_v - v_lent(variant))
    stats = m * (variant.size("s") + max(variant.size("o"), 1))
    return 2 * (keys + _queries_and_scores(variant)) + 4 * (stats + variant.size("w")) + BWD_NOTES


def _queries_and_scores(variant: Variant) -> int:
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


def bwd_invalid(variant: Variant) -> str | None:
    """Why the backward kernel cannot be built so; None if it can.

    Letters: m query rows, n keys, w warps, s tiles of Q, o of dO (1 if it is not written); c chunks of query rows that
    are taken one after the other; r steps of 16 columns of V that stay in registers; x warps side by side, which share
    rows (1 if not written); t, a 1 for addresses that are computed anew in each part of a query tile; u, a 1 for scores
    that are computed of all rows at once, before the chunks.
    """
    m, n, warps, steps = (variant.size(letter) for letter in "mnwr")
    chunks, across = max(variant.size("c"), 1), max(variant.size("x"), 1)
    if variant.features:
        return f"features {variant.features}: there are none"
    for dim in (variant.head_dim, variant.head_dim_v):
        if dim % 32 or dim % (16 * across):
            return f"head_dim {dim} is no multiple of 32 and of 16 columns for each of {across} warps"
        rows_at_once = 32 * warps // (8 if dim % 64 == 0 else 4)
        if m % rows_at_once or n % rows_at_once:
            return (
                f"{32 * warps} threads copy {rows_at_once} rows of head_dim {dim} at once: no divisor of m{m} and n{n}"
            )
    if warps % across or n % (16 * warps // across):
        return f"n{n} is no multiple of 16 rows for each of {warps} / {across} warps"
    if m not in (32, 64, 128):
        return f"m{m}: a query tile has 32, 64 or 128 rows, so that {ROWS} are whole tiles"
    if m % chunks or m // chunks % (16 * across):
        return f"c{chunks}: chunks of m{m} are no multiple of 16 columns for each of {across} warps"
    if variant.size("s") not in (1, 2) or variant.size("o") > 2:
        return f"s{variant.size('s')} and o{variant.size('o')}: one or two stages are implemented"
    if variant.size("t") > 1 or variant.size("u") > 1:
        return f"t{variant.size('t')}, u{variant.size('u')}: addresses anew and scores at once, each is 1 or not there"
    if steps > variant.head_dim_v // 16:
        return f"r{steps}: head_dim_v {variant.head_dim_v} has {variant.head_dim_v // 16} steps"
    if n * v_lent(variant) > _queries_and_scores(variant):
        return f"r{steps}: what V lends does not fit into the memory of queries and scores at first"
    if n * (variant.head_dim_v - variant.head_dim) > _queries_and_scores(variant):
        return f"dV of n{n} x {variant.head_dim_v} does not fit into the tiles' memory at the end"
    if dq_warps(variant) is None:
        return f"{warps} warps do not divide the {m} x {variant.head_dim} of dQ"
    if bwd_smem(variant) > MAX_SMEM:
        return f"{bwd_smem(variant)} bytes of shared memory, a block has {MAX_SMEM}"
    return None
