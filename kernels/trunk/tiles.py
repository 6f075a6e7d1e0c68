"""Tiles: their layout in shared memory and the way there from global memory and back.

Names: mX is a whole (rows, columns) matrix in global memory, gX a tile of it, sX a tile in shared memory, rX registers.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import CopyUniversalOp, LoadCacheMode, cpasync

from kernels.trunk.scalars import VECTOR
from kernels.trunk.tile_coord import token_head


def swizzle_columns(head_dim: int) -> int:
    """Columns of one swizzled panel: 64 (128-byte rows) where they divide head_dim, else 32."""
    return 64 if head_dim % 64 == 0 else 32


def smem_layout(rows: int, columns: int, width: int = 0) -> cute.ComposedLayout:
    """(rows, columns) in panels of `width` (64 or 32; 0: what suits them), swizzled so that ldmatrix and 16-byte writes
    meet no conflict."""
    width = width or swizzle_columns(columns)
    atom = cute.make_composed_layout(
        cute.make_swizzle(3 if width == 64 else 2, 3, 3), 0, cute.make_layout((8, width), stride=(width, 1))
    )
    return cute.tile_to_shape(atom, (rows, columns), (0, 1))


def tile_copy(
    dtype: type[cutlass.Numeric], columns: int, threads: int, asynchronous: bool, width: int = 0
) -> cute.TiledCopy:
    """16 bytes a thread; consecutive threads along a panel's row, so that every warp touches whole sectors."""
    across = (width or swizzle_columns(columns)) // VECTOR
    op = cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL) if asynchronous else CopyUniversalOp()
    return cute.make_tiled_copy_tv(
        cute.make_copy_atom(op, dtype, num_bits_per_copy=16 * VECTOR),
        cute.make_layout((threads // across, across), stride=(across, 1)),
        cute.make_layout((1, VECTOR)),
    )


@cute.jit
def matrix_of(
    pointer: cute.Pointer,
    rows: cutlass.Int32,
    columns: cutlass.Constexpr,
    row_stride: cutlass.Int64,
    offset: cutlass.Int64,
) -> cute.Tensor:
    """The (rows, columns) matrix of one head and batch entry, `offset` elements (64 bits wide) into an array."""
    layout = cute.make_layout((rows, columns), stride=(cute.assume(row_stride, divby=VECTOR), 1))
    return cute.make_tensor(pointer + cute.assume(offset, divby=VECTOR), layout)


def thread_view(copy: cute.TiledCopy, mX: cute.Tensor, rows: int, tid: cutlass.Int32) -> cute.Tensor:
    """What a thread copies of the first `rows` rows of mX: (vector, row, panel).

    Made once, outside the loops: the thread's own offset then stays in registers.
    """
    return copy.get_slice(tid).partition_S(cute.local_tile(mX, (rows, cute.size(mX, mode=[1])), (0, 0)))


@cute.jit
def load_tile(
    copy: cute.TiledCopy,
    tXgX: cute.Tensor,
    sX: cute.Tensor,
    columns: cutlass.Int32,
    offset: cutlass.Int64,
    tid: cutlass.Int32,
    rows_left: cutlass.Int32 | None = None,
):
    """Start the asynchronous copy of a tile of a matrix, `offset` elements behind its first (`thread_view`), into sX.

    What lies outside is not read but becomes zeros: columns from `columns` on, and rows from `rows_left` on (None: the
    block is whole). Zeros, not leftovers: 0 · NaN is NaN in a product.
    """
    thread = copy.get_slice(tid)
    tXsX = thread.partition_D(sX)
    tXcX = thread.partition_S(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
    source = cute.make_tensor(tXgX.iterator + cute.assume(offset, divby=VECTOR), tXgX.layout)
    inside = cute.make_rmem_tensor(1, cutlass.Boolean)
    for row in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        for panel in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            inside[0] = tXcX[0, row, panel][1] < columns
            if cutlass.const_expr(rows_left is not None):
                inside[0] = inside[0] & (tXcX[0, row, panel][0] < rows_left)
            cute.copy(copy, source[None, row, panel], tXsX[None, row, panel], pred=inside)


@cute.jit
def row_offsets(rows: SimpleNamespace, tXcX: cute.Tensor) -> cute.Tensor:
    """Where each row that a thread copies begins, in elements. tXcX: their coordinates in the tile. See `load_rows`."""
    offsets = cute.make_rmem_tensor(cute.size(tXcX, mode=[1]), cutlass.Int64)
    first = rows.start + tXcX[0, 0, 0][0]
    if rows.pack == 1:  # by far the most frequent: one product for all rows
        offsets[0] = first * rows.token_stride
        for row in cutlass.range_constexpr(1, cute.size(offsets)):
            offsets[row] = offsets[0] + (tXcX[0, row, 0][0] - tXcX[0, 0, 0][0]) * rows.token_stride
    else:
        for row in cutlass.range_constexpr(cute.size(offsets)):
            token, head = token_head(rows, rows.start + tXcX[0, row, 0][0])
            offsets[row] = token * rows.token_stride + head * rows.head_stride
    return offsets


@cute.jit
def load_rows(
    copy: cute.TiledCopy, pointer: cute.Pointer, rows: SimpleNamespace, columns: cutlass.Int32, sX: cute.Tensor,
    tid: cutlass.Int32,
):  # fmt: skip
    """Start the asynchronous copy of a tile of packed rows; what lies outside the array becomes zeros.

    rows: what `tile_coord` says of the tile, and token_stride and head_stride of the array at `pointer`.
    """
    thread = copy.get_slice(tid)
    tXsX = thread.partition_D(sX)
    tXcX = thread.partition_S(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
    offsets = row_offsets(rows, tXcX)
    inside = cute.make_rmem_tensor(1, cutlass.Boolean)
    for row in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        for panel in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            column = tXcX[0, row, panel][1]
            inside[0] = (rows.start + tXcX[0, row, panel][0] < rows.count) & (column < columns)
            cute.copy(copy, vector_at(pointer, offsets[row] + column), tXsX[None, row, panel], pred=inside)


@cute.jit
def store_rows(
    copy: cute.TiledCopy, sX: cute.Tensor, pointer: cute.Pointer, rows: SimpleNamespace, columns: cutlass.Int32,
    tid: cutlass.Int32,
):  # fmt: skip
    """Write the rows and columns of sX that the array has, 16 bytes a thread. rows: as in `load_rows`."""
    thread = copy.get_slice(tid)
    tXsX = thread.partition_S(sX)
    tXcX = thread.partition_D(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
    rX = cute.make_fragment_like(tXsX)
    cute.copy(copy, tXsX, rX)
    offsets = row_offsets(rows, tXcX)
    for row in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        for panel in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            column = tXcX[0, row, panel][1]
            if (rows.start + tXcX[0, row, panel][0] < rows.count) & (column < columns):
                cute.copy(copy, rX[None, row, panel], vector_at(pointer, offsets[row] + column))


@cute.jit
def store_tile(
    copy: cute.TiledCopy, sX: cute.Tensor, pointer: cute.Pointer, row_stride: cutlass.Int64, rows: cutlass.Int32,
    columns: cutlass.Int32, tid: cutlass.Int32,
):  # fmt: skip
    """Write the first `rows` rows and `columns` columns of sX, 16 bytes a thread. pointer: where row 0 goes."""
    thread = copy.get_slice(tid)
    tXsX = thread.partition_S(sX)
    tXcX = thread.partition_D(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
    rX = cute.make_fragment_like(tXsX)
    cute.copy(copy, tXsX, rX)
    for row in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        for panel in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            at, column = tXcX[0, row, panel]
            if (at < rows) & (column < columns):
                cute.copy(copy, rX[None, row, panel], vector_at(pointer, at * row_stride + column))


def vector_at(pointer: cute.Pointer, offset: cutlass.Int64) -> cute.Tensor:
    return cute.make_tensor(pointer + cute.assume(offset, divby=VECTOR), cute.make_layout(((VECTOR, 1),)))
