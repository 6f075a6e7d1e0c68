"""From scores and dP to P and dS, element by element. Tiles are transposed: keys along rows, queries along columns.

Raw scores s stand for powers of two s · scale_log2, as in `kernels.scores`. `lse` and `delta` hold a value of each of
this thread's columns; lse is in base 2 and +inf where there is no query.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kernels.trunk import mask
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


@cute.jit
def uncap(acc_S: cute.Tensor, acc_dP: cute.Tensor):
    """dP ∘ (1 − S²), where S = tanh(·) is a capped score (`scores.cap`)."""
    scores, values = rows_columns(acc_S), rows_columns(acc_dP)
    for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            values[r, c] = values[r, c] * (1.0 - scores[r, c] * scores[r, c])


@cute.jit
def add_distance(acc_S: cute.Tensor, tScS: cute.Tensor, slope: Float32, diagonal: Int32):
    """s −= slope · |distance from the diagonal| (`scores.add_distance`). diagonal: the row of the first column's."""
    scores, coordinate = rows_columns(acc_S), rows_columns(tScS)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            scores[r, c] = scores[r, c] - slope * distance(coordinate, r, c, diagonal)


@cute.jit
def distance(coordinate: cute.Tensor, r: cutlass.Constexpr, c: cutlass.Constexpr, diagonal: Int32) -> Float32:
    apart = Float32(coordinate[r, 0][0] - coordinate[0, c][1] - diagonal)
    return cute.arch.fmax(apart, -apart)


@cute.jit
def slope_gradient(
    acc_S: cute.Tensor, acc_dP: cute.Tensor, tScS: cute.Tensor, lse: cute.Tensor, scale_log2: Float32, slope: Float32,
    diagonal: Int32, keys_left: Int32, left: Int32, right: Int32,
) -> Float32:  # fmt: skip
    """This thread's part of −Σ P ∘ (dP − delta) ∘ |distance|, of scores that no slope or mask has changed yet."""
    scores, values, coordinate = rows_columns(acc_S), rows_columns(acc_dP), rows_columns(tScS)
    total = Float32(0.0)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            apart = distance(coordinate, r, c, diagonal)
            score = (scores[r, c] - slope * apart) * scale_log2
            seen = -Float32.inf if mask.is_hidden(coordinate, r, c, diagonal, keys_left, left, right) else score
            weight = cute.math.exp2(seen - lse[c], fastmath=True)
            total = total - weight * values[r, c] * apart
    return total
