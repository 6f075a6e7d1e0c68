"""Where a block works: which query tile of which head and batch entry, and how long that entry's sequences are.

A tile's rows are packed rows: row r of a tile head is query head r % pack of token r // pack. Without packing they are
tokens. `cu_seqlens` and `seqused` are data that nobody has checked: what they say is clamped to the array.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from kernels.trunk.mma import rows_columns
from kernels.trunk.scalars import element, fast_div

SECTION = 64  # tile heads whose query tiles run side by side; docs/tuning.md


@cute.jit
def schedule(block: Int32, tiles: Int32, heads: Int32) -> tuple[Int32, Int32]:
    """(tile, head) of a block: heads in sections of SECTION and within one from the last tile to the first.

    Under a causal mask the longest tiles of a section start first and the short ones fill the tail, while the keys and
    values of its heads stay in L2. heads: tile heads, of all batch entries where each has its own tiles.
    """
    # tiles · heads is the grid's number of blocks, below 2**31; tiles · SECTION may be more.
    done = block // tiles // SECTION * SECTION
    width = cutlass.min(SECTION, heads - done)
    within = block - done * tiles
    return tiles - 1 - within // width, done + within % width


@cute.jit
def token_head(rows: SimpleNamespace, row: Int32) -> tuple[Int32, Int32]:
    """(token, query head within the tile head) of a packed row. rows: with pack, magic and shift of the ABI."""
    token = fast_div(row, rows.magic, rows.shift)
    return token, row - token * rows.pack


@cute.jit
def tokens(rows: SimpleNamespace, tile_m: cutlass.Constexpr) -> tuple[Int32, Int32]:
    """The first and the last token of a tile of packed rows."""
    first, _ = token_head(rows, rows.start)
    last, _ = token_head(rows, cutlass.min(rows.start + tile_m, rows.count) - 1)
    return first, last


def row_of(tXcX: cute.Tensor, r: int) -> Int32:
    """The tile's row that is this thread's r-th. tXcX: a partition of the tile's coordinates like an accumulator."""
    return rows_columns(tXcX)[r, 0][0]


@cute.jit
def sequence(cu_seqlens: cute.Pointer, seqused: cute.Pointer, batch_idx: Int32, seqlen: Int32) -> tuple[Int32, Int32]:
    """(first token, length) of a batch entry. seqlen: tokens of each entry or, with cu_seqlens, of the whole array."""
    first = Int32(0)
    length = seqlen
    if cu_seqlens.toint() != 0:
        end = cutlass.min(cutlass.max(element(cu_seqlens, batch_idx + 1), 0), seqlen)
        first = cutlass.min(cutlass.max(element(cu_seqlens, batch_idx), 0), end)
        length = end - first
    if seqused.toint() != 0:
        length = cutlass.min(cutlass.max(element(seqused, batch_idx), 0), length)
    return first, length


@cute.jit
def left_padding(leftpad: cute.Pointer, batch_idx: Int32, length: Int32) -> Int32:
    """How many of an entry's first tokens do not exist: at most `length`, those up to its end; 0 without `leftpad`."""
    padding = Int32(0)
    if leftpad.toint() != 0:
        padding = cutlass.min(cutlass.max(element(leftpad, batch_idx), 0), length)
    return padding


@cute.jit
def first_tile(
    cu_seqlens: cute.Pointer, batch_idx: Int32, total: Int32, pack: Int32, tile_m: cutlass.Constexpr
) -> Int32:
    """The number of an entry's first tile among those of all entries of a packed array (`registry.contract.Grid`).

    first · pack ≤ total · pack < 2**31 (`registry.ops.attention`); the number is at most that of all tiles in the grid.
    """
    first = cutlass.min(cutlass.max(element(cu_seqlens, batch_idx), 0), total)
    return first * pack // tile_m + batch_idx


@cute.jit
def batch_idx_of(
    tile: Int32, cu_seqlens: cute.Pointer, batch: Int32, total: Int32, pack: Int32, tile_m: cutlass.Constexpr
) -> Int32:
    """The batch entry that a tile of a packed array belongs to: the last whose first tile is not behind it.

    Each lane probes an entry, so that 32 entries cost one load and 1,024 two. All lanes of a warp must call it.
    """
    low, width = Int32(0), batch
    while width > 1:
        stride = (width - 1) // 32 + 1
        ahead = cute.arch.lane_idx() * stride  # at most width + 30 and 31 · 2**26; low + width is at most batch
        begun = cutlass.Boolean(False)
        if ahead < width:
            begun = first_tile(cu_seqlens, low + ahead, total, pack, tile_m) <= tile
        passed = cutlass.max(cute.arch.popc(cute.arch.vote_ballot_sync(begun)), 1) - 1
        width = cutlass.min(stride, width - passed * stride)
        low = low + passed * stride
    return low
