"""Tiles: their layout in shared memory and the way there from global memory and back.

Names: mX is a whole (rows, columns) matrix in global memory, gX a tile of it, sX a tile in shared memory, rX registers.
"""

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import CopyUniversalOp, LoadCacheMode, cpasync

VECTOR = 8  # elements of a 16-byte access at two bytes each


def swizzle_columns(head_dim: int) -> int:
    """Columns of one swizzled panel: 64 (128-byte rows) where they divide head_dim, else 32."""
    return 64 if head_dim % 64 == 0 else 32


def smem_layout(rows: int, columns: int) -> cute.ComposedLayout:
    """(rows, columns) in panels of 64 or 32 columns, swizzled so that ldmatrix and 16-byte writes meet no conflict."""
    width = swizzle_columns(columns)
    atom = cute.make_composed_layout(
        cute.make_swizzle(3 if width == 64 else 2, 3, 3), 0, cute.make_layout((8, width), stride=(width, 1))
    )
    return cute.tile_to_shape(atom, (rows, columns), (0, 1))


def tile_copy(dtype: type[cutlass.Numeric], columns: int, threads: int, asynchronous: bool) -> cute.TiledCopy:
    """16 bytes a thread; consecutive threads along a panel's row, so that every warp touches whole sectors."""
    across = swizzle_columns(columns) // VECTOR
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
    head_stride: cutlass.Int64,
    batch_stride: cutlass.Int64,
    head: cutlass.Int32,
    batch: cutlass.Int32,
) -> cute.Tensor:
    """The (rows, columns) matrix of one head and batch entry of a strided 4-D array. Offsets are 64 bits wide."""
    offset = cute.assume(batch * batch_stride + head * head_stride, divby=VECTOR)
    layout = cute.make_layout((rows, columns), stride=(cute.assume(row_stride, divby=VECTOR), 1))
    return cute.make_tensor(pointer + offset, layout)


def thread_view(copy: cute.TiledCopy, mX: cute.Tensor, rows: int, tid: cutlass.Int32) -> cute.Tensor:
    """What a thread copies of each row block of mX: (vector, row, column, row block).

    Made once, outside the loops: the thread's own offset then stays in registers, and a block costs one product.
    """
    return copy.get_slice(tid).partition_S(cute.local_tile(mX, (rows, cute.size(mX, mode=[1])), (None, 0)))


@cute.jit
def load_tile(
    copy: cute.TiledCopy,
    tXgX: cute.Tensor,
    sX: cute.Tensor,
    block: cutlass.Int32,
    tid: cutlass.Int32,
    rows_left: cutlass.Int32 | None = None,
):
    """Start the asynchronous copy of row block `block` of a matrix (`thread_view`) into sX.

    rows_left: where the matrix may end within the block: rows from it on are not read but become zeros. Zeros, not
        leftovers: 0 · NaN in P·V is NaN. None: the block is whole.
    """
    thread = copy.get_slice(tid)
    tXsX = thread.partition_D(sX)
    source = tXgX[None, None, None, block]
    if cutlass.const_expr(rows_left is not None):
        tXcX = thread.partition_S(cute.make_identity_tensor((cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))))
        for row in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
            if tXcX[0, row, 0][0] < rows_left:
                cute.copy(copy, source[None, row, None], tXsX[None, row, None])
            else:
                tXsX[None, row, None].fill(0)
    else:
        cute.copy(copy, source, tXsX)


@cute.jit
def store_tile(copy: cute.TiledCopy, sX: cute.Tensor, mX: cute.Tensor, block: cutlass.Int32, tid: cutlass.Int32):
    """Write the rows of sX that exist in mX as row block `block`, 16 bytes a thread."""
    tile = (cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))
    thread = copy.get_slice(tid)
    tXsX = thread.partition_S(sX)
    tXgX = thread.partition_D(cute.local_tile(mX, tile, (block, 0)))
    tXcX = thread.partition_D(cute.make_identity_tensor(tile))
    rows_left = mX.shape[0] - block * tile[0]
    rX = cute.make_fragment_like(tXsX)
    cute.copy(copy, tXsX, rX)
    for row in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        if tXcX[0, row, 0][0] < rows_left:
            cute.copy(copy, rX[None, row, None], tXgX[None, row, None])
