"""From scores and dP to P and dS, element by element. Tiles are transposed: keys along rows, queries along columns.

Raw scores s stand for powers of two s · scale_log2, as in `kernels.trunk.score_mods`. `lse` and `delta` hold a value of
each of this thread's columns; lse is in base 2 and +inf where there is no query.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from kernels.trunk.mma import rows_columns


@cute.jit
def subtract(acc_dP: cute.Tensor, delta: cute.Tensor):
    """dP − delta."""
    values = rows_columns(acc_dP)
    for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            values[r, c] = values[r, c] - delta[c]


@cute.jit
def weigh(acc_S: cute.Tensor, acc_dP: cute.Tensor, lse: cute.Tensor, scale_log2: Float32):
    """P = 2**(scale_log2 · S − lse) in acc_S, and dS = P ∘ (dP − delta) in acc_dP."""
    scores, values = rows_columns(acc_S), rows_columns(acc_dP)
    for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            weight = cute.math.exp2(scores[r, c] * scale_log2 - lse[c], fastmath=True)
            scores[r, c] = weight
            values[r, c] = values[r, c] * weight
