"""Online softmax over blocks of scores, in base 2 and fp32 (Milakov & Gimelshein 2018; FlashAttention 2)."""

import cutlass
import cutlass.cute as cute

from kernels.mma import rows_columns

LN2 = 0.6931471805599453
# Rescale only when a row's maximum grows by more than this (log2): P stays below 2**8, exact enough in fp32 and finite
# in fp16, and most blocks skip the multiplication of the whole output accumulator (FlashAttention 4's observation).
RESCALE_LOG2 = 8.0


@cute.jit
def quad_max(value: cutlass.Float32) -> cutlass.Float32:
    """The maximum over the four lanes that share an accumulator row."""
    value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=2))
    return cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=1))


@cute.jit
def quad_sum(value: cutlass.Float32) -> cutlass.Float32:
    value = value + cute.arch.shuffle_sync_bfly(value, offset=2)
    return value + cute.arch.shuffle_sync_bfly(value, offset=1)


@cute.jit
def update(
    acc_S: cute.Tensor,
    acc_O: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    scale_log2: cutlass.Float32,
    masked: cutlass.Constexpr,
):
    """Turn raw scores in acc_S into P = 2**(scale_log2 · (S − row_max)), and carry row_max, row_sum and acc_O along.

    row_max holds raw scores; row_sum is this thread's part of the sum only, added over the quad at the end.
    masked: acc_S may hold −inf, and a row none of whose scores is visible yet keeps row_max = −inf.
    """
    scores, out = rows_columns(acc_S), rows_columns(acc_O)
    rows = cute.size(row_max)
    grown = cute.make_rmem_tensor(rows, cutlass.Float32)
    rescale = cutlass.Boolean(False)
    for r in cutlass.range_constexpr(rows):
        block_max = scores[r, None].load().reduce(cute.ReductionOp.MAX, -cutlass.Float32.inf, 0)
        grown[r] = cute.arch.fmax(row_max[r], quad_max(block_max))
        rescale = rescale | ((grown[r] - row_max[r]) * scale_log2 > RESCALE_LOG2)
    if cute.arch.vote_any_sync(rescale):
        for r in cutlass.range_constexpr(rows):
            # −inf − (−inf) is NaN: a row that is still empty has nothing to rescale.
            step = (row_max[r] - grown[r]) * scale_log2
            if cutlass.const_expr(masked):
                step = cutlass.Float32(0.0) if grown[r] == -cutlass.Float32.inf else step
            factor = cute.math.exp2(step, fastmath=True)
            row_max[r] = grown[r]
            row_sum[r] = row_sum[r] * factor
            out[r, None] = out[r, None].load() * factor
    for r in cutlass.range_constexpr(rows):
        shift = row_max[r] * scale_log2
        if cutlass.const_expr(masked):
            shift = cutlass.Float32(0.0) if row_max[r] == -cutlass.Float32.inf else shift
        weights = cute.math.exp2(scores[r, None].load() * scale_log2 - shift, fastmath=True)
        row_sum[r] = weights.reduce(cute.ReductionOp.ADD, row_sum[r], 0)
        scores[r, None] = weights


@cute.jit
def finish(acc_O: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor, scale_log2: cutlass.Float32):
    """Divide acc_O by the row sums and leave the LSE (natural log, fp32) in row_sum. Empty rows: 0 and −inf."""
    out = rows_columns(acc_O)
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        total = quad_sum(row_sum[r])
        empty = row_max[r] == -cutlass.Float32.inf
        out[r, None] = out[r, None].load() * (cutlass.Float32(0.0) if empty else cute.arch.rcp_approx(total))
        lse = (row_max[r] * scale_log2 + cute.math.log2(total, fastmath=True)) * LN2
        row_sum[r] = -cutlass.Float32.inf if empty else lse
