"""`fwd_combine`: the weighted sum of partial outputs whose key sets are disjoint.

With lse_i = log Σ exp(s) over part i, the whole has lse = log Σ exp(lse_i) and o = Σ exp(lse_i − lse) · o_i
(FlashDecoding, Dao et al. 2023). A warp takes a row: one query head of one token.
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.trunk.compile import compiled
from kernels.trunk.generated import Generated
from kernels.trunk.scalars import DTYPES, LN2, LOG2E, element, named
from registry.contract.variant import Variant
from registry.ops.fwd_combine import FWD_COMBINE

LANE = 4  # columns a lane takes at once: 16 bytes of fp32
AHEAD = 16  # loads in flight; divides 32


class Combine:
    """One variant: the dtype of its output."""

    smem = 0

    def __init__(self, variant: Variant):
        self.dtype = DTYPES[variant.dtype]
        self.chunks = variant.head_dim_v // (32 * LANE)
        self.rows = variant.size("m")
        self.threads = 32 * self.rows

    @cute.jit
    def __call__(self, *parameters):
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1))

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, FWD_COMBINE.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        # rows and num_splits are at most 2**31 − 32 (`registry.ops.attention`): no sum here wraps around.
        row = block * self.rows + tid // 32
        if row < call.rows:
            self.row(call, row, tid % 32)

    @cute.jit
    def row(self, call: SimpleNamespace, row: Int32, lane: Int32):
        token = row // call.heads
        head = row - token * call.heads
        batch_idx = token // call.seqlen
        token = token - batch_idx * call.seqlen
        start = batch_idx * call.lse_partial_stride_b + token * call.lse_partial_stride_s
        start = start + head * call.lse_partial_stride_h
        highest = self.highest(call, start, lane)
        base = Float32(0.0) if highest == -Float32.inf else highest * LOG2E
        total = Float32(0.0)
        acc = cute.make_rmem_tensor((LANE, self.chunks), Float32)
        acc.fill(0.0)
        for chunk in cutlass.range_constexpr(self.chunks):
            if chunk * 32 * LANE < call.head_dim_v:
                total = self.sum_up(call, acc[None, chunk], chunk, row, start, base, lane)
        factor = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
        o_start = batch_idx * call.o_stride_b + token * call.o_stride_s + head * call.o_stride_h
        self.store(call, acc, o_start, lane, factor)
        if (call.lse.toint() != 0) & (lane == 0):
            lse = -Float32.inf if total == 0.0 else (base + cute.math.log2(total, fastmath=True)) * LN2
            there = batch_idx * call.lse_stride_b + token * call.lse_stride_s + head * call.lse_stride_h
            cute.make_tensor(call.lse + there, cute.make_layout(1))[0] = lse

    @cute.jit
    def highest(self, call: SimpleNamespace, start: Int64, lane: Int32) -> Float32:
        """The largest LSE of a row's parts, in all lanes."""
        highest = -Float32.inf
        split = lane
        while split < call.num_splits:
            highest = cute.arch.fmax(highest, element(call.lse_partial, start + split * call.lse_partial_stride_split))
            split = split + 32
        for bit in cutlass.range_constexpr(5):
            highest = cute.arch.fmax(highest, cute.arch.shuffle_sync_bfly(highest, offset=1 << bit))
        return highest

    @cute.jit
    def sum_up(
        self, call: SimpleNamespace, acc: cute.Tensor, chunk: cutlass.Constexpr, row: Int32, start: Int64,
        base: Float32, lane: Int32,
    ) -> Float32:  # fmt: skip
        """Add this lane's columns of all parts to acc; the sum of the weights.

        Each lane knows the weight of one part of 32. AHEAD loads are in flight at a time, whatever their weights: what
        has none is read, and left out.
        """
        total = Float32(0.0)
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
        parts = cute.make_rmem_tensor((LANE, AHEAD), Float32)
        column = cutlass.min((chunk * 32 + lane) * LANE, call.head_dim_v - LANE)
        o_start = Int64(row) * call.head_dim_v + column
        first = Int32(0)
        while first < call.num_splits:
            own = Float32(0.0)
            if first + lane < call.num_splits:
                split = first + lane
                lse = element(call.lse_partial, start + split * call.lse_partial_stride_split)
                own = cute.math.exp2(lse * LOG2E - base, fastmath=True)
            for behind in cutlass.range(0, cutlass.min(32, call.num_splits - first), AHEAD, unroll=1):
                for i in cutlass.range_constexpr(AHEAD):
                    split = cutlass.min(first + behind + i, call.num_splits - 1)
                    there = call.o_partial + cute.assume(o_start + split * call.o_partial_stride_split, divby=LANE)
                    cute.copy(copy, cute.make_tensor(there, cute.make_layout(LANE)), parts[None, i])
                for i in cutlass.range_constexpr(AHEAD):
                    weight = cute.arch.shuffle_sync(own, behind + i)
                    total = total + weight
                    for c in cutlass.range_constexpr(LANE):
                        acc[c] = acc[c] + (parts[c, i] * weight if weight != 0.0 else Float32(0.0))
            first = first + 32
        return total

    @cute.jit
    def store(self, call: SimpleNamespace, acc: cute.Tensor, start: Int64, lane: Int32, factor: Float32):
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=LANE * self.dtype.width)
        rO = cute.make_rmem_tensor(LANE, self.dtype)
        for chunk in cutlass.range_constexpr(self.chunks):
            column = (chunk * 32 + lane) * LANE
            if column < call.head_dim_v:
                rO.store((acc[None, chunk].load() * factor).to(self.dtype))
                there = call.o + cute.assume(start + column, divby=LANE)
                cute.copy(copy, rO, cute.make_tensor(there, cute.make_layout(LANE)))


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = Combine(variant)
    return compiled(kernel, FWD_COMBINE, variant, dump_dir, tile=kernel.rows, vectors=("o_partial", "o"))
