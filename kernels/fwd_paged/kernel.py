"""Attention over a cache of pages, with split-KV: the forward of serving.

What `flash_fwd` computes, but for three things. Keys and values are found through a page table, row by row. The key
blocks of a query tile may be shared out among `num_splits` blocks, whose partial outputs `fwd_combine` adds up. With
several stages, loads run whole blocks ahead: short queries leave nothing else to hide memory's latency behind.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.fwd_paged.pages import GROUP, LOW, load_pages, read_table, rows_of
from kernels.fwd_paged.smem import NOTES, smem
from kernels.trunk import fp8, mask, softmax
from kernels.trunk.compile import compiled
from kernels.trunk.forward import FIRST, FlashForward, recall, row_of
from kernels.trunk.generated import Generated
from kernels.trunk.mma import as_a_operand, gemm_rs, gemm_ss, load_a, rows_columns, tiled_mma
from kernels.trunk.scalars import DTYPES, aligned, element, named, note
from kernels.trunk.tile_coord import left_padding, token_head
from kernels.trunk.tiles import load_rows, smem_layout, store_rows, swizzle_columns, tile_copy
from registry.contract.variant import Variant
from registry.ops.attention import E4M3
from registry.ops.fwd_paged import FWD_PAGED


class PagedForward(FlashForward):
    """The paged forward of one variant. K and V tiles are kept in units of two bytes: an e4m3 row is half as long."""

    def __init__(self, variant: Variant):
        self.smem = smem(variant)
        self.dtype = DTYPES[variant.dtype]
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.size("m"), variant.size("n")
        self.warps, self.stages = variant.size("w"), variant.size("s")
        self.threads = 32 * self.warps
        self.ahead = max(self.stages - 1, 1)  # turns between the start of a block's loads and its own
        self.q_steps = variant.size("q")
        self.e4m3 = E4M3 in variant.features
        self.product = cutlass.Float16 if self.e4m3 else self.dtype  # what the tensor cores multiply
        self.packing = 2 if self.e4m3 else 1  # elements of K and V in two bytes
        self.k_columns, self.v_columns = self.head_dim // self.packing, self.head_dim_v // self.packing
        self.panel = min(swizzle_columns(self.k_columns), swizzle_columns(self.v_columns))

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, FWD_PAGED.abi)
        call.cu_seqlens_k = None
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        rows, entry = self.place(call, block // call.num_splits)
        if (rows.start >= 0) & (rows.start < rows.count):
            self.tile(call, rows, entry, tid)

    @cute.jit
    def keys(self, call: SimpleNamespace, entry: Int32) -> tuple[Int32, Int32]:
        """As of a dense array, but with the padding: a key's place in its page is that in the whole row."""
        length = call.seqlen_k
        if call.seqused_k.toint() != 0:
            used = cutlass.min(element(call.seqused_k, entry), call.seqlen_k)  # below 2**30, as is seqlen_k_new
            length = cutlass.min(cutlass.max(used + call.seqlen_k_new, 0), call.seqlen_k)
        return Int32(0), length

    @cute.jit
    def tile(self, call: SimpleNamespace, rows: SimpleNamespace, entry: Int32, tid: Int32):
        """One query tile and one split of the keys that it sees."""
        head_kv = self.head_of_keys(call, rows)
        token_first, _ = token_head(rows, rows.start)
        token_last, _ = token_head(rows, self.last_row(rows))
        padding = left_padding(call.leftpad_k, entry, rows.seqlen_k)
        first, inner_first, inner_end, end = mask.block_ranges(
            token_first, token_last, self.tile_n, rows.offset, rows.seqlen_k, call.window_left, call.window_right,
            padding,
        )  # fmt: skip
        first, inner_first, inner_end, end = self.share(call, first, inner_first, inner_end, end)
        count = end - first
        edges = count - (inner_end - inner_first)

        state = self.state(tid)
        state.call = call
        lowest = cutlass.max(token_first + rows.offset - call.window_left, padding)
        state.pages = self.pages(call, state, entry, head_kv)
        note(state.notes, tid, rows.count, rows.head, rows.q_first, rows.seqlen_k, rows.offset, entry, rows.start,
             lowest, rows.seqlen_k)  # fmt: skip
        cute.arch.barrier()
        rows.token_stride, rows.head_stride = call.q_stride_s, call.q_stride_h
        q_start = entry * call.q_stride_b + rows.q_first * call.q_stride_s + rows.head * call.q_stride_h
        load_rows(state.copy_q, aligned(call.q, q_start), rows, call.head_dim, state.sQ, tid)
        cute.arch.cp_async_commit_group()
        self.start_loads(state, edges, inner_first, inner_end, end)
        if cutlass.const_expr(self.q_steps > 0):
            cute.arch.cp_async_wait_group(max(self.stages - 1, 1))
            cute.arch.barrier()
        if cutlass.const_expr(self.e4m3):
            state.rQ, factor = fp8.load_a(state.mma, tid, state.sQ, self.q_steps)
            self.descale_scores(call, entry, head_kv, factor)
        else:
            state.rQ = load_a(state.mma, tid, state.sQ, self.dtype, self.q_steps)
        turn = Int32(0)
        for i in cutlass.range(0, edges, 1, unroll=1):
            n_block = self.visit(i, edges, inner_first, inner_end, end)
            n_next = self.visit(i + self.ahead, edges, inner_first, inner_end, end)
            n_then = self.visit(i + self.ahead + 1, edges, inner_first, inner_end, end)
            self.one_turn(state, turn, n_block, n_next, n_then, count - i, masked=True)
            turn = self.next_stage(turn)
        at = inner_end - 1
        while at >= inner_first:
            n_next = at - self.ahead
            self.one_turn(state, turn, at, n_next, n_next - 1, at - inner_first + 1, masked=False)
            turn, at = self.next_stage(turn), at - 1
        self.finish_tile(state, head_kv)

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

    @cute.jit
    def descale_scores(self, call: SimpleNamespace, entry: Int32, head_kv: Int32, factor: Float32):
        """k_descale and what Q was divided by become part of the factor that scores meet first."""
        if call.k_descale.toint() != 0:
            factor = factor * element(call.k_descale, Int64(entry) * call.k_descale_stride_b + head_kv)
        capped = call.softcap_scale != 0.0
        call.softcap_scale = call.softcap_scale * factor
        call.scale_log2 = call.scale_log2 if capped else call.scale_log2 * factor

    def pages(self, call: SimpleNamespace, state: SimpleNamespace, entry: Int32, head_kv: Int32) -> SimpleNamespace:
        """What `kernels.pages` needs; everything of K and V in units of two bytes."""
        half = 1 if self.e4m3 else 0
        rows = rows_of(state.copy, state.sK[None, None, 0], state.tid)

        def of(pointer: cute.Pointer, page_stride: Int64, row_stride: Int64, head_stride: Int64, columns: Int32):
            row_stride = Int64(Int32(row_stride >> half))  # the runtime refuses more: one multiplication then, not four
            return SimpleNamespace(
                start=aligned(pointer, head_kv * head_stride >> half), columns=columns >> half,
                page_stride=page_stride >> half, row_stride=row_stride,
                lane=rows.lane() * row_stride + rows.coordinates[0, 0, 0][1],
            )  # fmt: skip

        return SimpleNamespace(
            table=call.page_table, table_row=Int64(entry) * call.page_table_stride, entry=entry, notes=state.notes,
            magic=call.page_magic, shift=call.page_shift, size=call.page_size, grouped=call.page_size % GROUP == 0,
            of_k=of(call.k, call.k_stride_b, call.k_stride_s, call.k_stride_h, call.head_dim),
            of_v=of(call.v, call.v_stride_b, call.v_stride_s, call.v_stride_h, call.head_dim_v),
        )  # fmt: skip

    @cute.jit
    def start_loads(self, state: SimpleNamespace, edges: Int32, inner_first: Int32, inner_end: Int32, end: Int32):
        """The loads before the first turn; each block's are a group, empty ones too, since waits count groups.

        With s stages blocks 0 … s − 2 start, with one the keys of block 0 alone.
        """
        count = edges + inner_end - inner_first
        for i in cutlass.range_constexpr(max(self.stages - 1, 1)):
            if i < count:
                n_block = self.visit(i, edges, inner_first, inner_end, end)
                self.find_pages(state, n_block, state.numbers)
                self.load_k(state, n_block, i, bounded=True)
                if cutlass.const_expr(self.stages > 1):
                    self.load_v(state, n_block, i, bounded=True)
            cute.arch.cp_async_commit_group()
        self.look_ahead(state, self.visit(self.ahead, edges, inner_first, inner_end, end), count - self.ahead)

    def state(self, tid: Int32) -> SimpleNamespace:
        """What a block keeps through its loops. With all of Q in registers, Q passes through the last stage."""
        memory = cute.arch.get_dyn_smem(self.product, alignment=1024)
        sK = self.staged(memory, self.k_columns)
        memory += self.stages * self.tile_n * self.k_columns
        sV = self.staged(memory, self.v_columns)
        memory += (self.stages - (1 if self.q_steps else 0)) * self.tile_n * self.v_columns
        sQ = cute.make_tensor(cute.recast_ptr(memory, dtype=self.dtype), smem_layout(self.tile_m, self.head_dim))
        start = cute.arch.get_dyn_smem(self.dtype, alignment=1024)
        sO = cute.make_tensor(start, smem_layout(self.tile_m, self.head_dim_v))
        end = cute.arch.get_dyn_smem(Int32, alignment=1024) + (self.smem - NOTES) // 4
        mma = tiled_mma(self.product, self.warps)
        acc_O = cute.make_rmem_tensor(mma.get_slice(tid).partition_shape_C((self.tile_m, self.head_dim_v)), Float32)
        acc_O.fill(0.0)
        rows = cute.size(rows_columns(acc_O), mode=[0])
        row_max, row_sum = cute.make_rmem_tensor(rows, Float32), cute.make_rmem_tensor(rows, Float32)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        copy = tile_copy(self.product, self.k_columns, self.threads, True, self.panel)
        steps = cute.size(rows_of(copy, sK[None, None, 0], tid).coordinates, mode=[1])
        return SimpleNamespace(
            tid=tid, sQ=sQ, sO=sO, sK=sK, sV=sV, mma=mma,
            notes=cute.make_tensor(end, cute.make_layout(NOTES // 4)),
            acc_O=acc_O, row_max=row_max, row_sum=row_sum, copy=copy,
            copy_q=tile_copy(self.dtype, self.head_dim, self.threads, True),
            numbers=cute.make_rmem_tensor(steps, Int32),
            numbers_next=cute.make_rmem_tensor(steps, Int32),
        )  # fmt: skip

    def staged(self, memory: cute.Pointer, columns: int) -> cute.Tensor:
        layout = smem_layout(self.tile_n, columns, self.panel)
        outer = cute.append(layout.outer, cute.make_layout(self.stages, stride=self.tile_n * columns))
        return cute.make_tensor(memory, cute.make_composed_layout(layout.inner, 0, outer))

    def first_key(self, state: SimpleNamespace, n_start: Int32) -> Int32 | None:
        return state.notes[LOW] - n_start  # that of the tile's first row: windows of the others begin no earlier

    @cute.jit
    def next_stage(self, turn: Int32) -> Int32:
        return turn + 1 if turn + 1 < self.stages else Int32(0)

    @cute.jit
    def load_k(self, state: SimpleNamespace, n_block: Int32, stage: Int32, bounded: cutlass.Constexpr):
        pages, start, sK = state.pages, n_block * self.tile_n, state.sK[None, None, stage]
        load_pages(pages, state.copy, state.numbers, start, state.tid, pages.of_k, sK, bounded)

    @cute.jit
    def load_v(self, state: SimpleNamespace, n_block: Int32, stage: Int32, bounded: cutlass.Constexpr):
        pages, start, sV = state.pages, n_block * self.tile_n, state.sV[None, None, stage]
        load_pages(pages, state.copy, state.numbers, start, state.tid, pages.of_v, sV, bounded)

    @cute.jit
    def look_ahead(self, state: SimpleNamespace, n_block: Int32, left: Int32):
        """Ask the table for the pages of a block whose loads start in the next turn. left: blocks from that one on."""
        if left > 0:
            self.find_pages(state, n_block, state.numbers_next)

    @cute.jit
    def find_pages(self, state: SimpleNamespace, n_block: Int32, numbers: cute.Tensor):
        sK = state.sK[None, None, 0]
        read_table(state.pages, state.copy, sK, n_block * self.tile_n, state.tid, numbers)

    @cute.jit
    def one_turn(
        self, state: SimpleNamespace, stage: Int32, n_block: Int32, n_next: Int32, n_then: Int32, left: Int32,
        masked: cutlass.Constexpr,
    ):  # fmt: skip
        """Add key block n_block, which lies in `stage`, to the output.

        n_next: the block whose loads start, in the stage that the last turn has used up; n_then: the one after it.
        left: blocks from n_block on.
        """
        acc_S = cute.make_rmem_tensor(
            state.mma.get_slice(state.tid).partition_shape_C((self.tile_m, self.tile_n)), Float32
        )
        acc_S.fill(0.0)
        cute.arch.cp_async_wait_group(max(self.stages - 2, 0))
        cute.arch.barrier()
        if cutlass.const_expr(self.stages > 1):
            state.numbers.store(state.numbers_next.load())
            if left > self.ahead:
                free = stage - 1 if stage > 0 else Int32(self.stages - 1)
                # Of an interior block the next is one too: all its rows have keys.
                self.load_k(state, n_next, free, masked)
                self.load_v(state, n_next, free, masked)
            cute.arch.cp_async_commit_group()
            self.look_ahead(state, n_then, left - self.ahead - 1)
            self.multiply_keys(state, acc_S, state.sK[None, None, stage], range(self.head_dim // 16))
        else:
            # V arrives while S is computed, the next K during softmax and P·V.
            first = 0 if self.e4m3 else FIRST
            self.multiply_keys(state, acc_S, state.sK[None, None, 0], range(first))
            self.load_v(state, n_block, 0, masked)
            cute.arch.cp_async_commit_group()
            self.multiply_keys(state, acc_S, state.sK[None, None, 0], range(first, self.head_dim // 16))
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
            state.numbers.store(state.numbers_next.load())
            if left > 1:
                self.load_k(state, n_next, 0, masked)
            cute.arch.cp_async_commit_group()
            self.look_ahead(state, n_then, left - 2)
        self.modify(state, acc_S, n_block * self.tile_n, masked)
        softmax.update(acc_S, state.acc_O, state.row_max, state.row_sum, state.call.scale_log2, masked)
        self.multiply_values(state, acc_S, state.sV[None, None, stage if self.stages > 1 else 0])

    @cute.jit
    def multiply_keys(self, state: SimpleNamespace, acc_S: cute.Tensor, sK: cute.Tensor, steps: cutlass.Constexpr):
        if cutlass.const_expr(not self.e4m3):
            gemm_ss(state.mma, state.tid, acc_S, state.rQ, state.sQ, sK, self.dtype, steps, self.q_steps)
        elif cutlass.const_expr(len(steps) > 0):
            fp8.gemm_ss(state.mma, state.tid, acc_S, state.rQ, sK)

    @cute.jit
    def multiply_values(self, state: SimpleNamespace, acc_S: cute.Tensor, sV: cute.Tensor):
        rP = cute.make_fragment_like(acc_S, self.product)
        rP.store(acc_S.load().to(self.product))
        if cutlass.const_expr(self.e4m3):
            fp8.gemm_rs(state.mma, state.tid, state.acc_O, as_a_operand(rP), sV)
        else:
            gemm_rs(state.mma, state.tid, state.acc_O, as_a_operand(rP), sV, self.dtype)

    @cute.jit
    def finish_tile(self, state: SimpleNamespace, head_kv: Int32):
        """Normalise and write: the output, or a split's part of it for `fwd_combine`."""
        call, rows = state.call, recall(state)
        entry = rows.entry
        place = self.coordinates(state, self.head_dim_v)
        block, _, _ = cute.arch.block_idx()
        split = block % call.num_splits
        sinks = self.sinks(call, rows, place)
        for r in cutlass.range_constexpr(cute.size(sinks)):
            sinks[r] = sinks[r] if split == 0 else -Float32.inf  # it counts once
        softmax.finish(state.acc_O, state.row_max, state.row_sum, call.scale_log2, sinks)
        if cutlass.const_expr(self.e4m3):
            self.descale_output(state, entry, head_kv)
        if (call.lse.toint() != 0) & (place[0][1] == 0):
            start = entry * call.lse_stride_b + rows.head * call.lse_stride_h + split * call.lse_stride_split
            self.write_lse(state, rows, place, call.lse + (start + rows.q_first))
        start = entry * call.o_stride_b + rows.q_first * call.o_stride_s + rows.head * call.o_stride_h
        if call.num_splits > 1:
            self.write_partial(state, rows, place, call.o, start + split * call.o_stride_split)
        else:
            self.write_output(state, rows, place, start)

    @cute.jit
    def descale_output(self, state: SimpleNamespace, entry: Int32, head_kv: Int32):
        call = state.call
        if call.v_descale.toint() != 0:
            descale = element(call.v_descale, Int64(entry) * call.v_descale_stride_b + head_kv)
            state.acc_O.store(state.acc_O.load() * descale)

    @cute.jit
    def write_partial(
        self, state: SimpleNamespace, rows: SimpleNamespace, place: cute.Tensor, o: cute.Pointer, start: Int64
    ):
        """Write fp32 to o, `start` elements on, straight from the registers."""
        call = state.call
        partial = cute.recast_ptr(o, dtype=Float32)
        values = rows_columns(state.acc_O)
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            token, head = token_head(rows, rows.start + row_of(place, r))
            if row_of(place, r) < rows.count - rows.start:
                offset = start + Int64(token) * call.o_stride_s + Int64(head) * call.o_stride_h
                for c in cutlass.range_constexpr(0, cute.size(values, mode=[1])):
                    column = self.column(place, c)
                    if column < call.head_dim_v:
                        cute.make_tensor(partial + (offset + column), cute.make_layout(1))[0] = values[r, c]

    def column(self, place: cute.Tensor, c: int) -> Int32:
        """The output's column that is this thread's c-th."""
        standard = rows_columns(place)[0, c][1]
        return fp8.column(rows_columns(place)[0, 0][1], c) if self.e4m3 else standard

    @cute.jit
    def write_output(self, state: SimpleNamespace, rows: SimpleNamespace, place: cute.Tensor, start: Int64):
        """Convert O and store it through the shared memory that held K."""
        call = state.call
        rO = cute.make_fragment_like(state.acc_O, self.dtype)
        rO.store(state.acc_O.load().to(self.dtype))
        if cutlass.const_expr(self.q_steps == 0):
            # Q's loads may still be in flight where no key block was visited.
            cute.arch.cp_async_wait_group(max(self.stages - 1, 1))
        if cutlass.const_expr(self.stages > 1 or self.head_dim_v * self.tile_m > self.k_columns * self.tile_n):
            cute.arch.barrier()  # other warps may still read what lay there; of one stage's K they do not
        if cutlass.const_expr(self.e4m3):
            values = rows_columns(rO)
            for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
                    state.sO[row_of(place, r), self.column(place, c)] = values[r, c]
        else:
            to_smem = cute.make_tiled_copy_C(
                cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=32), state.mma
            ).get_slice(state.tid)
            cute.copy(to_smem, to_smem.retile(rO), to_smem.partition_D(state.sO))
        cute.arch.barrier()
        rows.token_stride, rows.head_stride = call.o_stride_s, call.o_stride_h
        copy = tile_copy(self.dtype, self.head_dim_v, self.threads, False)
        store_rows(copy, state.sO, aligned(call.o, start), rows, call.head_dim_v, state.tid)


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = PagedForward(variant)
    elements = {"k": kernel.product, "v": kernel.product}
    return compiled(kernel, FWD_PAGED, variant, dump_dir, tile=kernel.tile_m, elements=elements)
