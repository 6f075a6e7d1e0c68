"""Which keys a block of the backward works on, which of their query tiles comes when, and where its notes are."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from kernels.trunk.tile_coord import batch_idx_of, first_tile, left_padding, schedule, sequence
from kernels.trunk.workspaces import packed_row, tile_start
from registry.ops.workspaces import ROWS

# What a block notes down in shared memory, in this order, so that no register holds it through the loop. pending: the
# semaphore of the query tile at which its turn has not ended yet (`kernels.bwd.accumulate`), or -1.
NOTED = (
    *("start", "count", "batch_idx", "head", "split", "head_q", "heads", "q_first", "k_first", "seqlen_q", "offset"),
    *("number", "row", "first", "inner_first", "inner_end", "pending"),
)


def recall(state: SimpleNamespace) -> SimpleNamespace:
    """The keys as `tile_coord` found them; what is not used is not read."""
    return SimpleNamespace(**{name: state.notes[i] for i, name in enumerate(NOTED)})


@cute.jit
def tile_coord(call: SimpleNamespace, block: Int32, tile_n: cutlass.Constexpr) -> SimpleNamespace:
    """The tile of keys: its first key and the entry's number of them, heads, first tokens and lengths, its number
    among the tiles of all entries, and the entry's first row in the workspaces.

    Left padding is no keys: the entry's tiles, and all that counts them, begin behind it.
    32 bits suffice: heads are at most heads_q; heads · batch, of dense keys, and tiles are at most as many as blocks;
    tokens are below 2**30 and rows of the workspaces below 2**31 (`registry.ops.attention`).
    """
    heads = call.heads_kv * call.splits
    tiles = cute.ceil_div(call.seqlen_k, tile_n)
    pairs = heads * call.batch
    if call.cu_seqlens_k.toint() != 0:
        tiles = call.seqlen_k // tile_n + call.batch
        pairs = heads
    tile, pair = schedule(block, tiles, pairs)
    tile = tiles - 1 - tile  # the first keys have the most queries under a causal mask
    batch_idx = pair // heads
    head = pair - batch_idx * heads
    number = batch_idx * tiles + tile
    if call.cu_seqlens_k.toint() != 0:
        batch_idx = batch_idx_of(tile, call.cu_seqlens_k, call.batch, call.seqlen_k, Int32(1), tile_n)
        number = tile
        first = first_tile(call.cu_seqlens_k, batch_idx, call.seqlen_k, Int32(1), tile_n)
        # If the array is not sorted, an entry's first tile may have no block: then none may wait for it.
        complete = batch_idx_of(first, call.cu_seqlens_k, call.batch, call.seqlen_k, Int32(1), tile_n) == batch_idx
        tile = tile - first if complete else Int32(-1)
    start = tile_start(tile, call.seqlen_k, tile_n)
    q_first, seqlen_q = sequence(call.cu_seqlens_q, call.seqused_q, batch_idx, call.seqlen_q)
    k_first, seqlen_k = sequence(call.cu_seqlens_k, call.seqused_k, batch_idx, call.seqlen_k)
    padding = left_padding(call.leftpad_k, batch_idx, seqlen_k)
    k_first, seqlen_k = k_first + padding, seqlen_k - padding
    row = batch_idx * cute.ceil_div(call.seqlen_q, ROWS) * ROWS
    if call.cu_seqlens_q.toint() != 0:
        row = packed_row(q_first, batch_idx)
    head_kv = head // call.splits
    per_split = call.heads_q // heads
    return SimpleNamespace(
        start=start, count=seqlen_k, batch_idx=batch_idx, head=head_kv, split=head - head_kv * call.splits,
        head_q=head * per_split, heads=per_split, q_first=q_first, k_first=k_first, seqlen_q=seqlen_q,
        offset=seqlen_k - seqlen_q, number=number, row=row, pending=Int32(-1),
    )  # fmt: skip


@cute.jit
def following(state: SimpleNamespace, m_tile: Int32, head: Int32) -> tuple[Int32, Int32]:
    """The query tile and head that come next; a tile below the first if there are no more.

    From the last tile to the first, each for all heads: blocks that run side by side then stay together, whatever their
    number of tiles, and share queries and dq_accum in L2.
    """
    head = head + 1
    if head == recall(state).heads:
        m_tile, head = m_tile - 1, Int32(0)
    return m_tile, head


def workspace_row(state: SimpleNamespace, m_tile: Int32, head: Int32, tile_m: int) -> Int64:
    """The first row of a query tile in the workspaces."""
    keys = recall(state)
    return Int64(keys.head_q + head) * state.call.rows + (keys.row + m_tile * tile_m)
