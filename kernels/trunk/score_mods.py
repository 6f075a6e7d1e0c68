"""What may change raw scores before softmax, with derivatives: softcap, ALiBi, the mask, in this order.

| mod | score | gradient of a score | gradient of its own |
|---|---|---|---|
| softcap | `cap` | `uncap` | |
| ALiBi | `add_distance`, `add_distance_transposed` | unchanged | `slope_gradient` |
| mask | `mask.apply`, `mask.apply_transposed` | P is 0 | |

`apply` is the forward's, queries along the rows, `differentiate` the backward's, keys along the rows. All mods but the
mask are asked for at run time. A raw score s stands for the power of two s · scale_log2; `registry.ops.attention` says
what that factor holds.
"""

from types import SimpleNamespace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kernels.trunk import mask
from kernels.trunk.mma import rows_columns
from kernels.trunk.scalars import LOG2E, element
from kernels.trunk.tile_coord import row_of, token_head


@cute.jit
def apply(call: SimpleNamespace, acc_S: cute.Tensor, at: Any, masked: cutlass.Constexpr):
    """Change the scores of a key block. at: where they lie, with `rows()`, the tile's rows, `coordinates()` of the
    scores and `first_key()` (`kernels.trunk.forward.Scores`): asked anew by each mod, so that no register holds them.
    """
    if call.softcap_scale != 0.0:
        cap(acc_S, call.softcap_scale)
    if call.alibi_slopes.toint() != 0:
        add_alibi(call, acc_S, at)
    if cutlass.const_expr(masked):
        rows = at.rows()
        tScS = at.coordinates()
        keys_left = rows.seqlen_k - at.n_start
        diagonal = diagonals(rows, tScS, at.n_start)
        first_key = at.first_key()
        mask.apply(acc_S, tScS, diagonal, keys_left, call.window_left, call.window_right, first_key)


@cute.jit
def differentiate(
    call: SimpleNamespace, acc_S: cute.Tensor, acc_dP: cute.Tensor, at: Any, masked: cutlass.Boolean,
    lse: cute.Tensor, slope_sum: cute.Tensor,
):  # fmt: skip
    """Change the scores of a tile of keys, the gradients dP − delta with them, and add ALiBi's own to slope_sum.

    at: with `coordinates` of the scores, `diagonal`, the row of column 0's, `keys_left`, the first row behind the keys,
    and `slope()`, the head's in raw scores a token.
    """
    if call.softcap_scale != 0.0:
        cap(acc_S, call.softcap_scale)
    if call.dalibi.toint() != 0:
        slope_sum[0] = slope_sum[0] + slope_gradient(call, acc_S, acc_dP, at, lse)
    if call.softcap_scale != 0.0:
        uncap(acc_S, acc_dP)
    if call.alibi_slopes.toint() != 0:
        add_distance_transposed(acc_S, at)
    if masked:
        left, right = call.window_left, call.window_right
        mask.apply_transposed(acc_S, at.coordinates, at.diagonal, at.keys_left, left, right)


@cute.jit
def diagonals(rows: SimpleNamespace, tScS: cute.Tensor, n_start: Int32) -> cute.Tensor:
    """The column of each row's diagonal, relative to the key block that begins at n_start."""
    columns = cute.make_rmem_tensor(cute.size(rows_columns(tScS), mode=[0]), Int32)
    for r in cutlass.range_constexpr(cute.size(columns)):
        token, _ = token_head(rows, rows.start + row_of(tScS, r))
        columns[r] = token + rows.offset - n_start
    return columns


# ---- softcap ----


@cute.jit
def cap(acc_S: cute.Tensor, softcap_scale: Float32):
    """s becomes tanh(softmax_scale · s / softcap), by exp2 and a reciprocal: tanh.approx would cost 2⁻¹¹ of softcap.

    tanh(x) = 1 − 2 / (1 + e²ˣ); softcap_scale · s is 2x · log2(e). An infinite exponential gives 1, as it should.
    """
    scores = rows_columns(acc_S)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            grown = cute.math.exp2(scores[r, c] * softcap_scale, fastmath=True)
            scores[r, c] = 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + grown)


@cute.jit
def uncap(acc_S: cute.Tensor, acc_dP: cute.Tensor):
    """dP ∘ (1 − S²), where S = tanh(·) is a capped score (`cap`)."""
    scores, values = rows_columns(acc_S), rows_columns(acc_dP)
    for c in cutlass.range_constexpr(cute.size(values, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(values, mode=[0])):
            values[r, c] = values[r, c] * (1.0 - scores[r, c] * scores[r, c])


# ---- ALiBi ----


@cute.jit
def add_alibi(call: SimpleNamespace, acc_S: cute.Tensor, at: Any):
    rows = at.rows()
    tScS = at.coordinates()
    # The ABI bounds the sum to 31 bits; with 64 here, the tile of 128 x 32 would spill in its loops.
    start = call.alibi_slopes + (rows.batch_idx * call.alibi_stride_b + rows.head)
    slopes = cute.make_rmem_tensor(cute.size(rows_columns(tScS), mode=[0]), Float32)
    for r in cutlass.range_constexpr(cute.size(slopes)):
        _, head = token_head(rows, rows.start + row_of(tScS, r))
        slopes[r] = element(start, head) * (LOG2E / call.scale_log2)
    add_distance(acc_S, tScS, slopes, diagonals(rows, tScS, at.n_start))


@cute.jit
def add_distance(acc_S: cute.Tensor, tScS: cute.Tensor, slopes: cute.Tensor, diagonals: cute.Tensor):
    """s −= slope · |distance from the diagonal| (ALiBi, Press et al. 2022, in FlashAttention 2's two-sided form).

    slopes, diagonals: of each row of this thread, in raw scores a token and in columns of this block.
    """
    scores, coordinate = rows_columns(acc_S), rows_columns(tScS)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            distance = Float32(diagonals[r] - coordinate[0, c][1])
            scores[r, c] = scores[r, c] - slopes[r] * cute.arch.fmax(distance, -distance)


@cute.jit
def add_distance_transposed(acc_S: cute.Tensor, at: Any):
    """`add_distance` where keys lie along the rows."""
    slope = at.slope()
    scores, coordinate = rows_columns(acc_S), rows_columns(at.coordinates)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            scores[r, c] = scores[r, c] - slope * distance_transposed(coordinate, r, c, at.diagonal)


@cute.jit
def distance_transposed(
    coordinate: cute.Tensor, r: cutlass.Constexpr, c: cutlass.Constexpr, diagonal: Int32
) -> Float32:
    apart = Float32(coordinate[r, 0][0] - coordinate[0, c][1] - diagonal)
    return cute.arch.fmax(apart, -apart)


@cute.jit
def slope_gradient(
    call: SimpleNamespace, acc_S: cute.Tensor, acc_dP: cute.Tensor, at: Any, lse: cute.Tensor
) -> Float32:
    """This thread's part of −Σ P ∘ (dP − delta) ∘ |distance|, of scores that no slope or mask has changed yet."""
    slope, left, right = at.slope(), call.window_left, call.window_right
    scores, values, coordinate = rows_columns(acc_S), rows_columns(acc_dP), rows_columns(at.coordinates)
    total = Float32(0.0)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            apart = distance_transposed(coordinate, r, c, at.diagonal)
            score = (scores[r, c] - slope * apart) * call.scale_log2
            hidden = mask.is_hidden(coordinate, r, c, at.diagonal, at.keys_left, left, right)
            weight = cute.math.exp2((-Float32.inf if hidden else score) - lse[c], fastmath=True)
            total = total - weight * values[r, c] * apart
    return total
