"""What may change raw scores before softmax: softcap and ALiBi. Both are asked for at run time.

A raw score s stands for the power of two s · scale_log2; `registry.ops.attention` says what that factor holds.
"""

import cutlass
import cutlass.cute as cute

from kernels.trunk.mma import rows_columns


@cute.jit
def cap(acc_S: cute.Tensor, softcap_scale: cutlass.Float32):
    """s becomes tanh(softmax_scale · s / softcap), by exp2 and a reciprocal: tanh.approx would cost 2⁻¹¹ of softcap.

    tanh(x) = 1 − 2 / (1 + e²ˣ); softcap_scale · s is 2x · log2(e). An infinite exponential gives 1, as it should.
    """
    scores = rows_columns(acc_S)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            grown = cute.math.exp2(scores[r, c] * softcap_scale, fastmath=True)
            scores[r, c] = 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + grown)


@cute.jit
def add_distance(acc_S: cute.Tensor, tScS: cute.Tensor, slopes: cute.Tensor, diagonals: cute.Tensor):
    """s −= slope · |distance from the diagonal| (ALiBi, Press et al. 2022, in FlashAttention 2's two-sided form).

    slopes, diagonals: of each row of this thread, in raw scores a token and in columns of this block.
    """
    scores, coordinate = rows_columns(acc_S), rows_columns(tScS)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            distance = cutlass.Float32(diagonals[r] - coordinate[0, c][1])
            scores[r, c] = scores[r, c] - slopes[r] * cute.arch.fmax(distance, -distance)
