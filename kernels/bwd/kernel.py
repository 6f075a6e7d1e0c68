"""Attention backward for SM120-class chips: cp.async, ldmatrix, mma.sync, red.v4.

One block computes dK and dV of one tile of keys (of a key/value head and batch entry), and adds what the tile gives to
dQ. It goes over the query tiles that see the keys, for all query heads of the key/value head, so that dK and dV leave
registers only when they are whole (FlashAttention 2's order, Dao 2023). Scores are computed transposed, keys along the
rows: P and dS are then operands of dV += Pᵀ·dO and dK += dSᵀ·Q as they lie in registers, and only dS goes through
shared memory, for dQ. Where warps stand side by side (`x`), because head_dim is large, P does too.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.bwd import accumulate, grads
from kernels.bwd.keys import NOTED, following, recall, tile_coord, workspace_row
from kernels.bwd.outputs import Outputs
from kernels.bwd.smem import NOTES, dq_warps, smem, v_lent
from kernels.trunk import mask, score_mods
from kernels.trunk.compile import compiled
from kernels.trunk.generated import Generated
from kernels.trunk.mma import as_a_operand, gemm_rs, gemm_ss, gemm_st, load_a, rows_columns, tiled_mma
from kernels.trunk.scalars import DTYPES, element, named, note, reread_tid
from kernels.trunk.tiles import load_tile, matrix_of, smem_layout, thread_view, tile_copy
from kernels.trunk.workspaces import STRIP
from registry.contract.variant import Variant
from registry.ops.bwd import BWD


@dataclass(frozen=True)
class Scores:
    """Where the scores of a chunk lie: see `score_mods.differentiate`."""

    state: SimpleNamespace
    head: Int32
    coordinates: cute.Tensor
    diagonal: Int32
    keys_left: Int32

    def slope(self) -> Float32:
        """The head's, in raw scores a token."""
        call, keys = self.state.call, recall(self.state)
        # The ABI bounds the sum to 31 bits; with 64 here, the loop would have up to 40 instructions more.
        slope = element(call.alibi_slopes, keys.batch_idx * call.alibi_stride_b + keys.head_q + self.head)
        return slope * call.slope_scale


class FlashBackward(Outputs):
    """The backward kernel of one variant: its tile, its shared memory and its device code."""

    def __init__(self, variant: Variant):
        self.smem = smem(variant)
        self.dtype = DTYPES[variant.dtype]
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.size("m"), variant.size("n")
        self.warps, self.across = variant.size("w"), max(variant.size("x"), 1)
        self.q_stages, self.do_stages = variant.size("s"), max(variant.size("o"), 1)
        self.chunk, self.v_steps = self.tile_m // max(variant.size("c"), 1), variant.size("r")
        self.v_lent = v_lent(variant)
        self.threads = 32 * self.warps
        # Where warps stand side by side they share rows of P and dS, which then reach them through shared memory.
        self.through_smem = self.across > 1
        self.reread, self.undivided = variant.size("t") == 1, variant.size("u") == 1
        self.dq_warps = dq_warps(variant) or (0, 0)

    @cute.jit
    def __call__(self, *parameters):
        """The host side, for its launch facts alone: nobody calls it, the runtime launches the cubin."""
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1), smem=self.smem)

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, BWD.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        keys = tile_coord(call, block, self.tile_n)
        # An entry may have more tiles than keys. No start is below 0: the compiler, told so, computes fewer addresses.
        if (keys.start >= 0) & (keys.start < keys.count):
            self.tile(call, keys, tid)

    @cute.jit
    def tile(self, call: SimpleNamespace, keys: SimpleNamespace, tid: Int32):
        """One tile of keys: K, V, every query tile that sees it, and dK, dV."""
        state = self.state(call, tid)
        key_last = cutlass.min(keys.start + self.tile_n, keys.count) - 1
        keys.first, keys.inner_first, keys.inner_end, end = mask.query_ranges(
            keys.start, key_last, self.tile_m, keys.offset, keys.seqlen_q, call.window_left, call.window_right
        )
        if keys.start + self.tile_n > keys.count:  # zeros in place of keys are no keys: their scores are not -inf
            keys.inner_end = keys.first
        note(state.notes, tid, *(getattr(keys, name) for name in NOTED))
        self.load_keys(state, keys)
        cute.arch.barrier()  # the notes are read next
        m_tile, head, turn = end - 1, Int32(0), Int32(0)
        if m_tile >= keys.first:
            self.load_q(state, m_tile, head, 0)
            self.load_do(state, m_tile, head, 0)
        cute.arch.cp_async_commit_group()
        while m_tile >= recall(state).first:
            self.one_tile(state, turn, m_tile, head)
            m_tile, head = following(state, m_tile, head)
            turn = 1 - turn
        cute.arch.cp_async_wait_group(0)
        self.end_turn(state)
        self.epilogue(state)

    @cute.jit
    def state(self, call: SimpleNamespace, tid: Int32) -> SimpleNamespace:
        """What a block keeps through its loop: tiles in shared memory, accumulators, copies."""
        m, n, dim, dim_v = self.tile_m, self.tile_n, self.head_dim, self.head_dim_v
        start = cute.arch.get_dyn_smem(self.dtype, alignment=1024)
        sK = cute.make_tensor(start, smem_layout(n, dim))
        memory = start + n * dim
        sQ = self.staged(memory, m, dim, self.q_stages)
        memory += self.q_stages * m * dim
        sdO = self.staged(memory, m, dim_v, self.do_stages)
        memory += self.do_stages * m * dim_v
        sdS = cute.make_tensor(memory, smem_layout(n, m))
        memory += n * m
        sP = cute.make_tensor(memory, smem_layout(n, m))
        if cutlass.const_expr(self.through_smem):
            memory += n * m
        sV = cute.make_tensor(memory - n * self.v_lent, smem_layout(n, dim_v))
        floats = cute.recast_ptr(start, dtype=Float32) + ((self.smem - NOTES) // 4 - self.stats - self.warps)
        mma = tiled_mma(self.dtype, self.warps // self.across, self.across)
        thread = mma.get_slice(tid)
        acc_dK = cute.make_rmem_tensor(thread.partition_shape_C((n, dim)), Float32)
        acc_dV = cute.make_rmem_tensor(thread.partition_shape_C((n, dim_v)), Float32)
        acc_dK.fill(0.0)
        acc_dV.fill(0.0)
        copy_q, copy_v = (tile_copy(self.dtype, columns, self.threads, True) for columns in (dim, dim_v))
        return SimpleNamespace(
            call=call, tid=tid, start=start, sK=sK, sV=sV, sQ=sQ, sdO=sdO, sdS=sdS, sP=sP,
            sLSE=cute.make_tensor(floats, cute.make_layout((m, self.q_stages), stride=(1, m))),
            sDelta=cute.make_tensor(floats + m * self.q_stages, cute.make_layout((m, self.do_stages), stride=(1, m))),
            sums=cute.make_tensor(floats + self.stats, cute.make_layout(self.warps)),
            notes=cute.make_tensor(
                cute.recast_ptr(floats + (self.stats + self.warps), dtype=Int32), cute.make_layout(len(NOTED))
            ),
            mma=mma, mma_dQ=tiled_mma(self.dtype, *self.dq_warps), acc_dK=acc_dK, acc_dV=acc_dV,
            copy_q=copy_q, copy_v=copy_v,
        )  # fmt: skip

    @property
    def stats(self) -> int:
        """Floats of LSE and delta in shared memory."""
        return self.tile_m * (self.q_stages + self.do_stages)

    def staged(self, memory: cute.Pointer, rows: int, columns: int, stages: int) -> cute.Tensor:
        """(rows, columns, stages)."""
        layout = smem_layout(rows, columns)
        outer = cute.append(layout.outer, cute.make_layout(stages, stride=rows * columns))
        return cute.make_tensor(memory, cute.make_composed_layout(layout.inner, 0, outer))

    @cute.jit
    def load_keys(self, state: SimpleNamespace, keys: SimpleNamespace):
        """K and V of the tile; V, where it stays in registers, by way of memory that is lent to others then."""
        call, tid = state.call, state.tid
        k_start = keys.batch_idx * call.k_stride_b + keys.k_first * call.k_stride_s + keys.head * call.k_stride_h
        v_start = keys.batch_idx * call.v_stride_b + keys.k_first * call.v_stride_s + keys.head * call.v_stride_h
        mK = matrix_of(call.k, keys.count, self.head_dim, call.k_stride_s, k_start)
        mV = matrix_of(call.v, keys.count, self.head_dim_v, call.v_stride_s, v_start)
        left = keys.count - keys.start
        tKgK = thread_view(state.copy_q, mK, self.tile_n, tid)
        load_tile(state.copy_q, tKgK, state.sK, call.head_dim, Int64(keys.start) * call.k_stride_s, tid, left)
        tVgV = thread_view(state.copy_v, mV, self.tile_n, tid)
        load_tile(state.copy_v, tVgV, state.sV, call.head_dim_v, Int64(keys.start) * call.v_stride_s, tid, left)
        if cutlass.const_expr(self.v_steps > 0):
            cute.arch.cp_async_commit_group()
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
        state.rV = load_a(state.mma, tid, state.sV, self.dtype, self.v_steps)

    @cute.jit
    def load_q(self, state: SimpleNamespace, m_tile: Int32, head: Int32, stage: Int32):
        call = state.call
        strides = call.q_stride_b, call.q_stride_s, call.q_stride_h
        sQ = state.sQ[None, None, stage]
        self.load_queries(state, call.q, strides, sQ, state.copy_q, call.head_dim, m_tile, head)
        self.load_stats(state, call.lse_log2, state.sLSE[None, stage], m_tile, head)

    @cute.jit
    def load_do(self, state: SimpleNamespace, m_tile: Int32, head: Int32, stage: Int32):
        call = state.call
        strides = call.dout_stride_b, call.dout_stride_s, call.dout_stride_h
        sdO = state.sdO[None, None, stage]
        self.load_queries(state, call.dout, strides, sdO, state.copy_v, call.head_dim_v, m_tile, head)
        self.load_stats(state, call.delta, state.sDelta[None, stage], m_tile, head)

    @cute.jit
    def load_queries(
        self, state: SimpleNamespace, pointer: cute.Pointer, strides: tuple, sX: cute.Tensor, copy: cute.TiledCopy,
        columns: Int32, m_tile: Int32, head: Int32,
    ):  # fmt: skip
        """Start the copy of a tile of rows of q or dout."""
        keys, tid, (stride_b, stride_s, stride_h) = recall(state), self.tid(state), strides
        first = m_tile * self.tile_m
        start = keys.batch_idx * stride_b + (keys.q_first + first) * stride_s + (keys.head_q + head) * stride_h
        left = keys.seqlen_q - first
        mX = matrix_of(pointer, left, cute.size(sX, mode=[1]), stride_s, start)
        load_tile(copy, thread_view(copy, mX, self.tile_m, tid), sX, columns, Int64(0), tid, left)

    @cute.jit
    def load_stats(
        self, state: SimpleNamespace, pointer: cute.Pointer, sX: cute.Tensor, m_tile: Int32, head: Int32
    ):  # fmt: skip
        """Start the copy of a row of the workspaces, 16 bytes a thread; they have all rows of a tile."""
        copy = cute.make_copy_atom(
            cute.nvgpu.cpasync.CopyG2SOp(cache_mode=cute.nvgpu.LoadCacheMode.GLOBAL), Float32, num_bits_per_copy=128
        )
        tid = reread_tid()
        if tid < self.tile_m // 4:
            first = workspace_row(state, m_tile, head, self.tile_m) + 4 * tid
            there = cute.make_tensor(pointer + cute.assume(first, divby=4), cute.make_layout(4))
            cute.copy(copy, there, cute.local_tile(sX, (4,), (tid,)))

    def tid(self, state: SimpleNamespace) -> Int32:
        """The thread's number. Read anew, nothing that depends on it is kept in registers from before."""
        return reread_tid() if self.reread else state.tid

    @cute.jit
    def load_following(
        self, state: SimpleNamespace, m_tile: Int32, head: Int32, q_stage: Int32 | int, do_stage: Int32 | int,
        ahead: cutlass.Constexpr,
    ):  # fmt: skip
        """Start the next loads of what has two stages (ahead), or one."""
        m_next, head_next = following(state, m_tile, head)
        if m_next >= recall(state).first:
            if cutlass.const_expr((self.q_stages > 1) == ahead):
                self.load_q(state, m_next, head_next, q_stage)
            if cutlass.const_expr((self.do_stages > 1) == ahead):
                self.load_do(state, m_next, head_next, do_stage)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def one_tile(self, state: SimpleNamespace, turn: Int32, m_tile: Int32, head: Int32):
        """Add what query tile m_tile of a head gives to dK, dV and dQ, and start the next one's loads.

        turn: the stage of what has two. Little is kept from one part to the next: registers are short.
        """
        call = state.call
        q_stage = turn if self.q_stages > 1 else 0
        do_stage = turn if self.do_stages > 1 else 0
        sQ, sdO = state.sQ[None, None, q_stage], state.sdO[None, None, do_stage]
        sLSE, sDelta = state.sLSE[None, q_stage], state.sDelta[None, do_stage]
        keys, tid = recall(state), self.tid(state)
        masked = (m_tile < keys.inner_first) | (m_tile >= keys.inner_end)
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        self.load_following(state, m_tile, head, 1 - q_stage, 1 - do_stage, True)
        tiles = SimpleNamespace(
            tid=tid, sQ=sQ, sdO=sdO, sLSE=sLSE, sDelta=sDelta, m_tile=m_tile, head=head, masked=masked
        )
        # Without a branch in it, the compiler overlaps one chunk's products with another's exponentials.
        if masked | (call.softcap_scale != 0.0) | (call.alibi_slopes.toint() != 0):
            self.chunks(state, tiles, True)
        else:
            self.chunks(state, tiles, False)
        if cutlass.const_expr(self.through_smem):
            cute.arch.barrier()
            gemm_st(state.mma, tid, state.acc_dV, state.sP, sdO, self.dtype, False)
            gemm_st(state.mma, tid, state.acc_dK, state.sdS, sQ, self.dtype, False)
        self.end_turn(state)
        self.load_following(state, m_tile, head, 0, 0, False)
        if call.dalibi.toint() != 0:
            self.add_dalibi(state, head)
        self.add_dq(state, m_tile, head)

    @cute.jit
    def chunks(self, state: SimpleNamespace, tiles: SimpleNamespace, special: cutlass.Constexpr):
        """Pᵀ and dSᵀ of a query tile, chunk by chunk of its columns, with the products that need no other warp.

        special: there may be a mask, softcap or ALiBi.
        """
        slope_sum = cute.make_rmem_tensor(1, Float32)
        slope_sum.fill(0.0)
        tiles.acc_S = None
        if cutlass.const_expr(self.undivided):
            tiles.acc_S = self.raw_scores(state, tiles, tiles.sQ)
        for h in cutlass.range_constexpr(self.tile_m // self.chunk):
            self.scores(state, tiles, h, slope_sum, special)
        if cutlass.const_expr(special):
            self.share(state, slope_sum[0])

    @cute.jit
    def share(self, state: SimpleNamespace, total: Float32):
        """Put the warp's sum where `add_dalibi` finds it."""
        for bit in cutlass.range_constexpr(5):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=1 << bit)
        state.sums[state.tid // 32] = total  # by all lanes alike: the DSL has trouble with an `if` at this depth

    @cute.jit
    def raw_scores(self, state: SimpleNamespace, tiles: SimpleNamespace, sQ: cute.Tensor) -> cute.Tensor:
        """K·Qᵀ."""
        tid, mma = tiles.tid, state.mma
        shape = mma.get_slice(tid).partition_shape_C((self.tile_n, cute.size(sQ, mode=[0])))
        acc_S = cute.make_rmem_tensor(shape, Float32)
        acc_S.fill(0.0)
        rK = load_a(mma, tid, state.sK, self.dtype, 0)
        gemm_ss(mma, tid, acc_S, rK, state.sK, sQ, self.dtype, range(self.head_dim // 16), 0)
        return acc_S

    @cute.jit
    def scores(
        self, state: SimpleNamespace, tiles: SimpleNamespace, h: cutlass.Constexpr, slope_sum: cute.Tensor,
        special: cutlass.Constexpr,
    ):  # fmt: skip
        tid, mma, n, m = tiles.tid, state.mma, self.tile_n, self.chunk
        shape = mma.get_slice(tid).partition_shape_C((n, m))
        acc_dP = cute.make_rmem_tensor(shape, Float32)
        acc_dP.fill(0.0)
        sQ, sdO = (cute.local_tile(s, (m, cute.size(s, mode=[1])), (h, 0)) for s in (tiles.sQ, tiles.sdO))
        if cutlass.const_expr(self.undivided):
            acc_S = cute.make_tensor(tiles.acc_S.iterator + h * cute.size(acc_dP), acc_dP.layout)
        else:
            acc_S = self.raw_scores(state, tiles, sQ)
        steps = self.head_dim_v // 16
        gemm_ss(mma, tid, acc_dP, state.rV, state.sV, sdO, self.dtype, range(steps), self.v_steps)
        lse, delta = (self.of_columns(state, tid, cute.local_tile(s, (m,), (h,))) for s in (tiles.sLSE, tiles.sDelta))
        grads.subtract(acc_dP, delta)
        if cutlass.const_expr(special):
            at = self.of_scores(state, tiles, h)
            score_mods.differentiate(state.call, acc_S, acc_dP, at, tiles.masked, lse, slope_sum)
        grads.weigh(acc_S, acc_dP, lse, state.call.scale_log2)
        rP, rdS = cute.make_fragment_like(acc_S, self.dtype), cute.make_fragment_like(acc_S, self.dtype)
        rP.store(acc_S.load().to(self.dtype))
        rdS.store(acc_dP.load().to(self.dtype))
        self.to_smem(state, tid, rdS, state.sdS, h)
        if cutlass.const_expr(self.through_smem):
            self.to_smem(state, tid, rP, state.sP, h)
        else:
            gemm_rs(mma, tid, state.acc_dV, as_a_operand(rP), sdO, self.dtype)
            gemm_rs(mma, tid, state.acc_dK, as_a_operand(rdS), sQ, self.dtype)

    def of_scores(self, state: SimpleNamespace, tiles: SimpleNamespace, h: int) -> Scores:
        """Where the scores of a chunk lie."""
        keys = recall(state)
        identity = cute.make_identity_tensor((self.tile_n, self.chunk))
        coordinates = state.mma.get_slice(reread_tid()).partition_C(identity)
        diagonal = tiles.m_tile * self.tile_m + h * self.chunk + keys.offset - keys.start
        return Scores(state, tiles.head, coordinates, diagonal, keys.count - keys.start)

    @cute.jit
    def add_dalibi(self, state: SimpleNamespace, head: Int32):
        """Add the warps' sums to the slope's gradient, of which this block alone has its own."""
        if state.tid == 0:
            keys = recall(state)
            there = state.call.dalibi + (Int64(keys.number) * state.call.heads_q + keys.head_q + head)
            total = cute.make_tensor(there, cute.make_layout(1))
            for warp in cutlass.range_constexpr(self.warps):
                total[0] = total[0] + state.sums[warp]

    def of_columns(self, state: SimpleNamespace, tid: Int32, sX: cute.Tensor) -> cute.Tensor:
        """The values of a vector along the columns that belong to this thread's columns of scores."""
        rows = cute.make_tensor(sX.iterator, cute.make_layout((self.tile_n, self.chunk), stride=(0, 1)))
        view = rows_columns(state.mma.get_slice(tid).partition_C(rows))[0, None]
        found = cute.make_fragment_like(view, Float32)
        cute.autovec_copy(view, found)
        return found

    @cute.jit
    def add_dq(self, state: SimpleNamespace, m_tile: Int32, head: Int32):
        """Add dS·K to dq_accum; where there are semaphores, behind the blocks of the keys before these."""
        mma, tid, call = state.mma_dQ, self.tid(state), state.call
        shape = mma.get_slice(tid).partition_shape_C((self.tile_m, self.head_dim))
        acc_dQ = cute.make_rmem_tensor(shape, Float32)
        acc_dQ.fill(0.0)
        gemm_st(mma, tid, acc_dQ, state.sdS, state.sK, self.dtype, True)
        row = workspace_row(state, m_tile, head, self.tile_m)
        if call.semaphores.toint() != 0:
            keys, semaphore = recall(state), Int32(row // STRIP)  # below 2**31 (`registry.ops.attention`)
            first = cutlass.max(m_tile * self.tile_m + keys.offset - call.window_left, 0) // self.tile_n
            turn = keys.start // self.tile_n - first
            accumulate.take_turn(call.semaphores, semaphore, turn, state.notes.iterator + NOTED.index("pending"))
        accumulate.add_tile(mma, tid, acc_dQ, self.tile_m, self.head_dim, call.dq_accum, row)

    @cute.jit
    def end_turn(self, state: SimpleNamespace):
        """A barrier. Where additions have an order, it ends this block's turn at the query tile before: much has been
        computed since, so that nobody waits for the additions to arrive."""
        if state.call.semaphores.toint() != 0:
            cute.arch.fence_acq_rel_gpu()
        cute.arch.barrier()
        if state.call.semaphores.toint() != 0:
            accumulate.end_turn(state.call.semaphores, state.notes.iterator + NOTED.index("pending"))


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = FlashBackward(variant)
    vectors = ("dq_accum", "lse_log2", "delta")
    return compiled(kernel, BWD, variant, dump_dir, tile=kernel.tile_n, vectors=vectors)
