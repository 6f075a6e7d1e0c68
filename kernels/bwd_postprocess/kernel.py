"""`bwd_postprocess`: dq of its accumulator."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from kernels.trunk.compile import compiled
from kernels.trunk.generated import Generated
from kernels.trunk.scalars import VECTOR, named
from kernels.trunk.workspaces import STRIP, UNIT, QueryRows, tile_coord
from registry.contract.variant import Variant
from registry.ops.bwd_postprocess import BWD_POSTPROCESS
from registry.ops.workspaces import ROWS


class Postprocess(QueryRows):
    """dq = softmax_scale · dq_accum, in rows of the query's dtype."""

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, BWD_POSTPROCESS.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = tile_coord(call, block)
        strip, lane = tid // 32, tid % 32
        first = (at.head * call.rows + at.row + strip * STRIP) * call.head_dim_accum + lane * 4
        dq_start = at.batch_idx * call.dq_stride_b + at.q_first * call.dq_stride_s + at.head * call.dq_stride_h
        token = at.start + strip * STRIP + lane // 4
        if at.start + strip * STRIP < at.count:
            for group in cutlass.range(cute.ceil_div(call.head_dim, 32), unroll=1):
                units = self.units(call, first + group * (4 * UNIT))
                column = group * 32 + lane % 4 * VECTOR
                for half in cutlass.range_constexpr(2):
                    row = transposed([units[half, unit] for unit in range(4)], lane)
                    if (token + 8 * half < at.count) & (column < call.head_dim):
                        there = self.vector(call.dq, dq_start + (token + 8 * half) * call.dq_stride_s + column)
                        cute.autovec_copy(cute.recast_tensor(row, self.dtype), there)

    @cute.jit
    def units(self, call: SimpleNamespace, start: Int64) -> cute.Tensor:
        """(half, unit): this lane's pairs of columns of 4 units side by side, as registers of two elements."""
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Float32, num_bits_per_copy=128)
        found = cute.make_rmem_tensor((4, 4), Float32)
        for unit in cutlass.range_constexpr(4):
            there = call.dq_accum + cute.assume(start + unit * UNIT, divby=4)
            cute.copy(copy, cute.make_tensor(there, cute.make_layout(4)), found[None, unit])
        low = cute.make_rmem_tensor((4, 4), self.dtype)
        low.store((found.load() * call.softmax_scale).to(self.dtype))
        return cute.recast_tensor(low, Uint32)


@cute.jit
def transposed(units: list, lane: Int32) -> cute.Tensor:
    """Of a quad's 4 × 4 registers: lane u of the four gets unit u's, in the order of the lanes that had them."""
    low, right = lane % 4 < 2, lane % 2 == 1
    pairs = []
    for i in cutlass.range_constexpr(2):
        kept = units[i] if low else units[2 + i]
        got = Uint32(cute.arch.shuffle_sync_bfly(units[2 + i] if low else units[i], offset=2))
        pairs.append((kept if low else got, got if low else kept))
    row = cute.make_rmem_tensor(4, Uint32)
    for source in cutlass.range_constexpr(2):
        kept = pairs[1][source] if right else pairs[0][source]
        got = Uint32(cute.arch.shuffle_sync_bfly(pairs[0][source] if right else pairs[1][source], offset=1))
        row[2 * source] = got if right else kept
        row[2 * source + 1] = kept if right else got
    return row


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    return compiled(Postprocess(variant), BWD_POSTPROCESS, variant, dump_dir, tile=ROWS, vectors=("dq_accum",))
