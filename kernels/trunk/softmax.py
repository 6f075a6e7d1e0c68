"""Online softmax over blocks of scores, in base 2 and fp32 (Milakov & Gimelshein 2018; FlashAttention 2)."""

import cutlass
import cutlass.cute as cute

from kernels.trunk.mma import rows_columns
from kernels.trunk.scalars import LN2

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

    row_max holds raw scores, the same in the four lanes of a row; it may stay behind the true maximum, and acc_O alone,
    while no score of the warp has grown by RESCALE_LOG2. Each lane sees to its own scores: the exchange of maxima, too,
    is left out then. row_sum is this thread's part of the sum only, added over the quad at the end.
    masked: acc_S may hold −inf, and a row none of whose scores is visible yet keeps row_max = −inf.
    """
    scores = rows_columns(acc_S)
    rows = cute.size(row_max)
    grown = cute.make_rmem_tensor(rows, cutlass.Float32)
    behind = cutlass.Boolean(False)
    for r in cutlass.range_constexpr(rows):
        block_max = scores[r, None].load().reduce(cute.ReductionOp.MAX, -cutlass.Float32.inf, 0)
        grown[r] = cute.arch.fmax(row_max[r], block_max)
        behind = behind | ((grown[r] - row_max[r]) * scale_log2 > RESCALE_LOG2)
    if cute.arch.vote_any_sync(behind):
        rescale(acc_O, row_max, row_sum, grown, scale_log2, masked)
    for r in cutlass.range_constexpr(rows):
        shift = reference_point(row_max[r], masked) * scale_log2
        weights = cute.math.exp2(scores[r, None].load() * scale_log2 - shift, fastmath=True)
        row_sum[r] = weights.reduce(cute.ReductionOp.ADD, row_sum[r], 0)
        scores[r, None] = weights


@cute.jit
def rescale(
    acc_O: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    grown: cute.Tensor,
    scale_log2: cutlass.Float32,
    masked: cutlass.Constexpr,
):
    """Move row_max up to the quad's maximum of `grown` and scale row_sum and acc_O down to match."""
    out = rows_columns(acc_O)
    for r in cutlass.range_constexpr(cute.size(row_max)):
        highest = quad_max(grown[r])
        factor = cute.math.exp2((row_max[r] - reference_point(highest, masked)) * scale_log2, fastmath=True)
        row_max[r] = highest
        row_sum[r] = row_sum[r] * factor
        out[r, None] = out[r, None].load() * factor


@cute.jit
def reference_point(row_max: cutlass.Float32, masked: cutlass.Constexpr) -> cutlass.Float32:
    """What exponents are taken relative to: the row's maximum, or 0 while it is −inf, since −inf − (−inf) is NaN."""
    point = row_max
    if cutlass.const_expr(masked):
        point = cutlass.Float32(0.0) if row_max == -cutlass.Float32.inf else row_max
    return point


@cute.jit
def finish(
    acc_O: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    scale_log2: cutlass.Float32,
    sinks: cute.Tensor,
):
    """Divide acc_O by the row sums and leave the LSE (natural log, fp32) in row_sum. Empty rows: 0 and −inf.

    sinks: a logit of each row, in log2, that takes weight but has no value; −inf: none.
    """
    out = rows_columns(acc_O)
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        highest = row_max[r] * scale_log2
        top = cute.arch.fmax(highest, sinks[r])
        empty = top == -cutlass.Float32.inf
        base = cutlass.Float32(0.0) if empty else top
        shrink = cute.math.exp2(highest - base, fastmath=True)
        total = quad_sum(row_sum[r]) * shrink + cute.math.exp2(sinks[r] - base, fastmath=True)
        out[r, None] = out[r, None].load() * (cutlass.Float32(0.0) if empty else shrink * cute.arch.rcp_approx(total))
        lse = (top + cute.math.log2(total, fastmath=True)) * LN2
        row_sum[r] = -cutlass.Float32.inf if empty else lse
