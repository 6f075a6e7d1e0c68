"""The output of a forward whose keys may be shared out: whole, or a split's part of it for `fwd_combine`."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.trunk import softmax
from kernels.trunk.forward import Forward, recall
from kernels.trunk.interfaces import Multiplies
from kernels.trunk.mma import rows_columns
from kernels.trunk.outputs import sinks_of, write_lse
from kernels.trunk.scalars import aligned
from kernels.trunk.tile_coord import row_of, token_head
from kernels.trunk.tiles import smem_layout, store_rows, tile_copy


class SplitOutput:
    """The epilogue of `fwd_paged` (`kernels.trunk.interfaces.Output`)."""

    def __init__(self, products: Multiplies):
        self.products = products

    def tile(self, forward: Forward, memory: cute.Pointer) -> cute.Tensor:
        """Where O goes in shared memory: to where K and V are, from the start."""
        start = cute.arch.get_dyn_smem(forward.dtype, alignment=1024)
        return cute.make_tensor(start, smem_layout(forward.tile_m, forward.head_dim_v))

    @cute.jit
    def write(self, forward: Forward, state: SimpleNamespace, head_kv: Int32):
        """Normalise and write."""
        call, rows = state.call, recall(state)
        batch_idx = rows.batch_idx
        tOcO = forward.coordinates(state, forward.head_dim_v)
        block, _, _ = cute.arch.block_idx()
        split = block % call.num_splits
        sinks = sinks_of(call, rows, tOcO, forward.dtype)
        for r in cutlass.range_constexpr(cute.size(sinks)):
            sinks[r] = sinks[r] if split == 0 else -Float32.inf  # it counts once
        softmax.finish(state.acc_O, state.row_max, state.row_sum, call.scale_log2, sinks)
        self.products.finish(state, batch_idx, head_kv)
        if (call.lse.toint() != 0) & (tOcO[0][1] == 0):
            start = batch_idx * call.lse_stride_b + rows.head * call.lse_stride_h + split * call.lse_stride_split
            write_lse(state, rows, tOcO, call.lse + (start + rows.q_first))
        start = batch_idx * call.o_stride_b + rows.q_first * call.o_stride_s + rows.head * call.o_stride_h
        if call.num_splits > 1:
            self.write_partial(state, rows, tOcO, call.o, start + split * call.o_stride_split)
        else:
            self.write_whole(forward, state, rows, tOcO, start)

    @cute.jit
    def write_partial(
        self, state: SimpleNamespace, rows: SimpleNamespace, tOcO: cute.Tensor, o: cute.Pointer, start: Int64
    ):
        """Write fp32 to o, `start` elements on, straight from the registers."""
        call = state.call
        partial = cute.recast_ptr(o, dtype=Float32)
        values = rows_columns(state.acc_O)
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            row = rows.start + row_of(tOcO, r)
            token, head = token_head(rows, row)
            if row < rows.count:
                offset = start + Int64(token) * call.o_stride_s + Int64(head) * call.o_stride_h
                for c in cutlass.range_constexpr(0, cute.size(values, mode=[1])):
                    column = self.products.column(tOcO, c)
                    if column < call.head_dim_v:
                        cute.make_tensor(partial + (offset + column), cute.make_layout(1))[0] = values[r, c]

    @cute.jit
    def write_whole(
        self, forward: Forward, state: SimpleNamespace, rows: SimpleNamespace, tOcO: cute.Tensor, start: Int64
    ):
        """Convert O and store it through the shared memory that held K."""
        call, stages = state.call, forward.stages
        rO = cute.make_fragment_like(state.acc_O, forward.dtype)
        rO.store(state.acc_O.load().to(forward.dtype))
        if cutlass.const_expr(forward.q_steps == 0):
            # Q's loads may still be in flight where no key block was visited.
            cute.arch.cp_async_wait_group(max(stages - 1, 1))
        of_keys = self.products.k_columns * forward.tile_n
        if cutlass.const_expr(stages > 1 or forward.head_dim_v * forward.tile_m > of_keys):
            cute.arch.barrier()  # other warps may still read what lay there; of one stage's K they do not
        self.products.to_smem(state, rO, tOcO)
        cute.arch.barrier()
        rows.token_stride, rows.head_stride = call.o_stride_s, call.o_stride_h
        copy = tile_copy(forward.dtype, forward.head_dim_v, forward.threads, False)
        store_rows(copy, state.sO, aligned(call.o, start), rows, call.head_dim_v, state.tid)
