"""The backward's workspaces of query rows, and what the two kernels around it have alike.

`registry.ops.workspaces` has their layout. A block of `bwd_preprocess` or
`bwd_postprocess` takes ROWS rows of one query head and batch entry.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from kernels.trunk.scalars import DTYPES, VECTOR
from kernels.trunk.tile_coord import batch_idx_of, first_tile, sequence
from registry.contract.variant import Variant
from registry.ops.workspaces import ROWS

THREADS = 256
STRIP = 16  # rows of a unit of dq_accum
UNIT = 8 * STRIP  # its elements


def packed_row(token: Int32, batch_idx: Int32) -> Int32:
    """The workspace row of a packed entry that begins at `token`."""
    return (token // ROWS + batch_idx) * ROWS


@cute.jit
def tile_start(tile: Int32, total: Int32, tile_m: cutlass.Constexpr) -> Int32:
    """The first token of an entry's tile. Where `cu_seqlens` is not sorted its number can be anything: below 0 or far
    behind the array's end it is taken for one just behind that."""
    last = Uint32(total // tile_m + 1)
    return Int32(cutlass.min(Uint32(tile), last)) * tile_m


@cute.jit
def tile_coord(call: SimpleNamespace, block: Int32) -> SimpleNamespace:
    """Where a block works: entry, head, the tile's first row and the number of rows that the entry has, its first
    token, and the tile's first row in the workspaces.

    heads · tiles, with batch in it where q is dense, is the number of blocks, below 2**31.
    """
    tiles = cute.ceil_div(call.seqlen_q, ROWS) * call.batch
    if call.cu_seqlens_q.toint() != 0:
        tiles = call.seqlen_q // ROWS + call.batch
    head = block // tiles
    tile = block - head * tiles
    of_entry = cute.ceil_div(call.seqlen_q, ROWS)
    batch_idx = tile // of_entry
    start = (tile - batch_idx * of_entry) * ROWS
    if call.cu_seqlens_q.toint() != 0:
        batch_idx = batch_idx_of(tile, call.cu_seqlens_q, call.batch, call.seqlen_q, Int32(1), ROWS)
        first = first_tile(call.cu_seqlens_q, batch_idx, call.seqlen_q, Int32(1), ROWS)
        start = tile_start(tile - first, call.seqlen_q, ROWS)
    q_first, count = sequence(call.cu_seqlens_q, call.seqused_q, batch_idx, call.seqlen_q)
    return SimpleNamespace(
        batch_idx=batch_idx, head=head, start=start, count=count, q_first=q_first, row=Int64(tile) * ROWS
    )


class QueryRows:
    """What the kernels of ROWS query rows a block have alike."""

    threads, smem = THREADS, 0

    def __init__(self, variant: Variant):
        self.dtype = DTYPES[variant.dtype]

    @cute.jit
    def __call__(self, *parameters):
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(THREADS, 1, 1))

    def vector(self, pointer: cute.Pointer, offset: Int64) -> cute.Tensor:
        return cute.make_tensor(pointer + cute.assume(offset, divby=VECTOR), cute.make_layout(VECTOR))
