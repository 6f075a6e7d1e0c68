"""Attention forward for SM120-class chips: cp.async, ldmatrix, mma.sync.

One block computes one (query tile, tile head, batch entry). Scores never leave registers. Key blocks that need a mask
come first, then the interior ones in a loop of its own without any mask code; softmax does not mind the order.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.trunk import mask, score_mods, softmax
from kernels.trunk.mma import as_a_operand, gemm_rs, gemm_ss, load_a, rows_columns, tiled_mma
from kernels.trunk.scalars import DTYPES, LOG2E, aligned, element, fast_div, named, note, reread_tid
from kernels.trunk.tile_coord import batch_idx_of, first_tile, left_padding, schedule, sequence, token_head
from kernels.trunk.tiles import load_rows, load_tile, matrix_of, smem_layout, store_rows, thread_view, tile_copy
from registry.contract.abi import Abi
from registry.contract.variant import Variant

FIRST = 1  # steps of Q·Kᵀ before a block's loads: their addresses are computed while the tensor cores work


SEQLEN_K = 3  # the place of seqlen_k among the notes


@cute.jit
def recall(state: SimpleNamespace) -> SimpleNamespace:
    """The tile's rows as `FlashForward.place` found them."""
    call, notes = state.call, state.notes
    return SimpleNamespace(
        start=notes[6], count=notes[0], head=notes[1], q_first=notes[2], seqlen_k=notes[SEQLEN_K], offset=notes[4],
        entry=notes[5], pack=call.pack, magic=call.pack_magic, shift=call.pack_shift,
    )  # fmt: skip


def row_of(tXcX: cute.Tensor, r: int) -> Int32:
    """The tile's row that is this thread's r-th. tXcX: a partition of the tile's coordinates like an accumulator."""
    return rows_columns(tXcX)[r, 0][0]


class FlashForward:
    """The forward kernel of one variant: its tile, its shared memory and its device code."""

    def __init__(self, variant: Variant, abi: Abi, smem: int, notes: int):
        self.abi, self.smem, self.notes = abi, smem, notes
        self.dtype = DTYPES[variant.dtype]
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.size("m"), variant.size("n")
        self.warps, self.stages = variant.size("w"), variant.size("s")
        self.threads = 32 * self.warps
        self.q_steps, self.carried = variant.size("q"), variant.size("a") == 1

    @cute.jit
    def __call__(self, *parameters):
        """The host side, for its launch facts alone: nobody calls it, the runtime launches the cubin."""
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1), smem=self.smem)

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, self.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        rows, entry = self.place(call, block)
        if (rows.start >= 0) & (rows.start < rows.count):  # an entry of a packed array may have more tiles than rows
            self.tile(call, rows, entry, tid)

    @cute.jit
    def place(self, call: SimpleNamespace, block: Int32) -> tuple[SimpleNamespace, Int32]:
        """(the tile's rows, its batch entry): start and count of packed rows, first query head, lengths and offsets.

        heads · batch · tiles, or heads · tiles of a packed array, is the grid's number of blocks, below 2**31; a tile's
        first row is one of seqlen_q · pack, below 2**31 too. Where cu_seqlens is not sorted it may wrap around to
        another row of the entry.
        """
        heads = fast_div(call.heads_q, call.pack_magic, call.pack_shift)
        tiles = cute.ceil_div(call.seqlen_q * call.pack, self.tile_m)
        pairs = heads * call.batch
        if call.cu_seqlens_q.toint() != 0:
            tiles = call.seqlen_q * call.pack // self.tile_m + call.batch
            pairs = heads
        tile, pair = schedule(block, tiles, pairs)
        entry = pair // heads
        head = pair - entry * heads
        if call.cu_seqlens_q.toint() != 0:
            total, pack = call.seqlen_q, call.pack
            entry = batch_idx_of(tile, call.cu_seqlens_q, call.batch, total, pack, self.tile_m)
            tile = tile - first_tile(call.cu_seqlens_q, entry, total, pack, self.tile_m)
        q_first, seqlen_q = sequence(call.cu_seqlens_q, call.seqused_q, entry, call.seqlen_q)
        k_first, seqlen_k = self.keys(call, entry)
        rows = SimpleNamespace(
            start=tile * self.tile_m, count=seqlen_q * call.pack, head=head * call.pack,
            pack=call.pack, magic=call.pack_magic, shift=call.pack_shift,
            q_first=q_first, k_first=k_first, seqlen_k=seqlen_k, offset=seqlen_k - seqlen_q,
        )  # fmt: skip
        return rows, entry

    @cute.jit
    def keys(self, call: SimpleNamespace, entry: Int32) -> tuple[Int32, Int32]:
        """(first token, length) of an entry's keys, those of its left padding left out."""
        first, length = sequence(call.cu_seqlens_k, call.seqused_k, entry, call.seqlen_k)
        padding = left_padding(call.leftpad_k, entry, length)
        return first + padding, length - padding

    @cute.jit
    def head_of_keys(self, call: SimpleNamespace, rows: SimpleNamespace) -> Int32:
        """The key/value head of the tile's query heads. head · heads_kv would pass 2**31 from 46,341 heads on."""
        return rows.head // (call.heads_q // call.heads_kv)

    @cute.jit
    def last_row(self, rows: SimpleNamespace) -> Int32:
        """The tile's last row that exists; start + tile_m may pass 2**31."""
        return rows.start + cutlass.min(rows.count - rows.start, self.tile_m) - 1

    @cute.jit
    def tile(self, call: SimpleNamespace, rows: SimpleNamespace, entry: Int32, tid: Int32):
        """One query tile: Q, every key block that it sees, and the output."""
        head_kv = self.head_of_keys(call, rows)
        q_start = entry * call.q_stride_b + rows.q_first * call.q_stride_s + rows.head * call.q_stride_h
        k_start = entry * call.k_stride_b + rows.k_first * call.k_stride_s + head_kv * call.k_stride_h
        v_start = entry * call.v_stride_b + rows.k_first * call.v_stride_s + head_kv * call.v_stride_h
        mK = matrix_of(call.k, rows.seqlen_k, self.head_dim, call.k_stride_s, k_start)
        mV = matrix_of(call.v, rows.seqlen_k, self.head_dim_v, call.v_stride_s, v_start)

        state = self.state(tid)
        state.call = call
        state.tKgK = thread_view(state.copy_qk, mK, self.tile_n, tid)
        state.tVgV = thread_view(state.copy_v, mV, self.tile_n, tid)
        token_first, _ = token_head(rows, rows.start)
        token_last, _ = token_head(rows, self.last_row(rows))
        first, inner_first, inner_end, end = mask.block_ranges(
            token_first, token_last, self.tile_n, rows.offset, rows.seqlen_k, call.window_left, call.window_right
        )
        count = end - first
        edges = count - (inner_end - inner_first)

        note(state.notes, tid, rows.count, rows.head, rows.q_first, rows.seqlen_k, rows.offset, entry, rows.start)
        rows.token_stride, rows.head_stride = call.q_stride_s, call.q_stride_h
        load_rows(state.copy_qk, aligned(call.q, q_start), rows, call.head_dim, state.sQ, tid)
        if count > 0:
            n_block = self.visit(0, edges, inner_first, inner_end, end)
            rows_left = rows.seqlen_k - n_block * self.tile_n
            self.load_k(state, n_block, 0, rows_left)
            if cutlass.const_expr(self.stages > 1):
                self.load_v(state, n_block, 0, rows_left)
        cute.arch.cp_async_commit_group()
        if cutlass.const_expr(self.q_steps > 0):
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
        elif count == 0:
            cute.arch.barrier()  # the notes are read next; else behind a barrier of `one_block`
        state.rQ = load_a(state.mma, tid, state.sQ, self.dtype, self.q_steps)
        # Only the last key block may reach past seqlen_k, and it comes first: the loads ahead need no bound.
        for i in cutlass.range(0, edges, 1, unroll=1):
            n_block = self.visit(i, edges, inner_first, inner_end, end)
            n_next = self.visit(i + 1, edges, inner_first, inner_end, end)
            self.one_block(state, i % 2, n_block, n_next, i + 1 < count, masked=True)
        # In a counted loop the compiler carries the loads' addresses from block to block, else it computes them anew.
        if cutlass.const_expr(self.carried):
            for i in cutlass.range(inner_end - inner_first):
                n_block = inner_end - 1 - i
                self.one_block(state, (edges + i) % 2, n_block, n_block - 1, n_block > inner_first, masked=False)
        else:
            turn, at = edges, inner_end - 1
            while at >= inner_first:
                self.one_block(state, turn % 2, at, at - 1, at > inner_first, masked=False)
                turn, at = turn + 1, at - 1
        self.epilogue(state)

    def state(self, tid: Int32) -> SimpleNamespace:
        """What a block keeps through its loops: tiles in shared memory, accumulators, softmax statistics, copies."""
        memory = cute.arch.get_dyn_smem(self.dtype, alignment=1024)
        sK = self.staged(memory, self.head_dim)
        memory += self.stages * self.tile_n * self.head_dim
        sV = self.staged(memory, self.head_dim_v)
        if cutlass.const_expr(self.q_steps == 0):
            memory += self.stages * self.tile_n * self.head_dim_v
        sQ = cute.make_tensor(memory, smem_layout(self.tile_m, self.head_dim))
        sO = cute.make_tensor(memory, smem_layout(self.tile_m, self.head_dim_v))
        end = cute.arch.get_dyn_smem(Int32, alignment=1024) + (self.smem - self.notes) // 4
        mma = tiled_mma(self.dtype, self.warps)
        acc_O = cute.make_rmem_tensor(mma.get_slice(tid).partition_shape_C((self.tile_m, self.head_dim_v)), Float32)
        acc_O.fill(0.0)
        rows = cute.size(rows_columns(acc_O), mode=[0])
        row_max, row_sum = cute.make_rmem_tensor(rows, Float32), cute.make_rmem_tensor(rows, Float32)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        return SimpleNamespace(
            tid=tid, sQ=sQ, sO=sO, sK=sK, sV=sV, mma=mma,
            notes=cute.make_tensor(end, cute.make_layout(self.notes // 4)),
            acc_O=acc_O, row_max=row_max, row_sum=row_sum,
            copy_qk=tile_copy(self.dtype, self.head_dim, self.threads, True),
            copy_v=tile_copy(self.dtype, self.head_dim_v, self.threads, True),
        )  # fmt: skip

    def staged(self, memory: cute.Pointer, columns: int) -> cute.Tensor:
        """(tile_n, columns, stages): one key or value tile a stage."""
        layout = smem_layout(self.tile_n, columns)
        outer = cute.append(layout.outer, cute.make_layout(self.stages, stride=self.tile_n * columns))
        return cute.make_tensor(memory, cute.make_composed_layout(layout.inner, 0, outer))

    @cute.jit
    def visit(self, i: Int32, edges: Int32, inner_first: Int32, inner_end: Int32, end: Int32) -> Int32:
        """The i-th key block to visit: the edges, right and left, then the interior, each downwards."""
        n_block = end - 1 - i
        if i >= edges:
            n_block = inner_end - 1 - (i - edges)
        elif n_block < inner_end:
            n_block -= inner_end - inner_first
        return n_block

    @cute.jit
    def one_block(
        self, state: SimpleNamespace, turn: Int32, n_block: Int32, n_next: Int32, more: cutlass.Boolean,
        masked: cutlass.Constexpr,
    ):  # fmt: skip
        """Add key block n_block to the output and, if there are more, start the loads of n_next, the one after it.

        turn: the stage of n_block, if there are two.
        """
        acc_S = cute.make_rmem_tensor(
            state.mma.get_slice(state.tid).partition_shape_C((self.tile_m, self.tile_n)), Float32
        )
        acc_S.fill(0.0)
        tid = state.tid
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        stage = 0
        if cutlass.const_expr(self.stages > 1):
            stage = turn
        sK, sV = state.sK[None, None, stage], state.sV[None, None, stage]
        steps = self.head_dim // 16
        gemm_ss(state.mma, tid, acc_S, state.rQ, state.sQ, sK, self.dtype, range(FIRST), self.q_steps)
        if cutlass.const_expr(self.stages == 1):
            # V arrives while S is computed, the next K during softmax and P·V.
            rows_left = state.notes[SEQLEN_K] - n_block * self.tile_n if masked else None
            self.load_v(state, n_block, 0, rows_left)
        else:
            if more:
                self.load_k(state, n_next, 1 - stage)
                self.load_v(state, n_next, 1 - stage)
        cute.arch.cp_async_commit_group()
        gemm_ss(state.mma, tid, acc_S, state.rQ, state.sQ, sK, self.dtype, range(FIRST, steps), self.q_steps)
        if cutlass.const_expr(self.stages == 1):
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
            if more:
                self.load_k(state, n_next, 0)
            cute.arch.cp_async_commit_group()
        self.modify(state, acc_S, n_block * self.tile_n, masked)
        scale_log2 = state.call.scale_log2
        softmax.update(acc_S, state.acc_O, state.row_max, state.row_sum, scale_log2, masked)
        rP = cute.make_fragment_like(acc_S, self.dtype)
        rP.store(acc_S.load().to(self.dtype))
        gemm_rs(state.mma, tid, state.acc_O, as_a_operand(rP), sV, self.dtype)

    @cute.jit
    def load_k(self, state: SimpleNamespace, n_block: Int32, stage: Int32, rows_left: Int32 | None = None):
        sK, offset = state.sK[None, None, stage], Int64(n_block * self.tile_n) * state.call.k_stride_s
        load_tile(state.copy_qk, state.tKgK, sK, state.call.head_dim, offset, state.tid, rows_left)

    @cute.jit
    def load_v(self, state: SimpleNamespace, n_block: Int32, stage: Int32, rows_left: Int32 | None = None):
        sV, offset = state.sV[None, None, stage], Int64(n_block * self.tile_n) * state.call.v_stride_s
        load_tile(state.copy_v, state.tVgV, sV, state.call.head_dim_v, offset, state.tid, rows_left)

    @cute.jit
    def modify(self, state: SimpleNamespace, acc_S: cute.Tensor, n_start: Int32, masked: cutlass.Constexpr):
        """Apply softcap, ALiBi and the mask to the scores of the key block that begins at n_start."""
        call = state.call
        if call.softcap_scale != 0.0:
            score_mods.cap(acc_S, call.softcap_scale)
        if call.alibi_slopes.toint() != 0:
            self.add_alibi(state, acc_S, n_start)
        if cutlass.const_expr(masked):
            rows = recall(state)
            tScS = self.coordinates(state, self.tile_n)
            keys_left = rows.seqlen_k - n_start
            diagonals = self.diagonals(rows, tScS, n_start)
            first_key = self.first_key(state, n_start)
            mask.apply(acc_S, tScS, diagonals, keys_left, call.window_left, call.window_right, first_key)

    def first_key(self, state: SimpleNamespace, n_start: Int32) -> Int32 | None:
        """The first column with a key, relative to n_start; None: left padding is no part of the keys."""
        return None

    @cute.jit
    def add_alibi(self, state: SimpleNamespace, acc_S: cute.Tensor, n_start: Int32):
        call, rows = state.call, recall(state)
        tScS = self.coordinates(state, self.tile_n)
        # The ABI bounds the sum to 31 bits; with 64 here, the tile of 128 x 32 would spill in its loops.
        start = call.alibi_slopes + (rows.entry * call.alibi_stride_b + rows.head)
        slopes = cute.make_rmem_tensor(cute.size(state.row_max), Float32)
        for r in cutlass.range_constexpr(cute.size(slopes)):
            _, head = token_head(rows, rows.start + row_of(tScS, r))
            slopes[r] = element(start, head) * (LOG2E / call.scale_log2)
        score_mods.add_distance(acc_S, tScS, slopes, self.diagonals(rows, tScS, n_start))

    def coordinates(self, state: SimpleNamespace, columns: int) -> cute.Tensor:
        """(row, column) of each element of an accumulator of `columns`; they cost no registers between two uses."""
        identity = cute.make_identity_tensor((self.tile_m, columns))
        return state.mma.get_slice(reread_tid()).partition_C(identity)

    @cute.jit
    def diagonals(self, rows: SimpleNamespace, tScS: cute.Tensor, n_start: Int32) -> cute.Tensor:
        """The column of each row's diagonal, relative to n_start."""
        columns = cute.make_rmem_tensor(cute.size(rows_columns(tScS), mode=[0]), Int32)
        for r in cutlass.range_constexpr(cute.size(columns)):
            token, _ = token_head(rows, rows.start + row_of(tScS, r))
            columns[r] = token + rows.offset - n_start
        return columns

    @cute.jit
    def epilogue(self, state: SimpleNamespace):
        """Normalise, write the LSE where it is wanted, and store O through the shared memory that held Q."""
        call, rows = state.call, recall(state)
        entry = rows.entry
        place = self.coordinates(state, self.head_dim_v)
        sinks = self.sinks(call, rows, place)
        softmax.finish(state.acc_O, state.row_max, state.row_sum, call.scale_log2, sinks)
        if (call.lse.toint() != 0) & (place[0][1] == 0):
            lse = call.lse + (entry * call.lse_stride_b + rows.head * call.lse_stride_h + rows.q_first)
            self.write_lse(state, rows, place, lse)
        rO = cute.make_fragment_like(state.acc_O, self.dtype)
        rO.store(state.acc_O.load().to(self.dtype))
        if cutlass.const_expr(self.q_steps == 0):
            cute.arch.cp_async_wait_group(0)  # Q's loads may still be in flight where no key block was visited
        cute.arch.barrier()  # other warps may still read what lay there
        to_smem = cute.make_tiled_copy_C(
            cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=32), state.mma
        ).get_slice(state.tid)
        cute.copy(to_smem, to_smem.retile(rO), to_smem.partition_D(state.sO))
        cute.arch.barrier()
        rows.token_stride, rows.head_stride = call.o_stride_s, call.o_stride_h
        o_start = entry * call.o_stride_b + rows.q_first * call.o_stride_s + rows.head * call.o_stride_h
        copy = tile_copy(self.dtype, self.head_dim_v, self.threads, False)
        store_rows(copy, state.sO, aligned(call.o, o_start), rows, call.head_dim_v, state.tid)

    @cute.jit
    def write_lse(self, state: SimpleNamespace, rows: SimpleNamespace, place: cute.Tensor, lse: cute.Pointer):
        """Write what softmax.finish left in row_sum. lse: where the tile head's first token has its own."""
        for r in cutlass.range_constexpr(cute.size(state.row_sum)):
            token, head = token_head(rows, rows.start + row_of(place, r))
            if row_of(place, r) < rows.count - rows.start:
                there = lse + (head * state.call.lse_stride_h + token)
                cute.make_tensor(there, cute.make_layout(1))[0] = state.row_sum[r]

    @cute.jit
    def sinks(self, call: SimpleNamespace, rows: SimpleNamespace, place: cute.Tensor) -> cute.Tensor:
        """The sink of each row's head in log2; −inf without one."""
        sinks = cute.make_rmem_tensor(cute.size(rows_columns(place), mode=[0]), Float32)
        sinks.fill(-Float32.inf)
        if call.sink.toint() != 0:
            for r in cutlass.range_constexpr(cute.size(sinks)):
                row = cutlass.min(row_of(place, r), rows.count - rows.start - 1)
                _, head = token_head(rows, rows.start + row)
                if call.sink_low != 0:
                    low = cute.recast_ptr(call.sink, dtype=self.dtype)
                    sinks[r] = Float32(element(low, rows.head + head)) * LOG2E
                else:
                    sinks[r] = element(call.sink, rows.head + head) * LOG2E
        return sinks
