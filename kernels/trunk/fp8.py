"""Products with an e4m3 operand: two-byte units from shared memory, widened to fp16 in registers.

Whatever the query's dtype, the products are fp16's: one instruction makes two fp16 of two e4m3, exactly, and none makes
bf16. `load_a` brings bf16 queries into fp16's range by a power of two.

ldmatrix moves units of two bytes, so a register holds four e4m3 where an fp16 operand has two elements. For K the four
are neighbours along head_dim: Q's columns are taken in the same order. For V they are two columns of two keys: even and
odd columns of the output get accumulators of their own (`column`).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Uint16, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from kernels.trunk.mma import ldmatrix
from kernels.trunk.mma import load_a as ldmatrix_a


@dsl_user_op
def widen(
    packed: Uint32, upper: bool, *, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None
) -> Uint32:
    """Two fp16 from the two e4m3 in a register's lower or upper half."""
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, %s; }"
    value, text = packed.ir_value(loc=loc, ip=ip), text % ("high" if upper else "low")
    return Uint32(llvm.inline_asm(T.i32(), [value], text, "=r,r", has_side_effects=False, loc=loc, ip=ip))


@dsl_user_op
def narrow(
    low: Float32, high: Float32, *, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None
) -> Uint16:
    """Two e4m3 in one unit: the nearest, ties to even; ±448 for what is larger."""
    values = [value.ir_value(loc=loc, ip=ip) for value in (high, low)]
    text = "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, $1, $2; mov.b32 $0, {pair, pair}; }"
    both = llvm.inline_asm(T.i32(), values, text, "=r,f,f", has_side_effects=False, loc=loc, ip=ip)
    return Uint16(Uint32(both))


@dsl_user_op
def even_odd(packed: Uint32, *, loc: ir.Location | None = None, ip: ir.InsertionPoint | None = None) -> Uint32:
    """Bytes 0, 2, 1, 3 of a register."""
    value = packed.ir_value(loc=loc, ip=ip)
    text = "prmt.b32 $0, $1, 0, 0x3120;"
    return Uint32(llvm.inline_asm(T.i32(), [value], text, "=r,r", has_side_effects=False, loc=loc, ip=ip))


@cute.jit
def load_a(mma: cute.TiledMma, tid: Int32, sA: cute.Tensor, steps: cutlass.Constexpr) -> tuple[cute.Tensor, Float32]:
    """(A (m, k) in fp16 registers, what to multiply products with): columns in the order in which `gemm_ss` meets B's.

    A lane has columns 2c, 2c + 1, 2c + 8 and 2c + 9 of a step of 16; here they stand for 4c … 4c + 3.
    """
    thread = mma.get_slice(tid)
    rA = cute.make_rmem_tensor(thread.partition_shape_A((cute.size(sA, mode=[0]), cute.size(sA, mode=[1]))), Float16)
    tAcA = thread.partition_A(cute.make_identity_tensor((cute.size(sA, mode=[0]), cute.size(sA, mode=[1]))))
    factor = Float32(1.0)
    if cutlass.const_expr(sA.element_type is cutlass.BFloat16):
        factor = shrinking(tAcA, sA, steps)
    for k in cutlass.range_constexpr(steps):
        for m in cutlass.range_constexpr(cute.size(rA, mode=[1])):
            for half in cutlass.range_constexpr(2):
                row, column = tAcA[((0, half, 0), m, k)]
                first = 16 * k + 2 * (column - 16 * k)
                for i in cutlass.range_constexpr(4):
                    rA[((i % 2, half, i // 2), m, k)] = (Float32(sA[row, first + i]) * factor).to(Float16)
    # Once more through shared memory: ldmatrix leaves each step in registers that an mma takes as they are.
    cute.arch.sync_warp()  # a warp's rows are its own
    sA = cute.make_tensor(cute.recast_ptr(sA.iterator, dtype=Float16), sA.layout)
    cute.autovec_copy(rA, thread.partition_A(sA))
    cute.arch.sync_warp()
    return ldmatrix_a(mma, tid, sA, Float16, steps), 1.0 / factor


@cute.jit
def shrinking(tAcA: cute.Tensor, sA: cute.Tensor, steps: cutlass.Constexpr) -> Float32:
    """The power of two, 1 at most, that brings all of a warp's A below 2**15."""
    largest = Uint32(0)  # the bits of its magnitude: as numbers, they are in the same order
    for k in cutlass.range_constexpr(steps):
        for m in cutlass.range_constexpr(cute.size(tAcA, mode=[1])):
            for half in cutlass.range_constexpr(2):
                row, column = tAcA[((0, half, 0), m, k)]
                for i in cutlass.range_constexpr(4):
                    bits = Float32(sA[row, 16 * k + 2 * (column - 16 * k) + i]).bitcast(Uint32)
                    largest = cutlass.max(largest, bits & 0x7FFFFFFF)
    for bit in cutlass.range_constexpr(5):
        largest = cutlass.max(largest, Uint32(cute.arch.shuffle_sync_bfly(largest, offset=1 << bit)))
    above = cutlass.max(Int32(largest >> 23) - (127 + 14), 0)  # the exponent, less 14
    return Uint32((127 - above) << 23).bitcast(Float32)


@cute.jit
def gemm_ss(mma: cute.TiledMma, tid: Int32, acc: cute.Tensor, rA: cute.Tensor, sB: cute.Tensor):
    """acc += A·Bᵀ with A in registers (`load_a`) and B (n, k) of e4m3; sB in units of two bytes, as fp16."""
    copy_b = cute.make_tiled_copy_B(ldmatrix(Float16), mma).get_slice(tid)
    thread = mma.get_slice(tid)
    rB = thread.make_fragment_B(thread.partition_B(sB))
    tBsB, rB_view = copy_b.partition_S(sB), copy_b.retile(rB)
    units = cute.recast_tensor(rB, Uint32)
    columns = cute.size(rB, mode=[1])
    wide = cute.make_rmem_tensor(cute.make_layout(((2, 2), columns)), Float16)
    wide_units = cute.recast_tensor(wide, Uint32)
    for k in cutlass.range_constexpr(cute.size(rB, mode=[2])):
        cute.copy(copy_b, tBsB[None, None, k], rB_view[None, None, k])
        for half in cutlass.range_constexpr(2):
            for n in cutlass.range_constexpr(columns):
                packed = units[((0, half), n, k)]
                wide_units[((0, 0), n)] = widen(packed, False)
                wide_units[((0, 1), n)] = widen(packed, True)
            cute.gemm(mma, acc, rA[None, None, 2 * k + half], wide, acc)


@cute.jit
def gemm_rs(mma: cute.TiledMma, tid: Int32, acc: cute.Tensor, rA: cute.Tensor, sB: cute.Tensor):
    """acc += A·B with A in registers and B (k, n) of e4m3, n contiguous; sB in units of two bytes, as fp16.

    acc's columns are in the order of `column`.
    """
    columns, depth = cute.size(sB, mode=[1]), cute.size(sB, mode=[0])
    sBt = cute.composition(sB, cute.make_layout((columns, depth), stride=(depth, 1)))
    copy_b = cute.make_tiled_copy_B(ldmatrix(Float16, transpose=True), mma).get_slice(tid)
    thread = mma.get_slice(tid)
    rB = thread.make_fragment_B(thread.partition_B(sBt))
    tBsB, rB_view = copy_b.partition_S(sBt), copy_b.retile(rB)
    units = cute.recast_tensor(rB, Uint32)
    narrow_columns = cute.size(rB, mode=[1])
    wide = cute.make_rmem_tensor(cute.make_layout(((2, 2), 2 * narrow_columns)), Float16)
    wide_units = cute.recast_tensor(wide, Uint32)
    for k in cutlass.range_constexpr(cute.size(rA, mode=[2])):
        cute.copy(copy_b, tBsB[None, None, k], rB_view[None, None, k])
        for n in cutlass.range_constexpr(narrow_columns):
            for half in cutlass.range_constexpr(2):
                sorted_bytes = even_odd(units[((0, half), n, k)])
                wide_units[((0, half), 2 * n)] = widen(sorted_bytes, False)
                wide_units[((0, half), 2 * n + 1)] = widen(sorted_bytes, True)
        cute.gemm(mma, acc, rA[None, None, k], wide, acc)


def column(first: Int32, c: int) -> Int32:
    """Which column of B the c-th column of this thread's accumulator is (`gemm_rs`). first: that of an ordinary 0-th.

    Ordinary ones are first = 2·lane % 8, first + 1, then 8 further on. Here the even and the odd columns of a 16-column
    group have a tile each: lane c of four has 4c, 4c + 2 in the one, 4c + 1, 4c + 3 in the other.
    """
    tile, pair = divmod(c, 2)
    return 2 * first + (16 * (tile // 2) + tile % 2 + 2 * pair)
