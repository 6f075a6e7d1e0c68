"""What a thread does with single values: parameters by name, an element behind a pointer, division, notes."""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, Uint64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from registry.contract.abi import Abi

DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16, "fp32": cutlass.Float32}
VECTOR = 8  # elements of a 16-byte access at two bytes each
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def named(parameters: tuple, abi: Abi) -> SimpleNamespace:
    """The kernel's parameters by their names in the ABI."""
    return SimpleNamespace(**{p.name: value for p, value in zip(abi.params, parameters, strict=True)})


@dsl_user_op
def reread_tid(*, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None) -> Int32:
    """The thread's number, read anew: nothing that is computed from it was kept in registers until here."""
    text, out = "mov.u32 $0, %tid.x;", "=r"
    return Int32(llvm.inline_asm(T.i32(), [], text, out, has_side_effects=True, loc=loc, ip=ip))


@cute.jit
def fast_div(number: Int32, magic: Int64, shift: Int32) -> Int32:
    """number // pack for a number ≥ 0; unsigned 32-bit factors, so that one instruction multiplies them.

    magic is below 2**32 (`registry.contract.fast_divmod`), the product below 2**63.
    """
    return Int32(Uint64(Uint32(number)) * Uint64(Uint32(magic)) >> Uint64(shift))


@cute.jit
def element(pointer: cute.Pointer, index: Int32):
    return cute.make_tensor(pointer + index, cute.make_layout(1))[0]


def aligned(pointer: cute.Pointer, offset: Int64) -> cute.Pointer:
    return pointer + cute.assume(offset, divby=VECTOR)


@cute.jit
def note(notes: cute.Tensor, tid: Int32, *values: Int32):
    """Put down what is needed again after the loops, so that no register holds it meanwhile."""
    if tid == 0:
        for i in cutlass.range_constexpr(len(values)):
            notes[i] = values[i]
