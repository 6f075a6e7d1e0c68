"""Attention forward for SM120-class chips: cp.async, ldmatrix, mma.sync.

One block computes one (query tile, head, batch entry). Scores never leave registers. Key blocks that need a mask come
first, then the interior ones in a loop of its own without any mask code; softmax does not mind the order.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels import mask, softmax
from kernels.abi import FWD
from kernels.compile import to_ptx
from kernels.generate import Generated
from kernels.mma import as_a_operand, gemm_rs, gemm_ss, rows_columns, tiled_mma
from kernels.tiles import load_tile, matrix_of, smem_layout, store_tile, thread_view, tile_copy
from kernels.validity import fwd_invalid, fwd_smem
from registry.contract import ContractError, Grid, Variant

SECTION = 64  # heads whose query tiles run side by side; docs/tuning.md
DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}


class FlashForward:
    """The forward kernel of one variant: its tile, its shared memory and its device code."""

    def __init__(self, variant: Variant):
        reason = fwd_invalid(variant)
        if reason:
            raise ContractError(f"{variant.key}: {reason}")
        self.smem = fwd_smem(variant)
        self.dtype = DTYPES[variant.dtype]
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.size("m"), variant.size("n")
        self.warps, self.stages = variant.size("w"), variant.size("s")
        self.threads = 32 * self.warps
        # A narrow accumulator is cheaper to rescale at every block than to branch around.
        self.lazy_rescale = self.head_dim_v > 64

    @cute.jit
    def __call__(self, *parameters):
        """The host side, for its launch facts alone: nobody calls it, the runtime launches the cubin."""
        self.kernel(*parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1), smem=self.smem)

    @cute.kernel
    def kernel(
        self,
        q: cute.Pointer, k: cute.Pointer, v: cute.Pointer, o: cute.Pointer, lse: cute.Pointer,
        cu_seqlens_q: cute.Pointer, cu_seqlens_k: cute.Pointer, seqused_q: cute.Pointer, seqused_k: cute.Pointer,
        page_table: cute.Pointer, sink: cute.Pointer, alibi_slopes: cute.Pointer,
        o_partial: cute.Pointer, lse_partial: cute.Pointer, k_descale: cute.Pointer, v_descale: cute.Pointer,
        q_stride_b: Int64, q_stride_s: Int64, q_stride_h: Int64,
        k_stride_b: Int64, k_stride_s: Int64, k_stride_h: Int64,
        v_stride_b: Int64, v_stride_s: Int64, v_stride_h: Int64,
        o_stride_b: Int64, o_stride_s: Int64, o_stride_h: Int64,
        lse_stride_b: Int64, lse_stride_h: Int64,
        batch: Int32, heads_q: Int32, heads_kv: Int32, seqlen_q: Int32, seqlen_k: Int32,
        window_left: Int32, window_right: Int32, page_size: Int32, page_table_stride: Int32, num_splits: Int32,
        scale_log2: Float32, softcap: Float32,
    ):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        m_block, head, entry = self.schedule(block, cute.ceil_div(seqlen_q, self.tile_m), heads_q, batch)
        head_kv = head // (heads_q // heads_kv)
        mQ = matrix_of(q, seqlen_q, self.head_dim, q_stride_s, q_stride_h, q_stride_b, head, entry)
        mK = matrix_of(k, seqlen_k, self.head_dim, k_stride_s, k_stride_h, k_stride_b, head_kv, entry)
        mV = matrix_of(v, seqlen_k, self.head_dim_v, v_stride_s, v_stride_h, v_stride_b, head_kv, entry)
        mO = matrix_of(o, seqlen_q, self.head_dim_v, o_stride_s, o_stride_h, o_stride_b, head, entry)

        state = self.state(tid)
        state.scale_log2 = scale_log2
        state.tKgK = thread_view(state.copy_qk, mK, self.tile_n, tid)
        state.tVgV = thread_view(state.copy_v, mV, self.tile_n, tid)
        tQgQ = thread_view(state.copy_qk, mQ, self.tile_m, tid)
        state.m_start = m_block * self.tile_m
        state.seqlen_q, state.seqlen_k, state.left, state.right = seqlen_q, seqlen_k, window_left, window_right
        first, inner_first, inner_end, end = mask.block_ranges(
            state.m_start, self.tile_m, self.tile_n, seqlen_q, seqlen_k, window_left, window_right
        )
        # Visiting order: right edge downwards, left edge upwards, interior downwards.
        right_edge = end - inner_end
        edges = right_edge + inner_first - first
        state.count = end - first

        load_tile(state.copy_qk, tQgQ, state.sQ, m_block, tid, seqlen_q - state.m_start)
        if state.count > 0:
            n_block = self.visit(0, first, inner_end, end, right_edge, edges)
            rows_left = seqlen_k - n_block * self.tile_n
            load_tile(state.copy_qk, state.tKgK, state.sK[None, None, 0], n_block, tid, rows_left)
            if cutlass.const_expr(self.stages > 1):
                load_tile(state.copy_v, state.tVgV, state.sV[None, None, 0], n_block, tid, rows_left)
        cute.arch.cp_async_commit_group()
        # Only the last key block may reach past seqlen_k, and it comes first: the loads ahead need no bound.
        for i in cutlass.range(0, edges, 1, unroll=1):
            n_block = self.visit(i, first, inner_end, end, right_edge, edges)
            n_next = self.visit(i + 1, first, inner_end, end, right_edge, edges)
            self.one_block(state, i, n_block, n_next, masked=True)
        for i in cutlass.range(edges, state.count, 1, unroll=1):
            n_block = inner_end - 1 - (i - edges)
            self.one_block(state, i, n_block, n_block - 1, masked=False)
        self.epilogue(state, m_block, mO, lse, entry * lse_stride_b + head * lse_stride_h)

    @cute.jit
    def schedule(self, block: Int32, num_m: Int32, heads_q: Int32, batch: Int32) -> tuple[Int32, Int32, Int32]:
        """(query tile, head, batch entry) of a block.

        Heads go in sections of SECTION (of any batch entries) and within one from the last query tile to the first:
        under a causal mask the longest tiles start first and the short ones fill the tail, while the keys and values
        of a section's heads stay in L2.
        """
        done = block // (num_m * SECTION) * SECTION
        width = cutlass.min(SECTION, heads_q * batch - done)
        within = block - done * num_m
        pair = done + within % width
        return num_m - 1 - within // width, pair % heads_q, pair // heads_q

    def state(self, tid: Int32) -> SimpleNamespace:
        """What a block keeps through its loops: tiles in shared memory, accumulators, softmax statistics, copies."""
        memory = cute.arch.get_dyn_smem(self.dtype, alignment=1024)
        sQ = cute.make_tensor(memory, smem_layout(self.tile_m, self.head_dim))
        sO = cute.make_tensor(memory, smem_layout(self.tile_m, self.head_dim_v))
        memory += self.tile_m * max(self.head_dim, self.head_dim_v)
        pair = self.tile_n * (self.head_dim + self.head_dim_v)
        sK = self.staged(memory, self.head_dim, pair)
        sV = self.staged(memory + self.tile_n * self.head_dim, self.head_dim_v, pair)
        mma = tiled_mma(self.dtype, self.warps)
        acc_O = cute.make_rmem_tensor(mma.get_slice(tid).partition_shape_C((self.tile_m, self.head_dim_v)), Float32)
        acc_O.fill(0.0)
        rows = cute.size(rows_columns(acc_O), mode=[0])
        row_max, row_sum = cute.make_rmem_tensor(rows, Float32), cute.make_rmem_tensor(rows, Float32)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        return SimpleNamespace(
            tid=tid, sQ=sQ, sO=sO, sK=sK, sV=sV, mma=mma,
            acc_O=acc_O, row_max=row_max, row_sum=row_sum,
            copy_qk=tile_copy(self.dtype, self.head_dim, self.threads, True),
            copy_v=tile_copy(self.dtype, self.head_dim_v, self.threads, True),
        )  # fmt: skip

    def staged(self, memory: cute.Pointer, columns: int, stride: int) -> cute.Tensor:
        """(tile_n, columns, stages): one key or value tile a stage, `stride` elements apart."""
        layout = smem_layout(self.tile_n, columns)
        outer = cute.append(layout.outer, cute.make_layout(self.stages, stride=stride))
        return cute.make_tensor(memory, cute.make_composed_layout(layout.inner, 0, outer))

    @cute.jit
    def visit(self, i: Int32, first: Int32, inner_end: Int32, end: Int32, right_edge: Int32, edges: Int32) -> Int32:
        """The i-th key block to visit: right edge downwards, left edge upwards, interior downwards."""
        n_block = inner_end - 1 - (i - edges)
        if i < right_edge:
            n_block = end - 1 - i
        elif i < edges:
            n_block = first + i - right_edge
        return n_block

    @cute.jit
    def one_block(self, state: SimpleNamespace, i: Int32, n_block: Int32, n_next: Int32, masked: cutlass.Constexpr):
        """Add key block n_block to the output, and start the loads of n_next, the block after it."""
        acc_S = cute.make_rmem_tensor(
            state.mma.get_slice(state.tid).partition_shape_C((self.tile_m, self.tile_n)), Float32
        )
        acc_S.fill(0.0)
        tid = state.tid
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        stage = 0
        if cutlass.const_expr(self.stages == 1):
            # V arrives while S is computed, the next K during softmax and P·V.
            rows_left = state.seqlen_k - n_block * self.tile_n if masked else None
            load_tile(state.copy_v, state.tVgV, state.sV[None, None, 0], n_block, tid, rows_left)
        else:
            stage = i % 2
            if i + 1 < state.count:
                self.load_pair(state, n_next, 1 - stage)
        cute.arch.cp_async_commit_group()
        gemm_ss(state.mma, tid, acc_S, state.sQ, state.sK[None, None, stage], self.dtype)
        if cutlass.const_expr(self.stages == 1):
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
            if i + 1 < state.count:
                load_tile(state.copy_qk, state.tKgK, state.sK[None, None, 0], n_next, tid)
            cute.arch.cp_async_commit_group()
        if cutlass.const_expr(masked):
            tScS = state.mma.get_slice(tid).partition_C(cute.make_identity_tensor((self.tile_m, self.tile_n)))
            mask.apply(
                acc_S, tScS, state.m_start, n_block * self.tile_n,
                state.seqlen_q, state.seqlen_k, state.left, state.right,
            )  # fmt: skip
        softmax.update(acc_S, state.acc_O, state.row_max, state.row_sum, state.scale_log2, masked, self.lazy_rescale)
        rP = cute.make_fragment_like(acc_S, self.dtype)
        rP.store(acc_S.load().to(self.dtype))
        gemm_rs(state.mma, tid, state.acc_O, as_a_operand(rP), state.sV[None, None, stage], self.dtype)

    @cute.jit
    def load_pair(self, state: SimpleNamespace, n_block: Int32, stage: Int32):
        load_tile(state.copy_qk, state.tKgK, state.sK[None, None, stage], n_block, state.tid)
        load_tile(state.copy_v, state.tVgV, state.sV[None, None, stage], n_block, state.tid)

    @cute.jit
    def epilogue(self, state: SimpleNamespace, m_block: Int32, mO: cute.Tensor, lse: cute.Pointer, lse_offset: Int64):
        """Normalise, write the LSE where it is wanted, and store O through the shared memory that held Q."""
        softmax.finish(state.acc_O, state.row_max, state.row_sum, state.scale_log2)
        if lse.toint() != 0:
            mLSE = cute.make_tensor(lse + lse_offset, cute.make_layout(state.seqlen_q))
            cO = cute.make_identity_tensor((self.tile_m, self.head_dim_v))
            place = rows_columns(state.mma.get_slice(state.tid).partition_C(cO))
            if place[0, 0][1] == 0:
                for r in cutlass.range_constexpr(cute.size(state.row_sum)):
                    row = state.m_start + place[r, 0][0]
                    if row < state.seqlen_q:
                        mLSE[row] = state.row_sum[r]
        rO = cute.make_fragment_like(state.acc_O, self.dtype)
        rO.store(state.acc_O.load().to(self.dtype))
        # Q's loads may still be in flight where no key block was visited, and other warps may still read Q.
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        to_smem = cute.make_tiled_copy_C(
            cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=32), state.mma
        ).get_slice(state.tid)
        cute.copy(to_smem, to_smem.retile(rO), to_smem.partition_D(state.sO))
        cute.arch.barrier()
        store_tile(tile_copy(self.dtype, self.head_dim_v, self.threads, False), state.sO, mO, m_block, state.tid)


def generate(variant: Variant, symbol: str, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    op = FlashForward(variant)
    elements = dict.fromkeys(("q", "k", "v", "o"), op.dtype)
    elements |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table"), Int32)
    ptx, entry = to_ptx(op, FWD, elements, symbol, dump_dir)
    return Generated(ptx, entry, op.threads, op.smem, Grid("tiles_heads_batch", op.tile_m))
