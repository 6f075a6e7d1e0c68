"""Keys and values in pages: where each key lies, and the way from there into shared memory.

A page is `page_size` keys of all heads, anywhere; a row of the page table names an entry's pages in order. Nothing is
read, of the table or of a page, that belongs to keys outside low … end − 1: two of the block's notes, so that no
register holds them from load to load.

Where page_size is a multiple of GROUP, each GROUP keys of a block lie one behind the other (`pages.grouped`): a thread
then looks up one page for all rows that it copies of them. Other page sizes cost a look-up and a multiplication a row.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from kernels.place import divided, element
from kernels.tiles import vector_at

LOW, END = 7, 8  # their places among the notes
GROUP = 16  # keys: the smallest page that is common, and what every tile is a multiple of


def rows_of(copy: cute.TiledCopy, sX: cute.Tensor, tid: Int32) -> tuple[cute.Tensor, cute.Tensor, int]:
    """(coordinates of what a thread copies, where it goes, its rows of each GROUP)."""
    thread = copy.get_slice(tid)
    tXcX = thread.partition_S(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
    at_once = cute.size(sX, mode=[0]) // cute.size(tXcX, mode=[1])
    return tXcX, thread.partition_D(sX), max(GROUP // at_once, 1)


@cute.jit
def read_table(pages: SimpleNamespace, copy: cute.TiledCopy, sX: cute.Tensor, n_start: Int32, tid: Int32,
               numbers: cute.Tensor):  # fmt: skip
    """numbers[i] = the page of the thread's i-th row of the block that begins at key n_start; sX: as in `load_pages`.

    A block ahead of its loads: what the table says takes as long to arrive as a page's own bytes. Rows without a key
    get the nearest key's page.
    """
    tXcX, _, group = rows_of(copy, sX, tid)
    low, end = pages.notes[LOW], pages.notes[END]
    for i in cutlass.range_constexpr(cute.size(numbers)):
        key = cutlass.min(cutlass.max(n_start + tXcX[0, i, 0][0], low), end - 1)
        if cutlass.const_expr(i % group == 0):
            numbers[i] = pages.entry
            if pages.table.toint() != 0:
                numbers[i] = element(pages.table, pages.table_row + divided(key, pages.magic, pages.shift))
        elif (not pages.grouped) & (pages.table.toint() != 0):
            numbers[i] = element(pages.table, pages.table_row + divided(key, pages.magic, pages.shift))
        else:
            numbers[i] = pages.entry


@cute.jit
def load_pages(
    pages: SimpleNamespace, copy: cute.TiledCopy, numbers: cute.Tensor, n_start: Int32, tid: Int32, of: SimpleNamespace,
    sX: cute.Tensor,
):  # fmt: skip
    """Start the asynchronous copy of a block of keys or values; numbers: of its rows, by `read_table`.

    of: where pages of keys, or of values, lie (start, page_stride, row_stride, columns). Rows without a key and columns
    beyond the head dims become zeros: 0 · NaN is NaN in a product.
    """
    if pages.grouped:
        load_rows_of_pages(pages, copy, numbers, n_start, tid, of, sX, True)
    else:
        load_rows_of_pages(pages, copy, numbers, n_start, tid, of, sX, False)


@cute.jit
def load_rows_of_pages(
    pages: SimpleNamespace, copy: cute.TiledCopy, numbers: cute.Tensor, n_start: Int32, tid: Int32, of: SimpleNamespace,
    sX: cute.Tensor, grouped: cutlass.Constexpr,
):  # fmt: skip
    tXcX, tXsX, group = rows_of(copy, sX, tid)
    step = (tXcX[0, 1, 0][0] - tXcX[0, 0, 0][0]) * of.row_stride if cute.size(numbers) > 1 else Int64(0)
    inside = cute.make_rmem_tensor(1, cutlass.Boolean)
    offset = Int64(0)
    low, end = pages.notes[LOW], pages.notes[END]
    for i in cutlass.range_constexpr(cute.size(numbers)):
        key = n_start + tXcX[0, i, 0][0]
        if cutlass.const_expr(grouped and i % group != 0):
            offset = offset + step
        else:
            row = key - divided(key, pages.magic, pages.shift) * pages.size
            offset = Int64(numbers[i]) * of.page_stride + Int64(row) * of.row_stride
        for panel in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            column = tXcX[0, i, panel][1]
            inside[0] = (key >= low) & (key < end) & (column < of.columns)
            cute.copy(copy, vector_at(of.start, offset + column), tXsX[None, i, panel], pred=inside)
