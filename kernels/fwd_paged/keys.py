"""Keys and values of a cache as the forward's main loop sees them: pages, and a split's share of them."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from kernels.fwd_paged.pages import GROUP, LOW, load_pages, read_table, rows_of
from kernels.trunk import mask
from kernels.trunk.interfaces import Multiplies
from kernels.trunk.scalars import aligned, element
from kernels.trunk.tile_coord import left_padding, tokens
from kernels.trunk.tiles import swizzle_columns, tile_copy
from kernels.trunk.turns import Rotating
from kernels.trunk.visits import visits
from registry.contract.variant import Variant


class PagedKeys:
    """Keys and values in pages (`kernels.trunk.interfaces.Keys`).

    With several stages, loads run whole blocks ahead: short queries leave nothing else to hide memory's latency behind.
    A block's pages are read one block before that.
    """

    from_notes = bounded_ahead = True
    carried = False

    def __init__(self, variant: Variant, products: Multiplies):
        self.tile_m, self.tile_n, self.threads = variant.size("m"), variant.size("n"), 32 * variant.size("w")
        stages = variant.size("s")
        self.ahead = max(stages - 1, 1)
        self.turns = Rotating(stages)
        self.dtype, self.packing, self.columns = products.dtype, products.packing, products.k_columns
        self.first_steps = 1 if stages == 1 and self.packing == 1 else 0
        self.panel = min(swizzle_columns(products.k_columns), swizzle_columns(products.v_columns))

    def work(self, call: SimpleNamespace, block: Int32) -> Int32:
        return block // call.num_splits

    @cute.jit
    def lengths(self, call: SimpleNamespace, batch_idx: Int32) -> tuple[Int32, Int32]:
        """As of a dense array, but with the padding: a key's place in its page is that in the whole row."""
        length = call.seqlen_k
        if call.seqused_k.toint() != 0:
            used = cutlass.min(element(call.seqused_k, batch_idx), call.seqlen_k)  # below 2**30, as is seqlen_k_new
            length = cutlass.min(cutlass.max(used + call.seqlen_k_new, 0), call.seqlen_k)
        return Int32(0), length

    @cute.jit
    def open(self, state: SimpleNamespace, rows: SimpleNamespace, batch_idx: Int32, head_kv: Int32) -> SimpleNamespace:
        call = state.call
        token_first, token_last = tokens(rows, self.tile_m)
        padding = left_padding(call.leftpad_k, batch_idx, rows.seqlen_k)
        first, inner_first, inner_end, end = mask.block_ranges(
            token_first, token_last, self.tile_n, rows.offset, rows.seqlen_k, call.window_left, call.window_right,
            padding,
        )  # fmt: skip
        blocks = visits(*self.share(call, first, inner_first, inner_end, end))
        state.copy = tile_copy(self.dtype, self.columns, self.threads, True, self.panel)
        rows_each = cute.size(rows_of(state.copy, state.sK[None, None, 0], state.tid).coordinates, mode=[1])
        state.numbers = cute.make_rmem_tensor(rows_each, Int32)
        state.numbers_next = cute.make_rmem_tensor(rows_each, Int32)
        rows.lowest = cutlass.max(token_first + rows.offset - call.window_left, padding)
        state.pages = self.pages(call, state, batch_idx, head_kv)
        return blocks

    @cute.jit
    def share(
        self, call: SimpleNamespace, first: Int32, inner_first: Int32, inner_end: Int32, end: Int32
    ) -> tuple[Int32, Int32, Int32, Int32]:
        """The part of the key blocks that is this split's, as `mask.block_ranges` has the whole.

        split · size is at most the number of blocks plus num_splits.
        """
        block, _, _ = cute.arch.block_idx()
        split = block % call.num_splits
        size = cute.ceil_div(end - first, call.num_splits)
        first = cutlass.min(first + split * size, end)
        end = cutlass.min(first + size, end)
        inner_first = cutlass.min(cutlass.max(inner_first, first), end)
        inner_end = cutlass.min(cutlass.max(inner_end, inner_first), end)
        return first, inner_first, inner_end, end

    def pages(self, call: SimpleNamespace, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32) -> SimpleNamespace:
        """What `pages` needs; everything of K and V in units of two bytes."""
        half = 1 if self.packing == 2 else 0
        rows = rows_of(state.copy, state.sK[None, None, 0], state.tid)

        def of(pointer: cute.Pointer, page_stride: Int64, row_stride: Int64, head_stride: Int64, columns: Int32):
            row_stride = Int64(Int32(row_stride >> half))  # the runtime refuses more: one multiplication then, not four
            return SimpleNamespace(
                start=aligned(pointer, head_kv * head_stride >> half), columns=columns >> half,
                page_stride=page_stride >> half, row_stride=row_stride,
                lane=rows.lane() * row_stride + rows.coordinates[0, 0, 0][1],
            )  # fmt: skip

        return SimpleNamespace(
            table=call.page_table, table_row=Int64(batch_idx) * call.page_table_stride, batch_idx=batch_idx,
            notes=state.notes, magic=call.page_magic, shift=call.page_shift, size=call.page_size,
            grouped=call.page_size % GROUP == 0,
            of_k=of(call.k, call.k_stride_b, call.k_stride_s, call.k_stride_h, call.head_dim),
            of_v=of(call.v, call.v_stride_b, call.v_stride_s, call.v_stride_h, call.head_dim_v),
        )  # fmt: skip

    def noted(self, rows: SimpleNamespace) -> tuple[Int32, ...]:
        """The keys that loads may read: `pages.LOW` and `pages.END`."""
        return rows.lowest, rows.seqlen_k

    @cute.jit
    def load_k(self, state: SimpleNamespace, n_block: Int32, stage: Int32, seqlen_k: Int32 | None):
        pages, start, sK = state.pages, n_block * self.tile_n, state.sK[None, None, stage]
        load_pages(pages, state.copy, state.numbers, start, state.tid, pages.of_k, sK, seqlen_k is not None)

    @cute.jit
    def load_v(self, state: SimpleNamespace, n_block: Int32, stage: Int32, seqlen_k: Int32 | None):
        pages, start, sV = state.pages, n_block * self.tile_n, state.sV[None, None, stage]
        load_pages(pages, state.copy, state.numbers, start, state.tid, pages.of_v, sV, seqlen_k is not None)

    @cute.jit
    def look_up(self, state: SimpleNamespace, n_block: Int32):
        read_table(state.pages, state.copy, state.sK[None, None, 0], n_block * self.tile_n, state.tid, state.numbers)

    @cute.jit
    def look_ahead(self, state: SimpleNamespace, n_block: Int32, left: Int32, blocks: int = 0):
        """Ask the table for the pages of a block whose loads start in the next turn, if more than `blocks` are left."""
        if left - blocks > 0:
            sK, start = state.sK[None, None, 0], n_block * self.tile_n
            read_table(state.pages, state.copy, sK, start, state.tid, state.numbers_next)

    def advance(self, state: SimpleNamespace):
        state.numbers.store(state.numbers_next.load())

    def to_start(self, blocks: SimpleNamespace) -> Int32:
        """The number of blocks, of what lives on through the loops anyway."""
        return blocks.edges + blocks.inner_end - blocks.inner_first

    def left_at_edge(self, i: Int32, count: Int32) -> Int32:
        """How many blocks there are from this one on."""
        return count - i

    def left_inside(self, n_block: Int32, inner_first: Int32) -> Int32:
        return n_block - inner_first + 1

    def more(self, left: Int32, blocks: int) -> cutlass.Boolean:
        return left > blocks

    def first_key(self, state: SimpleNamespace) -> Int32:
        """That of the tile's first row: windows of the others begin no earlier."""
        return state.notes[LOW]
