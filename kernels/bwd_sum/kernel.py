"""`bwd_sum`: dK and dV as the sums of what the group splits of a backward computed.

Both are taken as flat arrays, in units of UNIT elements: those of dK, then those of dV. A warp takes a unit.
Elements that belong to no sequence are summed too: the caller's zeros.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernels.trunk.compile import compiled
from kernels.trunk.generated import Generated
from kernels.trunk.scalars import DTYPES, VECTOR, named
from registry.contract.variant import Variant
from registry.ops.bwd_sum import BWD_SUM, UNIT

HALF = VECTOR // 2  # fp32 elements of 16 bytes


class SplitSum:
    """One variant: the dtype of dK and dV."""

    smem = 0

    def __init__(self, variant: Variant):
        self.dtype = DTYPES[variant.dtype]
        self.units = variant.size("m")
        self.threads = 32 * self.units

    @cute.jit
    def __call__(self, *parameters):
        self.kernel(parameters).launch(grid=(1, 1, 1), block=(self.threads, 1, 1))

    @cute.kernel
    def kernel(self, parameters: tuple):
        call = named(parameters, BWD_SUM.abi)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        unit = Int64(block) * self.units + tid // 32
        units_k = (call.dk_elements + (UNIT - 1)) // UNIT
        within = tid % 32 * VECTOR
        if unit < units_k:
            element = unit * UNIT + within
            if element < call.dk_elements:
                self.sum_up(call.dk_partial, call.dk_partial_stride_split, call.dk, call.splits, element)
        else:
            element = (unit - units_k) * UNIT + within
            if element < call.dv_elements:
                self.sum_up(call.dv_partial, call.dv_partial_stride_split, call.dv, call.splits, element)

    @cute.jit
    def sum_up(self, partial: cute.Pointer, stride: Int64, to: cute.Pointer, splits: Int32, element: Int64):
        """Write VECTOR sums of fp32, the first split's term first."""
        total = self.term(partial, element)
        for split in cutlass.range(1, splits, unroll=4):
            total = total + self.term(partial, split * stride + element)
        rX = cute.make_rmem_tensor(VECTOR, self.dtype)
        rX.store(total.to(self.dtype))
        cute.autovec_copy(rX, cute.make_tensor(to + cute.assume(element, divby=VECTOR), cute.make_layout(VECTOR)))

    @cute.jit
    def term(self, partial: cute.Pointer, element: Int64) -> cute.TensorSSA:
        """VECTOR elements of one split."""
        found = cute.make_rmem_tensor((HALF, 2), Float32)
        for half in cutlass.range_constexpr(2):
            there = partial + cute.assume(element + half * HALF, divby=HALF)
            cute.autovec_copy(cute.make_tensor(there, cute.make_layout(HALF)), found[None, half])
        return found.load()


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX (see `kernels.generate`)."""
    kernel = SplitSum(variant)
    vectors = ("dk_partial", "dv_partial")
    return compiled(kernel, BWD_SUM, variant, dump_dir, tile=kernel.units, vectors=vectors)
