"""The dispatch table: which variants exist and which call gets which. Pure data, written once. No cutlass import.

The builder compiles `variants()`, the index carries `rows()`, the runtime evaluates what the index carries.
"""

from registry.contract import DTYPES, Condition, DispatchRow, Variant

# (head_dim, head_dim_v) -> two tiles (query rows, key columns, warps, stages): for long queries and for short ones,
# which must not pay for 128 rows. docs/tuning.md has the measurements behind them.
FWD_TILES = {
    (64, 64): ((128, 64, 4, 2), (64, 64, 4, 2)),
    (96, 96): ((128, 64, 4, 1), (64, 64, 4, 1)),
    (128, 128): ((128, 32, 4, 1), (64, 64, 4, 1)),
    (192, 192): ((128, 64, 8, 1), (64, 32, 4, 1)),
    (256, 256): ((128, 32, 8, 1), (64, 64, 4, 1)),
}
FWD_SHORT_QUERY = 64  # up to this seqlen_q the short tile wastes fewer rows


def _fwd(dtype: str, dims: tuple[int, int], tile: tuple[int, int, int, int]) -> Variant:
    return Variant("fwd", dtype, *dims, tile=tuple(zip("mnws", tile, strict=True)))


def rows() -> tuple[DispatchRow, ...]:
    """All dispatch rows, in order: the first whose conditions hold serves the call."""
    table = []
    for dims, (long_tile, short_tile) in FWD_TILES.items():
        for dtype in DTYPES:
            base = (
                Condition("dtype", "==", dtype),
                Condition("head_dim", "==", dims[0]),
                Condition("head_dim_v", "==", dims[1]),
            )
            short = Condition("seqlen_q", "<=", FWD_SHORT_QUERY)
            table.append(DispatchRow("fwd", (*base, short), _fwd(dtype, dims, short_tile).key))
            table.append(DispatchRow("fwd", base, _fwd(dtype, dims, long_tile).key))
    return tuple(table)


def variants() -> tuple[Variant, ...]:
    """Every variant that a row names, once, sorted by key."""
    return tuple(Variant.parse(key) for key in sorted({row.variant for row in rows()}))
