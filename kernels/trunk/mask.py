"""Which key blocks a query tile visits, and which scores of a boundary block count.

Query token i sees key j when i + offset − left ≤ j ≤ i + offset + right, with offset = seqlen_k − seqlen_q
(bottom-right alignment). Causal is right = 0; an open side is `registry.contract.WINDOW_OPEN`, 2**30.

Range: seqlen_q + seqlen_k < 2**30 (`registry.ops.attention`). So i + offset, also relative to a block's first key,
lies between −2**30 and 2**30 for a token i that exists, and with a side of the window added it stays in 32 bits. In a
row past the last token the sum may wrap around: nobody looks at its scores.
"""

import cutlass
import cutlass.cute as cute

from kernels.trunk.mma import rows_columns


@cute.jit
def block_ranges(
    token_first: cutlass.Int32,
    token_last: cutlass.Int32,
    tile_n: cutlass.Constexpr,
    offset: cutlass.Int32,
    seqlen_k: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
    padding: cutlass.Int32 | None = None,
) -> tuple[cutlass.Int32, cutlass.Int32, cutlass.Int32, cutlass.Int32]:
    """(first, inner_first, inner_end, end) key blocks of the query tokens token_first … token_last.

    Blocks [inner_first, inner_end) are visible to every row and need no mask; the others in [first, end) do.
    first ≤ inner_first ≤ inner_end ≤ end holds always; nothing visible gives end = first. padding: the first keys that
    do not exist, up to seqlen_k; None: it is 0.
    """
    least = cutlass.Int32(0) if padding is None else padding
    lowest = cutlass.max(token_first + offset - left, least)
    all_lowest = cutlass.max(token_last + offset - left, least)
    all_end = cutlass.max(cutlass.min(token_first + offset + right + 1, seqlen_k), 0)
    highest_end = cutlass.max(cutlass.min(token_last + offset + right + 1, seqlen_k), 0)
    first = lowest // tile_n
    end = cutlass.max(cute.ceil_div(highest_end, tile_n), first)
    if cutlass.const_expr(padding is not None):  # it may end within the last block, and all that rows see before it
        end = first if highest_end <= lowest else end
    inner_end = cutlass.max(cutlass.min(all_end // tile_n, end), first)
    inner_first = cutlass.min(cute.ceil_div(all_lowest, tile_n), inner_end)
    return first, inner_first, inner_end, end


@cute.jit
def apply(
    acc_S: cute.Tensor,
    tScS: cute.Tensor,
    diagonals: cute.Tensor,
    keys_left: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
    first_key: cutlass.Int32 | None = None,
):
    """Set scores outside the window or past the last key to −inf. tScS: (row, column) of each score within the tile.

    diagonals: the column of each row's diagonal, keys_left: the first column behind the keys, first_key: the first with
    one, if not all before have; all relative to the block's first column, so that columns stay compile-time offsets.
    """
    scores, coordinate = rows_columns(acc_S), rows_columns(tScS)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        low = diagonals[r] - left
        if cutlass.const_expr(first_key is not None):
            low = cutlass.max(low, first_key)
        high = cutlass.min(diagonals[r] + right, keys_left - 1)
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = coordinate[0, c][1]
            hidden = (column < low) | (column > high)
            scores[r, c] = -cutlass.Float32.inf if hidden else scores[r, c]


@cute.jit
def query_ranges(
    key_first: cutlass.Int32,
    key_last: cutlass.Int32,
    tile_m: cutlass.Constexpr,
    offset: cutlass.Int32,
    seqlen_q: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
) -> tuple[cutlass.Int32, cutlass.Int32, cutlass.Int32, cutlass.Int32]:
    """(first, inner_first, inner_end, end) query tiles that see a key of key_first … key_last.

    Every row of tiles [inner_first, inner_end) sees all these keys; rows behind the last may count among them. A tile
    is in [first, end) exactly where `block_ranges` has a block of these keys for it.
    """
    lowest = cutlass.max(key_first - right - offset, 0)
    highest_end = cutlass.min(key_last + left - offset + 1, seqlen_q)
    first = lowest // tile_m
    end = first
    if lowest < highest_end:
        end = cute.ceil_div(highest_end, tile_m)
    inner_first = cute.ceil_div(cutlass.max(key_last - right - offset, 0), tile_m)
    inner_end = cutlass.max(key_first + left - offset + 1, 0) // tile_m
    return first, inner_first, inner_end, end


@cute.jit
def apply_transposed(
    acc_S: cute.Tensor,
    tScS: cute.Tensor,
    diagonal: cutlass.Int32,
    keys_left: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
):
    """`apply` where keys lie along the rows. diagonal: the row of the first column's, keys_left: the first without a
    key; both may lie outside the tile."""
    scores, coordinate = rows_columns(acc_S), rows_columns(tScS)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            hidden = is_hidden(coordinate, r, c, diagonal, keys_left, left, right)
            scores[r, c] = -cutlass.Float32.inf if hidden else scores[r, c]


@cute.jit
def is_hidden(
    coordinate: cute.Tensor,
    r: cutlass.Constexpr,
    c: cutlass.Constexpr,
    diagonal: cutlass.Int32,
    keys_left: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
) -> cutlass.Boolean:
    row, on_diagonal = coordinate[r, 0][0], coordinate[0, c][1] + diagonal
    return (row < on_diagonal - left) | (row > on_diagonal + right) | (row >= keys_left)
