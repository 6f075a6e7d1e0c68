"""The forward's epilogue: what the ways of writing an output have in common. tOcO: coordinates of its accumulator."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from kernels.trunk.mma import rows_columns
from kernels.trunk.scalars import LOG2E, element
from kernels.trunk.tile_coord import row_of, token_head


@cute.jit
def write_lse(state: SimpleNamespace, rows: SimpleNamespace, tOcO: cute.Tensor, lse: cute.Pointer):
    """Write what softmax.finish left in row_sum. lse: where the tile head's first token has its own."""
    for r in cutlass.range_constexpr(cute.size(state.row_sum)):
        row = rows.start + row_of(tOcO, r)
        token, head = token_head(rows, row)
        if row < rows.count:
            there = lse + (head * state.call.lse_stride_h + token)
            cute.make_tensor(there, cute.make_layout(1))[0] = state.row_sum[r]


@cute.jit
def sinks_of(call: SimpleNamespace, rows: SimpleNamespace, tOcO: cute.Tensor, dtype: cutlass.Constexpr) -> cute.Tensor:
    """The sink of each row's head in log2; −inf without one."""
    sinks = cute.make_rmem_tensor(cute.size(rows_columns(tOcO), mode=[0]), Float32)
    sinks.fill(-Float32.inf)
    if call.sink.toint() != 0:
        for r in cutlass.range_constexpr(cute.size(sinks)):
            _, head = token_head(rows, cutlass.min(rows.start + row_of(tOcO, r), rows.count - 1))
            if call.sink_low != 0:
                low = cute.recast_ptr(call.sink, dtype=dtype)
                sinks[r] = Float32(element(low, rows.head + head)) * LOG2E
            else:
                sinks[r] = element(call.sink, rows.head + head) * LOG2E
    return sinks
