"""dq_accum: what blocks add to it, and in which order where it matters. `registry.ops.workspaces` has its layout."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from kernels.trunk.scalars import reread_tid
from kernels.trunk.workspaces import STRIP, UNIT


@dsl_user_op
def red_add(
    pointer: cute.Pointer, values: list, *, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None
):
    """Add four floats to 16 bytes of global memory."""
    operands = [pointer.toint().ir_value(loc=loc, ip=ip), *(value.ir_value(loc=loc, ip=ip) for value in values)]
    text = "red.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
    llvm.inline_asm(None, operands, text, "l,f,f,f,f", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def load_acquire(
    pointer: cute.Pointer, *, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None
) -> Int32:
    operands, text = [pointer.toint().ir_value(loc=loc, ip=ip)], "ld.acquire.gpu.global.s32 $0, [$1];"
    return Int32(llvm.inline_asm(T.i32(), operands, text, "=r,l", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def count_release(pointer: cute.Pointer, *, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None):
    operands, text = [pointer.toint().ir_value(loc=loc, ip=ip)], "red.release.gpu.global.add.s32 [$0], 1;"
    llvm.inline_asm(None, operands, text, "l", has_side_effects=True, loc=loc, ip=ip)


@cute.jit
def add_tile(
    mma: cute.TiledMma, tid: Int32, acc: cute.Tensor, tile_m: cutlass.Constexpr, head_dim: cutlass.Constexpr,
    dq_accum: cute.Pointer, row: Int64,
):  # fmt: skip
    """Add an accumulator (tile_m, head_dim) to the rows of dq_accum from `row` on, 4 elements a lane at once."""
    tCcC = mma.get_slice(tid).partition_C(cute.make_identity_tensor((tile_m, head_dim)))
    across = head_dim // 8  # units of a strip
    first = tCcC[0][0] // STRIP * across + tCcC[0][1] // 8
    start = dq_accum + (row * head_dim + first * UNIT + tid % 32 * 4)
    for i in cutlass.range_constexpr(cute.size(acc, mode=[1])):
        for j in cutlass.range_constexpr(cute.size(acc, mode=[2])):
            down, right = (tCcC[0, i, j][axis] - tCcC[0][axis] for axis in (0, 1))
            unit = down // STRIP * across + right // 8
            red_add(start + unit * UNIT, [acc[e, i, j] for e in range(4)])


@cute.jit
def take_turn(semaphores: cute.Pointer, number: Int32, turn: Int32, pending: cute.Pointer):
    """Wait until `turn` blocks have added to the tile of a semaphore, whose number is put down in `pending`.

    All those blocks must have been launched before this one: they have lower numbers.
    """
    if reread_tid() == 0:
        done = load_acquire(semaphores + number)
        while done < turn:
            done = load_acquire(semaphores + number)
        cute.make_tensor(pending, cute.make_layout(1))[0] = number
    cute.arch.barrier()


@cute.jit
def end_turn(semaphores: cute.Pointer, pending: cute.Pointer):
    """Let the next block add to the tile whose number is `pending` (-1: none). All threads must have fenced their
    additions, with a barrier behind the fences."""
    if reread_tid() == 0:
        number = cute.make_tensor(pending, cute.make_layout(1))[0]
        if number >= 0:
            count_release(semaphores + number)
