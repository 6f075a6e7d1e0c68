"""Keys and values in pages: where each key lies, and the way from there into shared memory.

A page is `page_size` keys of all heads, anywhere; a row of the page table names an entry's pages in order. Nothing is
read, of the table or of a page, that belongs to keys outside low … end − 1: two of the block's notes, so that no
register holds them from load to load. A page's number below 0 counts as 0: graphs are padded with sequences of it.

Where page_size is a multiple of GROUP, each GROUP keys of a block lie one behind another (`pages.grouped`): their page
and their place in it are the same for all threads, and what is a thread's own does not change from block to block.
Other page sizes cost a look-up and multiplications a row.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from kernels.trunk.forward import NOTED
from kernels.trunk.scalars import element, fast_div
from kernels.trunk.tiles import vector_at

LOW, END = NOTED, NOTED + 1  # where they are among the notes
GROUP = 16  # keys: the smallest page that is common, and what every tile is a multiple of


@dataclass(frozen=True)
class Rows:
    """What a thread copies of a tile. coordinates: (vector, row, panel) of it; at_once: rows that all threads copy at
    once; group: how many of a thread's rows lie in the same GROUP."""

    coordinates: cute.Tensor
    target: cute.Tensor
    at_once: int

    @property
    def group(self) -> int:
        return max(GROUP // self.at_once, 1)

    def lane(self) -> Int32:
        """The thread's first row, counted from its group's first."""
        row = self.coordinates[0, 0, 0][0]
        return row if self.at_once <= GROUP else row % GROUP

    def group_start(self, i: int) -> int | Int32:
        """The first row of the group of the thread's i-th row."""
        if self.at_once <= GROUP:
            return i // self.group * GROUP
        return self.coordinates[0, i, 0][0] - self.lane()


def rows_of(copy: cute.TiledCopy, sX: cute.Tensor, tid: Int32) -> Rows:
    thread = copy.get_slice(tid)
    tXcX = thread.partition_S(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
    return Rows(tXcX, thread.partition_D(sX), cute.size(sX, mode=[0]) // cute.size(tXcX, mode=[1]))


@cute.jit
def page_of(pages: SimpleNamespace, key: Int32, low: Int32, end: Int32) -> Int32:
    """The page of a key, as the table has it; where there is no such key, of the nearest one that there is."""
    number = pages.batch_idx
    if pages.table.toint() != 0:
        key = cutlass.min(cutlass.max(key, low), end - 1)
        number = element(pages.table, pages.table_row + fast_div(key, pages.magic, pages.shift))
    return number


@cute.jit
def read_table(pages: SimpleNamespace, copy: cute.TiledCopy, sX: cute.Tensor, n_start: Int32, tid: Int32,
               numbers: cute.Tensor):  # fmt: skip
    """numbers[i] = the page of the thread's i-th row of the block that begins at key n_start; sX: as in `load_pages`.

    A block ahead of its loads: what the table says takes as long to arrive as a page's own bytes.
    """
    rows = rows_of(copy, sX, tid)
    low, end = pages.notes[LOW], pages.notes[END]
    if pages.grouped:
        for i in cutlass.range_constexpr(0, cute.size(numbers), rows.group):
            numbers[i] = page_of(pages, n_start + rows.group_start(i), low, end)
    else:
        for i in cutlass.range_constexpr(cute.size(numbers)):
            numbers[i] = page_of(pages, n_start + rows.coordinates[0, i, 0][0], low, end)


@cute.jit
def load_pages(
    pages: SimpleNamespace, copy: cute.TiledCopy, numbers: cute.Tensor, n_start: Int32, tid: Int32, of: SimpleNamespace,
    sX: cute.Tensor, bounded: cutlass.Constexpr,
):  # fmt: skip
    """Start the asynchronous copy of a block of keys or values; numbers: of its rows, by `read_table`.

    of: where pages of keys, or of values, lie (start, page_stride, row_stride, columns; lane: of the thread's own row
    and column in a group). bounded: rows may lack a key. Those, and columns beyond the head dims, become zeros: 0 · NaN
    is NaN in a product.
    """
    if pages.grouped:
        load_rows_of_pages(pages, copy, numbers, n_start, tid, of, sX, bounded, True)
    else:
        load_rows_of_pages(pages, copy, numbers, n_start, tid, of, sX, bounded, False)


@cute.jit
def load_rows_of_pages(
    pages: SimpleNamespace, copy: cute.TiledCopy, numbers: cute.Tensor, n_start: Int32, tid: Int32, of: SimpleNamespace,
    sX: cute.Tensor, bounded: cutlass.Constexpr, grouped: cutlass.Constexpr,
):  # fmt: skip
    rows = rows_of(copy, sX, tid)
    tXcX, tXsX = rows.coordinates, rows.target
    apart = rows.at_once * of.row_stride
    low, end = Int32(0), Int32(0)
    if cutlass.const_expr(bounded):
        low, end = pages.notes[LOW], pages.notes[END]
    inside = cute.make_rmem_tensor(1, cutlass.Boolean)
    offset = Int64(0)
    for i in cutlass.range_constexpr(cute.size(numbers)):
        key = n_start + tXcX[0, i, 0][0]
        if cutlass.const_expr(grouped and i % rows.group != 0):
            offset = offset + apart
        else:
            first = n_start + rows.group_start(i) if grouped else key
            slot = first - fast_div(first, pages.magic, pages.shift) * pages.size
            page = cutlass.max(numbers[i], 0)  # here, not in `page_of`: there it would wait for what the table says
            offset = Int64(page) * of.page_stride + Int64(slot) * of.row_stride
            offset = offset + (of.lane if grouped else tXcX[0, 0, 0][1])
        for panel in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            column = tXcX[0, i, panel][1]
            inside[0] = column < of.columns
            if cutlass.const_expr(bounded):
                inside[0] = inside[0] & (key >= low) & (key < end)
            across = column - tXcX[0, 0, 0][1]
            cute.copy(copy, vector_at(of.start, offset + across), tXsX[None, i, panel], pred=inside)
