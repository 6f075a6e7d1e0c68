"""Attention forward for SM120-class chips: cp.async, ldmatrix, mma.sync.

One block computes one (query tile, tile head, batch entry). Scores never leave registers. Key blocks that need a mask
come first, then the interior ones in a loop of its own without any mask code; softmax does not mind the order.

What ops differ in are three parts of it, of `kernels.trunk.interfaces`: where keys are, what is multiplied, and how the
output is written.
"""

from types import SimpleNamespace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.trunk import score_mods, softmax
from kernels.trunk.interfaces import Keys, Multiplies, Output
from kernels.trunk.mma import rows_columns, tiled_mma
from kernels.trunk.scalars import DTYPES, aligned, fast_div, named, note, reread_tid
from kernels.trunk.tile_coord import batch_idx_of, first_tile, schedule, sequence
from kernels.trunk.tiles import load_rows, smem_layout, tile_copy
from kernels.trunk.visits import visit
from registry.contract.abi import Abi
from registry.contract.variant import Variant

SEQLEN_K = 3  # where seqlen_k is among the notes
NOTED = 7  # of every forward; behind them are those of its keys


@cute.jit
def recall(state: SimpleNamespace) -> SimpleNamespace:
    """The tile's rows as `Forward.tile_coord` found them."""
    call, notes = state.call, state.notes
    return SimpleNamespace(
        start=notes[6], count=notes[0], head=notes[1], q_first=notes[2], seqlen_k=notes[SEQLEN_K], offset=notes[4],
        batch_idx=notes[5], pack=call.pack, magic=call.pack_magic, shift=call.pack_shift,
    )  # fmt: skip


class Scores:
    """Where the scores of a key block lie, the one that begins at n_start (`score_mods.apply`)."""

    def __init__(self, forward: "Forward", state: SimpleNamespace, n_start: Int32):
        self.forward, self.state, self.n_start = forward, state, n_start

    def rows(self) -> SimpleNamespace:
        return recall(self.state)

    def coordinates(self) -> cute.Tensor:
        return self.forward.coordinates(self.state, self.forward.tile_n)

    def first_key(self) -> Int32 | None:
        """The first column with a key; None if all before the last have one."""
        key = self.forward.keys.first_key(self.state)
        return None if key is None else key - self.n_start


class Forward:
    """The forward kernel of one variant: its tile, its shared memory and its device code."""

    def __init__(self, variant: Variant, abi: Abi, smem: int, notes: int, keys: Keys, products: Multiplies,
                 output: Output):  # fmt: skip
        self.abi, self.smem, self.notes = abi, smem, notes
        self.keys, self.products, self.output = keys, products, output
        self.dtype = DTYPES[variant.dtype]
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.size("m"), variant.size("n")
        self.warps, self.stages, self.q_steps = variant.size("w"), variant.size("s"), variant.size("q")
        self.threads = 32 * self.warps

    @cute.jit
    def __call__(self, *parameters):
        """The host side, for its launch facts alone: nobody calls it, the runtime launches the cubin."""
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1), smem=self.smem)

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, self.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        rows, batch_idx = self.tile_coord(call, self.keys.work(call, block))
        if (rows.start >= 0) & (rows.start < rows.count):  # an entry of a packed array may have more tiles than rows
            self.tile(call, rows, batch_idx, tid)

    @cute.jit
    def tile_coord(self, call: SimpleNamespace, work: Int32) -> tuple[SimpleNamespace, Int32]:
        """(the tile's rows, its batch entry): start and count of packed rows, first query head, lengths and offsets.

        heads · batch · tiles, or heads · tiles of a packed array, is the grid's number of blocks, below 2**31. There
        are at most 2**31 − 2**10 rows, so that those of a tile behind the last have numbers, too. Where cu_seqlens is
        not sorted a tile's first row may wrap around, to another row of the entry.
        """
        heads = fast_div(call.heads_q, call.pack_magic, call.pack_shift)
        tiles = cute.ceil_div(call.seqlen_q * call.pack, self.tile_m)
        pairs = heads * call.batch
        if call.cu_seqlens_q.toint() != 0:
            tiles = call.seqlen_q * call.pack // self.tile_m + call.batch
            pairs = heads
        tile, pair = schedule(work, tiles, pairs)
        batch_idx = pair // heads
        head = pair - batch_idx * heads
        if call.cu_seqlens_q.toint() != 0:
            total, pack = call.seqlen_q, call.pack
            batch_idx = batch_idx_of(tile, call.cu_seqlens_q, call.batch, total, pack, self.tile_m)
            tile = tile - first_tile(call.cu_seqlens_q, batch_idx, total, pack, self.tile_m)
        q_first, seqlen_q = sequence(call.cu_seqlens_q, call.seqused_q, batch_idx, call.seqlen_q)
        k_first, seqlen_k = self.keys.lengths(call, batch_idx)
        rows = SimpleNamespace(
            start=tile * self.tile_m, count=seqlen_q * call.pack, head=head * call.pack,
            pack=call.pack, magic=call.pack_magic, shift=call.pack_shift,
            q_first=q_first, k_first=k_first, seqlen_k=seqlen_k, offset=seqlen_k - seqlen_q,
        )  # fmt: skip
        return rows, batch_idx

    @cute.jit
    def tile(self, call: SimpleNamespace, rows: SimpleNamespace, batch_idx: Int32, tid: Int32):
        """One query tile: Q, every key block that it sees, and the output."""
        head_kv = rows.head // (call.heads_q // call.heads_kv)  # head · heads_kv would pass 2**31 from 46,341 on
        state, q_start = self.state(call, tid), Int64(0)
        if cutlass.const_expr(not self.keys.from_notes):
            q_start = self.q_start(call, rows, batch_idx)
        blocks = self.keys.open(state, rows, batch_idx, head_kv)
        note(state.notes, tid, rows.count, rows.head, rows.q_first, rows.seqlen_k, rows.offset, batch_idx, rows.start,
             *self.keys.noted(rows))  # fmt: skip
        if cutlass.const_expr(self.keys.from_notes):
            cute.arch.barrier()
            q_start = self.q_start(call, rows, batch_idx)
        rows.token_stride, rows.head_stride = call.q_stride_s, call.q_stride_h
        load_rows(state.copy_q, aligned(call.q, q_start), rows, call.head_dim, state.sQ, tid)
        if cutlass.const_expr(self.keys.from_notes):
            cute.arch.cp_async_commit_group()
        self.start_loads(state, rows.seqlen_k, blocks)
        if cutlass.const_expr(self.q_steps > 0):
            cute.arch.cp_async_wait_group(max(self.stages - 1, 1) if self.keys.from_notes else 0)
            cute.arch.barrier()
        elif cutlass.const_expr(not self.keys.from_notes):  # noqa: SIM102
            if blocks.count == 0:
                cute.arch.barrier()  # the notes are read next; else behind a barrier of `one_block`
        self.products.load_queries(state, batch_idx, head_kv)
        self.loops(state, blocks)
        self.output.write(self, state, head_kv)

    def q_start(self, call: SimpleNamespace, rows: SimpleNamespace, batch_idx: Int32) -> Int64:
        """Where the tile head's first token begins in q."""
        return batch_idx * call.q_stride_b + rows.q_first * call.q_stride_s + rows.head * call.q_stride_h

    @cute.jit
    def loops(self, state: SimpleNamespace, blocks: SimpleNamespace):
        """Every key block: the edges with a mask, then the interior without."""
        turn = Int32(0)
        for i in cutlass.range(0, blocks.edges, 1, unroll=1):
            n_block = visit(blocks, i)
            n_next = visit(blocks, i + self.keys.ahead)
            n_then = visit(blocks, i + self.keys.ahead + 1)
            stage, left = self.keys.turns.at_edge(turn, i), self.keys.left_at_edge(i, blocks.count)
            self.one_block(state, stage, n_block, n_next, n_then, left, masked=True)
            turn = self.keys.turns.next(turn)
        turn = self.keys.turns.inside(turn, blocks.edges)
        # In a counted loop the compiler carries the loads' addresses from block to block, else it computes them anew.
        if cutlass.const_expr(self.keys.carried):
            for i in cutlass.range(blocks.inner_end - blocks.inner_first):
                n_block = blocks.inner_end - 1 - i
                stage = self.keys.turns.stage(blocks.edges + i)
                left = self.keys.left_inside(n_block, blocks.inner_first)
                self.one_block(state, stage, n_block, n_block - 1, n_block - 2, left, masked=False)
        else:
            at = blocks.inner_end - 1
            while at >= blocks.inner_first:
                stage, n_next = self.keys.turns.stage(turn), at - self.keys.ahead
                left = self.keys.left_inside(at, blocks.inner_first)
                self.one_block(state, stage, at, n_next, n_next - 1, left, masked=False)
                turn, at = self.keys.turns.next(turn), at - 1

    @cute.jit
    def start_loads(self, state: SimpleNamespace, seqlen_k: Int32, blocks: SimpleNamespace):
        """The loads before the first turn; each block's are a group, empty ones too, since waits count groups.

        With s stages blocks 0 … s − 2 start, with one the keys of block 0 alone.
        """
        count = self.keys.to_start(blocks)
        for i in cutlass.range_constexpr(max(self.stages - 1, 1)):
            if i < count:
                n_block = visit(blocks, i)
                self.keys.look_up(state, n_block)
                self.keys.load_k(state, n_block, i, seqlen_k)
                if cutlass.const_expr(self.stages > 1):
                    self.keys.load_v(state, n_block, i, seqlen_k)
            cute.arch.cp_async_commit_group()
        self.keys.look_ahead(state, visit(blocks, self.keys.ahead), count - self.keys.ahead)

    def state(self, call: SimpleNamespace, tid: Int32) -> SimpleNamespace:
        """What a block keeps through its loops: tiles in shared memory, accumulators, softmax statistics, copies.

        A Q that stays in registers begins where the last stage of V does.
        """
        products = self.products
        memory = cute.arch.get_dyn_smem(products.dtype, alignment=1024)
        sK = self.staged(memory, products.k_columns)
        memory += self.stages * self.tile_n * products.k_columns
        sV = self.staged(memory, products.v_columns)
        memory += (self.stages - (1 if self.q_steps else 0)) * self.tile_n * products.v_columns
        sQ = cute.make_tensor(cute.recast_ptr(memory, dtype=self.dtype), smem_layout(self.tile_m, self.head_dim))
        sO = self.output.tile(self, memory)
        end = cute.arch.get_dyn_smem(Int32, alignment=1024) + (self.smem - self.notes) // 4
        mma = tiled_mma(products.dtype, self.warps)
        acc_O = cute.make_rmem_tensor(mma.get_slice(tid).partition_shape_C((self.tile_m, self.head_dim_v)), Float32)
        acc_O.fill(0.0)
        rows = cute.size(rows_columns(acc_O), mode=[0])
        row_max, row_sum = cute.make_rmem_tensor(rows, Float32), cute.make_rmem_tensor(rows, Float32)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        return SimpleNamespace(
            call=call, tid=tid, sQ=sQ, sK=sK, sV=sV, sO=sO, mma=mma,
            notes=cute.make_tensor(end, cute.make_layout(self.notes // 4)),
            acc_O=acc_O, row_max=row_max, row_sum=row_sum,
            copy_q=tile_copy(self.dtype, self.head_dim, self.threads, True),
        )  # fmt: skip

    def staged(self, memory: cute.Pointer, columns: int) -> cute.Tensor:
        """(tile_n, columns, stages): one key or value tile a stage."""
        layout = smem_layout(self.tile_n, columns, self.keys.panel)
        outer = cute.append(layout.outer, cute.make_layout(self.stages, stride=self.tile_n * columns))
        return cute.make_tensor(memory, cute.make_composed_layout(layout.inner, 0, outer))

    @cute.jit
    def one_block(
        self, state: SimpleNamespace, stage: Int32, n_block: Int32, n_next: Int32, n_then: Int32, left: Any,
        masked: cutlass.Constexpr,
    ):  # fmt: skip
        """Add key block n_block, which lies in `stage`, to the output.

        n_next: the block whose loads start, in the stage that the last turn has used up; n_then: the one after it.
        left: what `Keys.more` needs.
        """
        first_steps, steps, ahead = self.keys.first_steps, self.head_dim // 16, self.keys.ahead
        acc_S = cute.make_rmem_tensor(
            state.mma.get_slice(state.tid).partition_shape_C((self.tile_m, self.tile_n)), Float32
        )
        acc_S.fill(0.0)
        cute.arch.cp_async_wait_group(max(self.stages - 2, 0))
        cute.arch.barrier()
        stage = stage if self.stages > 1 else 0
        sV = state.sV[None, None, stage]
        self.products.keys(state, acc_S, state.sK[None, None, stage], range(first_steps))
        if cutlass.const_expr(self.stages > 1):
            self.keys.advance(state)
            seqlen_k = self.bound(state, masked and self.keys.bounded_ahead)
            if self.keys.more(left, ahead):
                free = self.keys.turns.free(stage)
                self.keys.load_k(state, n_next, free, seqlen_k)
                self.keys.load_v(state, n_next, free, seqlen_k)
            cute.arch.cp_async_commit_group()
            self.keys.look_ahead(state, n_then, left, ahead + 1)
            self.products.keys(state, acc_S, state.sK[None, None, stage], range(first_steps, steps))
        else:
            # V arrives while S is computed, the next K during softmax and P·V.
            self.keys.load_v(state, n_block, 0, self.bound(state, masked))
            cute.arch.cp_async_commit_group()
            self.products.keys(state, acc_S, state.sK[None, None, stage], range(first_steps, steps))
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
            self.keys.advance(state)
            if self.keys.more(left, 1):
                self.keys.load_k(state, n_next, 0, self.bound(state, masked and self.keys.bounded_ahead))
            cute.arch.cp_async_commit_group()
            self.keys.look_ahead(state, n_then, left, 2)
        score_mods.apply(state.call, acc_S, Scores(self, state, n_block * self.tile_n), masked)
        softmax.update(acc_S, state.acc_O, state.row_max, state.row_sum, state.call.scale_log2, masked)
        if cutlass.const_expr(first_steps == 0):  # loads came first: V's address is as late as it was measured
            sV = state.sV[None, None, stage]
        self.products.values(state, acc_S, sV)

    def bound(self, state: SimpleNamespace, bounded: bool) -> Int32 | None:
        """Where the keys of a load end; None where all its rows have one."""
        return state.notes[SEQLEN_K] if bounded else None

    def coordinates(self, state: SimpleNamespace, columns: int) -> cute.Tensor:
        """(row, column) of each element of an accumulator of `columns`; they cost no registers between two uses."""
        identity = cute.make_identity_tensor((self.tile_m, columns))
        return state.mma.get_slice(reread_tid()).partition_C(identity)
