"""`bwd_preprocess`: what the backward needs of each query row."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kernels.trunk.compile import compiled
from kernels.trunk.generated import Generated
from kernels.trunk.scalars import LOG2E, VECTOR, element, named
from kernels.trunk.workspaces import STRIP, THREADS, QueryRows, tile_coord
from registry.contract.variant import Variant
from registry.ops.bwd_preprocess import BWD_PREPROCESS
from registry.ops.workspaces import ROWS

PASSES = 4  # of a warp over its rows: 4 at once, 8 lanes each
MAX_HEAD_DIM = 256


class Preprocess(QueryRows):
    """delta = rowsum(dO ∘ O) − dLSE (FlashAttention 2, Dao 2023), the LSE in base 2, zeros in dq_accum."""

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, BWD_PREPROCESS.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = tile_coord(call, block)
        self.clear(call, at, tid)
        sums = cute.make_rmem_tensor(PASSES, Float32)
        sums.fill(0.0)
        if at.start < at.count:
            self.products(call, at, tid, sums)
        for nth in cutlass.range_constexpr(PASSES):
            for width in (1, 2, 4):
                sums[nth] = sums[nth] + cute.arch.shuffle_sync_bfly(sums[nth], offset=width)
        self.store(call, at, tid, sums)

    @cute.jit
    def clear(self, call: SimpleNamespace, at: SimpleNamespace, tid: Int32):
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        first = (at.head * call.rows + at.row) * call.head_dim_accum
        for i in cutlass.range(ROWS * call.head_dim_accum // (4 * THREADS)):
            there = call.dq_accum + cute.assume(first + (i * THREADS + tid) * 4, divby=4)
            cute.autovec_copy(zeros, cute.make_tensor(there, cute.make_layout(4)))
        if (call.semaphores.toint() != 0) & (tid < ROWS // STRIP):
            there = call.semaphores + ((at.head * call.rows + at.row) // STRIP + tid)
            cute.make_tensor(there, cute.make_layout(1))[0] = Int32(0)

    def row(self, tid: Int32, nth: int) -> Int32:
        """The row of the tile that this thread's 8 lanes take in the nth pass."""
        return tid // 32 * STRIP + 4 * nth + tid % 32 // 8

    @cute.jit
    def products(self, call: SimpleNamespace, at: SimpleNamespace, tid: Int32, sums: cute.Tensor):
        """Add this lane's columns of dO ∘ O to sums. What does not exist is read as something else, and left out."""
        o_start = at.batch_idx * call.o_stride_b + at.q_first * call.o_stride_s + at.head * call.o_stride_h
        dout_start = at.batch_idx * call.dout_stride_b + at.q_first * call.dout_stride_s + at.head * call.dout_stride_h
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        rO, rdO = (cute.make_rmem_tensor((VECTOR, PASSES), self.dtype) for _ in range(2))
        for chunk in cutlass.range_constexpr(MAX_HEAD_DIM // 64):
            if chunk * 64 < call.head_dim_v:
                column = chunk * 64 + tid % 8 * VECTOR
                there = cutlass.min(column, call.head_dim_v - VECTOR)
                for nth in cutlass.range_constexpr(PASSES):
                    token = cutlass.min(at.start + self.row(tid, nth), at.count - 1)
                    cute.copy(copy, self.vector(call.o, o_start + token * call.o_stride_s + there), rO[None, nth])
                    dout = self.vector(call.dout, dout_start + token * call.dout_stride_s + there)
                    cute.copy(copy, dout, rdO[None, nth])
                for nth in cutlass.range_constexpr(PASSES):
                    for i in cutlass.range_constexpr(VECTOR):
                        product = Float32(rO[i, nth]) * Float32(rdO[i, nth])
                        sums[nth] = sums[nth] + (product if column < call.head_dim_v else Float32(0.0))

    @cute.jit
    def store(self, call: SimpleNamespace, at: SimpleNamespace, tid: Int32, sums: cute.Tensor):
        lse_start = at.batch_idx * call.lse_stride_b + at.head * call.lse_stride_h + at.q_first
        dlse_start = at.batch_idx * call.dlse_stride_b + at.head * call.dlse_stride_h + at.q_first * call.dlse_stride_s
        first = at.head * call.rows + at.row
        for nth in cutlass.range_constexpr(PASSES):
            row = self.row(tid, nth)
            token = at.start + row
            lse, delta = Float32.inf, Float32(0.0)
            if token < at.count:
                given = element(call.lse, lse_start + token)
                lse = Float32.inf if given == -Float32.inf else given * LOG2E
                delta = sums[nth]
                if call.dlse.toint() != 0:
                    delta = delta - element(call.dlse, dlse_start + token * call.dlse_stride_s)
            if tid % 8 == 0:
                cute.make_tensor(call.lse_log2 + (first + row), cute.make_layout(1))[0] = lse
                cute.make_tensor(call.delta + (first + row), cute.make_layout(1))[0] = delta


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    return compiled(Preprocess(variant), BWD_PREPROCESS, variant, dump_dir, tile=ROWS, vectors=("dq_accum",))
