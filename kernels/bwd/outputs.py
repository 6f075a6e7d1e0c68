"""What a block of the backward writes itself: dK and dV, or its part of them."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.bwd.keys import recall
from kernels.trunk.mma import rows_columns
from kernels.trunk.scalars import aligned
from kernels.trunk.tiles import smem_layout, store_tile, tile_copy


class Outputs:
    """The part of `FlashBackward` that leaves registers."""

    dtype: type[cutlass.Numeric]
    head_dim: int
    head_dim_v: int
    tile_n: int
    threads: int

    @cute.jit
    def to_smem(
        self, state: SimpleNamespace, tid: Int32, rX: cute.Tensor, sX: cute.Tensor, h: cutlass.Constexpr
    ):  # fmt: skip
        """Store an accumulator of all rows as the h-th tile of its width in sX."""
        atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=32)
        copy = cute.make_tiled_copy_C(atom, state.mma).get_slice(tid)
        source, target = copy.retile(rX), copy.partition_D(sX)
        columns = cute.size(source, mode=[2])
        for c in cutlass.range_constexpr(columns):
            cute.copy(copy, source[None, None, c], target[None, None, h * columns + c])

    @cute.jit
    def epilogue(self, state: SimpleNamespace):
        """Store dV and dK."""
        call = state.call
        dim, dim_v, one = self.head_dim, self.head_dim_v, Float32(1.0)
        if call.dk_partial.toint() != 0:
            strides = call.dv_partial_stride_split, call.dk_partial_stride_split
            self.store_partial(state, state.acc_dV, one, dim_v, call.head_dim_v, call.dv_partial, strides[0])
            self.store_partial(state, state.acc_dK, call.softmax_scale, dim, call.head_dim, call.dk_partial, strides[1])
        else:
            dv = call.dv, call.dv_stride_b, call.dv_stride_s, call.dv_stride_h
            dk = call.dk, call.dk_stride_b, call.dk_stride_s, call.dk_stride_h
            self.store(state, state.acc_dV, one, dim_v, call.head_dim_v, dv)
            self.store(state, state.acc_dK, call.softmax_scale, dim, call.head_dim, dk)

    @cute.jit
    def store(
        self, state: SimpleNamespace, acc: cute.Tensor, factor: Float32, width: cutlass.Constexpr, columns: Int32,
        to: tuple,
    ):  # fmt: skip
        """Rows of the output's dtype, by way of the shared memory that held K."""
        keys, (pointer, stride_b, stride_s, stride_h) = recall(state), to
        low = cute.make_fragment_like(acc, self.dtype)
        low.store((acc.load() * factor).to(self.dtype))
        sX = cute.make_tensor(state.start, smem_layout(self.tile_n, width))
        cute.arch.barrier()  # other warps may still read what lay there
        self.to_smem(state, state.tid, low, sX, 0)
        cute.arch.barrier()
        start = keys.batch_idx * stride_b + (keys.k_first + keys.start) * stride_s + keys.head * stride_h
        copy = tile_copy(self.dtype, width, self.threads, False)
        store_tile(copy, sX, aligned(pointer, start), stride_s, keys.count - keys.start, columns, state.tid)

    @cute.jit
    def store_partial(
        self, state: SimpleNamespace, acc: cute.Tensor, factor: Float32, width: cutlass.Constexpr, columns: Int32,
        pointer: cute.Pointer, stride_split: Int64,
    ):  # fmt: skip
        """Rows of fp32, two columns a lane at once, in a contiguous array of this split's own."""
        call, keys = state.call, recall(state)
        token = Int64(keys.k_first + keys.start)
        if call.cu_seqlens_k.toint() == 0:
            token = token + Int64(keys.batch_idx) * call.seqlen_k
        row_stride = Int64(call.heads_kv) * columns
        # (token · heads_kv + head) · columns is the same, but here it would change the main loop's addresses and order.
        start = keys.split * stride_split + token * row_stride + Int64(keys.head) * columns
        tCcC = state.mma.get_slice(state.tid).partition_C(cute.make_identity_tensor((self.tile_n, width)))
        coordinate = rows_columns(tCcC)
        values, pair = rows_columns(acc), cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            for c in cutlass.range_constexpr(0, cute.size(values, mode=[1]), 2):
                row, column = coordinate[r, 0][0], coordinate[0, c][1]
                if (row < keys.count - keys.start) & (column < columns):
                    pair[0], pair[1] = values[r, c] * factor, values[r, c + 1] * factor
                    there = start + row * row_stride + column
                    there = cute.make_tensor(pointer + cute.assume(there, divby=2), cute.make_layout(2))
                    cute.autovec_copy(pair, there)
