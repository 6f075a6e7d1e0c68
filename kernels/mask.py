"""Which key blocks a query tile visits, and which scores of a boundary block count.

Query row i sees key j when i + offset − left ≤ j ≤ i + offset + right, with offset = seqlen_k − seqlen_q (bottom-right
alignment). Causal is right = 0; an open side is `registry.contract.WINDOW_OPEN`.
"""

import cutlass
import cutlass.cute as cute

from kernels.mma import rows_columns


@cute.jit
def block_ranges(
    m_start: cutlass.Int32,
    tile_m: cutlass.Constexpr,
    tile_n: cutlass.Constexpr,
    seqlen_q: cutlass.Int32,
    seqlen_k: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
) -> tuple[cutlass.Int32, cutlass.Int32, cutlass.Int32, cutlass.Int32]:
    """(first, inner_first, inner_end, end) key blocks of the query rows from m_start on.

    Blocks [inner_first, inner_end) are visible to every row and need no mask; the others in [first, end) do.
    first ≤ inner_first ≤ inner_end ≤ end holds always; nothing visible gives end = first.
    """
    offset = seqlen_k - seqlen_q
    m_last = cutlass.min(m_start + tile_m, seqlen_q) - 1
    lowest = cutlass.max(m_start + offset - left, 0)
    all_lowest = cutlass.max(m_last + offset - left, 0)
    all_end = cutlass.max(cutlass.min(m_start + offset + right + 1, seqlen_k), 0)
    highest_end = cutlass.max(cutlass.min(m_last + offset + right + 1, seqlen_k), 0)
    first = lowest // tile_n
    end = cutlass.max(cute.ceil_div(highest_end, tile_n), first)
    inner_end = cutlass.max(cutlass.min(all_end // tile_n, end), first)
    inner_first = cutlass.min(cute.ceil_div(all_lowest, tile_n), inner_end)
    return first, inner_first, inner_end, end


@cute.jit
def apply(
    acc_S: cute.Tensor,
    tScS: cute.Tensor,
    m_start: cutlass.Int32,
    n_start: cutlass.Int32,
    seqlen_q: cutlass.Int32,
    seqlen_k: cutlass.Int32,
    left: cutlass.Int32,
    right: cutlass.Int32,
):
    """Set scores outside the window or past seqlen_k to −inf. tScS: (row, column) of each score within the tile."""
    scores, coordinate = rows_columns(acc_S), rows_columns(tScS)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        # Both bounds are relative to the block's first column, so that columns stay compile-time offsets.
        diagonal = m_start + coordinate[r, 0][0] + seqlen_k - seqlen_q - n_start
        low = diagonal - left
        high = cutlass.min(diagonal + right, seqlen_k - n_start - 1)
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = coordinate[0, c][1]
            hidden = (column < low) | (column > high)
            scores[r, c] = -cutlass.Float32.inf if hidden else scores[r, c]
