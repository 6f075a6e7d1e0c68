"""The forward's two products, S += Q·Kᵀ and O += P·V."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from kernels.trunk.mma import as_a_operand, gemm_rs, gemm_ss, load_a, rows_columns
from kernels.trunk.scalars import DTYPES
from registry.contract.variant import Variant


class Products:
    """Products of keys and values in the queries' dtype (`kernels.trunk.interfaces.Multiplies`)."""

    packing = 1  # elements of K and V in one of `dtype`

    def __init__(self, variant: Variant):
        self.dtype = DTYPES[variant.dtype]
        self.k_columns, self.v_columns = variant.head_dim, variant.head_dim_v
        self.q_steps = variant.size("q")

    @cute.jit
    def load_queries(self, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32):
        """Bring `q_steps` steps of Q into registers, from shared memory."""
        state.rQ = load_a(state.mma, state.tid, state.sQ, self.dtype, self.q_steps)

    @cute.jit
    def keys(self, state: SimpleNamespace, acc_S: cute.Tensor, sK: cute.Tensor, steps: cutlass.Constexpr):
        """Add Q·Kᵀ over a range of steps of 16 columns."""
        if cutlass.const_expr(len(steps) > 0):
            gemm_ss(state.mma, state.tid, acc_S, state.rQ, state.sQ, sK, self.dtype, steps, self.q_steps)

    @cute.jit
    def values(self, state: SimpleNamespace, acc_S: cute.Tensor, sV: cute.Tensor):
        """Add P·V to the output, with P in acc_S."""
        rP = cute.make_fragment_like(acc_S, self.dtype)
        rP.store(acc_S.load().to(self.dtype))
        gemm_rs(state.mma, state.tid, state.acc_O, as_a_operand(rP), sV, self.dtype)

    def finish(self, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32):
        """What is left to do to the output: nothing."""

    def column(self, tOcO: cute.Tensor, c: int) -> Int32:
        """The output's column that is this thread's c-th."""
        return rows_columns(tOcO)[0, c][1]

    @cute.jit
    def to_smem(self, state: SimpleNamespace, rO: cute.Tensor, tOcO: cute.Tensor):
        """Store the converted output in sO."""
        atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=32)
        copy = cute.make_tiled_copy_C(atom, state.mma).get_slice(state.tid)
        cute.copy(copy, copy.retile(rO), copy.partition_D(state.sO))
