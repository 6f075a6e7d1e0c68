"""The forward's products with keys and values of e4m3 (`kernels.trunk.fp8`)."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.trunk import fp8
from kernels.trunk.mma import as_a_operand, rows_columns
from kernels.trunk.scalars import element
from registry.contract.variant import Variant


class E4m3Products:
    """Products by way of fp16 (`kernels.trunk.interfaces.Multiplies`).

    K and V tiles are kept in units of two bytes: a row is half as long.
    """

    packing = 2  # elements of K and V in two bytes

    def __init__(self, variant: Variant):
        self.dtype = cutlass.Float16
        self.k_columns, self.v_columns = variant.head_dim // 2, variant.head_dim_v // 2
        self.q_steps = variant.size("q")

    @cute.jit
    def load_queries(self, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32):
        state.rQ, factor = fp8.load_a(state.mma, state.tid, state.sQ, self.q_steps)
        self.descale_scores(state.call, batch_idx, head_kv, factor)

    @cute.jit
    def descale_scores(self, call: SimpleNamespace, batch_idx: Int32, head_kv: Int32, factor: Float32):
        """k_descale and what Q was divided by become part of the factor that scores meet first."""
        if call.k_descale.toint() != 0:
            factor = factor * element(call.k_descale, Int64(batch_idx) * call.k_descale_stride_b + head_kv)
        capped = call.softcap_scale != 0.0
        call.softcap_scale = call.softcap_scale * factor
        call.scale_log2 = call.scale_log2 if capped else call.scale_log2 * factor

    @cute.jit
    def keys(self, state: SimpleNamespace, acc_S: cute.Tensor, sK: cute.Tensor, steps: cutlass.Constexpr):
        """Q·Kᵀ over all columns at once."""
        if cutlass.const_expr(len(steps) > 0):
            fp8.gemm_ss(state.mma, state.tid, acc_S, state.rQ, sK)

    @cute.jit
    def values(self, state: SimpleNamespace, acc_S: cute.Tensor, sV: cute.Tensor):
        rP = cute.make_fragment_like(acc_S, self.dtype)
        rP.store(acc_S.load().to(self.dtype))
        fp8.gemm_rs(state.mma, state.tid, state.acc_O, as_a_operand(rP), sV)

    @cute.jit
    def finish(self, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32):
        """Multiply the output by v_descale."""
        call = state.call
        if call.v_descale.toint() != 0:
            descale = element(call.v_descale, Int64(batch_idx) * call.v_descale_stride_b + head_kv)
            state.acc_O.store(state.acc_O.load() * descale)

    def column(self, tOcO: cute.Tensor, c: int) -> Int32:
        """The output's column that is this thread's c-th."""
        return fp8.column(rows_columns(tOcO)[0, 0][1], c)

    @cute.jit
    def to_smem(self, state: SimpleNamespace, rO: cute.Tensor, tOcO: cute.Tensor):
        """Store a converted accumulator in sO."""
        values = rows_columns(rO)
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
                state.sO[rows_columns(tOcO)[r, 0][0], self.column(tOcO, c)] = values[r, c]
