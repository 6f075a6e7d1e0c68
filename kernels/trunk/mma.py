"""Warp-level matrix products (mma.sync m16n8k16) over tiles in shared memory and registers."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import warp


def tiled_mma(dtype: type[cutlass.Numeric], warps: int, across: int = 1) -> cute.TiledMma:
    """Warps stacked along the rows: each owns 16 of every 16·warps rows, and B fragments come in pairs (n = 16).

    across: warps side by side, too. Their columns then interleave, 8 at a time.
    """
    op = warp.MmaF16BF16Op(dtype, cutlass.Float32, (16, 8, 16))
    return cute.make_tiled_mma(op, (warps, across, 1), permutation_mnk=(16 * warps, 16 * across, 16))


def ldmatrix(dtype: type[cutlass.Numeric], transpose: bool = False) -> cute.CopyAtom:
    return cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4), dtype)


def rows_columns(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2), M, N) as (row, column) of this thread: row = (half, M), column = (pair, N)."""
    full = cute.make_layout(acc.layout.shape)
    view = cute.make_layout(
        ((full.shape[0][1], full.shape[1]), (full.shape[0][0], full.shape[2])),
        stride=((full.stride[0][1], full.stride[1]), (full.stride[0][0], full.stride[2])),
    )
    return cute.make_tensor(acc.iterator, cute.composition(acc.layout, view))


def as_a_operand(rP: cute.Tensor) -> cute.Tensor:
    """View a converted accumulator as the A operand of the next product: two n = 8 columns make one k = 16 step."""
    layout = cute.logical_divide(rP.layout, (None, None, 2))
    view = cute.make_layout(
        ((layout.shape[0], layout.shape[2][0]), layout.shape[1], layout.shape[2][1]),
        stride=((layout.stride[0], layout.stride[2][0]), layout.stride[1], layout.stride[2][1]),
    )
    return cute.make_tensor(rP.iterator, view)


@cute.jit
def load_a(
    mma: cute.TiledMma, tid: cutlass.Int32, sA: cute.Tensor, dtype: cutlass.Constexpr, steps: cutlass.Constexpr
) -> cute.Tensor:
    """An operand in registers for A (m, k), of which the first `steps` steps of 16 columns are loaded."""
    copy_a = cute.make_tiled_copy_A(ldmatrix(dtype), mma).get_slice(tid)
    thread = mma.get_slice(tid)
    rA = thread.make_fragment_A(thread.partition_A(sA))
    tAsA, rA_view = copy_a.partition_S(sA), copy_a.retile(rA)
    for k in cutlass.range_constexpr(steps):
        cute.copy(copy_a, tAsA[None, None, k], rA_view[None, None, k])
    return rA


@cute.jit
def gemm_ss(
    mma: cute.TiledMma,
    tid: cutlass.Int32,
    acc: cute.Tensor,
    rA: cute.Tensor,
    sA: cute.Tensor,
    sB: cute.Tensor,
    dtype: cutlass.Constexpr,
    steps: cutlass.Constexpr,
    loaded: cutlass.Constexpr,
):
    """acc += A·Bᵀ over a range of 16-column steps of A (m, k) and B (n, k), both in shared memory.

    rA: the first `loaded` steps of A are in it already (`load_a`).
    """
    copy_a = cute.make_tiled_copy_A(ldmatrix(dtype), mma).get_slice(tid)
    copy_b = cute.make_tiled_copy_B(ldmatrix(dtype), mma).get_slice(tid)
    thread = mma.get_slice(tid)
    rB = thread.make_fragment_B(thread.partition_B(sB))
    tAsA, tBsB = copy_a.partition_S(sA), copy_b.partition_S(sB)
    rA_view, rB_view = copy_a.retile(rA), copy_b.retile(rB)
    for k in cutlass.range_constexpr(steps.start, steps.stop):
        if cutlass.const_expr(k >= loaded):
            cute.copy(copy_a, tAsA[None, None, k], rA_view[None, None, k])
        cute.copy(copy_b, tBsB[None, None, k], rB_view[None, None, k])
        cute.gemm(mma, acc, rA[None, None, k], rB[None, None, k], acc)


@cute.jit
def gemm_rs(
    mma: cute.TiledMma,
    tid: cutlass.Int32,
    acc: cute.Tensor,
    rA: cute.Tensor,
    sB: cute.Tensor,
    dtype: cutlass.Constexpr,
):
    """acc += A·B with A in registers (`as_a_operand`) and B (k, n) in shared memory, n contiguous."""
    sBt = transposed(sB)
    copy_b = cute.make_tiled_copy_B(ldmatrix(dtype, transpose=True), mma).get_slice(tid)
    thread = mma.get_slice(tid)
    rB = thread.make_fragment_B(thread.partition_B(sBt))
    tBsB, rB_view = copy_b.partition_S(sBt), copy_b.retile(rB)
    for k in cutlass.range_constexpr(cute.size(rA, mode=[2])):
        cute.copy(copy_b, tBsB[None, None, k], rB_view[None, None, k])
        cute.gemm(mma, acc, rA[None, None, k], rB[None, None, k], acc)


def transposed(sX: cute.Tensor) -> cute.Tensor:
    """(columns, rows) of a tile (rows, columns) in shared memory."""
    rows, columns = cute.size(sX, mode=[0]), cute.size(sX, mode=[1])
    return cute.composition(sX, cute.make_layout((columns, rows), stride=(rows, 1)))


@cute.jit
def gemm_st(
    mma: cute.TiledMma,
    tid: cutlass.Int32,
    acc: cute.Tensor,
    sA: cute.Tensor,
    sB: cute.Tensor,
    dtype: cutlass.Constexpr,
    a_transposed: cutlass.Constexpr,
):
    """acc += A·B, both in shared memory: B (k, n) with n contiguous, A (m, k), or (k, m) if it is transposed."""
    if cutlass.const_expr(a_transposed):
        sA = transposed(sA)
    sBt = transposed(sB)
    copy_a = cute.make_tiled_copy_A(ldmatrix(dtype, transpose=a_transposed), mma).get_slice(tid)
    copy_b = cute.make_tiled_copy_B(ldmatrix(dtype, transpose=True), mma).get_slice(tid)
    thread = mma.get_slice(tid)
    rA, rB = thread.make_fragment_A(thread.partition_A(sA)), thread.make_fragment_B(thread.partition_B(sBt))
    tAsA, tBsB = copy_a.partition_S(sA), copy_b.partition_S(sBt)
    rA_view, rB_view = copy_a.retile(rA), copy_b.retile(rB)
    for k in cutlass.range_constexpr(cute.size(rB, mode=[2])):
        cute.copy(copy_a, tAsA[None, None, k], rA_view[None, None, k])
        cute.copy(copy_b, tBsB[None, None, k], rB_view[None, None, k])
        cute.gemm(mma, acc, rA[None, None, k], rB[None, None, k], acc)
