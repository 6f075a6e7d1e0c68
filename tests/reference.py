"""Attention in fp64 and the yardstick that says how far a low-precision kernel may be from it. NumPy, for the CPU.

The yardstick is that of FlashAttention's tests (no worse than twice plain low-precision attention, at the worst
element), made sharper: the root-mean-square error may be at most twice that of an fp32 softmax whose P alone is
rounded. The worst element by itself lets an unmasked padding key or a scale that is off by 0.5 % pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx import formats

Array = np.ndarray[Any, Any]
Window = tuple[int | None, int | None]  # keys to the left and right of the diagonal; None: no bound

FRACTION_BITS = {"bf16": 7, "fp16": 10}
_PACK = {"bf16": (formats.f32_to_bf16, formats.bf16_to_f32), "fp16": (formats.f32_to_f16, formats.f16_to_f32)}
LSE_TOLERANCE = 2e-5


def encode(values: Array, dtype: str) -> Array:
    """uint16 bits of `values` in 'bf16' or 'fp16', rounded to nearest even."""
    with np.errstate(over="ignore"):
        return _PACK[dtype][0](np.asarray(values, np.float32))


def decode(bits: Array, dtype: str) -> Array:
    """fp32 values of uint16 bits."""
    return _PACK[dtype][1](np.ascontiguousarray(bits))


def rounded(values: Array, dtype: str) -> Array:
    """fp32 values rounded to 'bf16' or 'fp16'."""
    return decode(encode(values, dtype), dtype)


def visible(seqlen_q: int, seqlen_k: int, window: Window = (None, None)) -> Array:
    """Which key each query sees, (seqlen_q, seqlen_k). The diagonal is aligned bottom-right; causal is right = 0."""
    left, right = window
    distance = np.arange(seqlen_k) - (np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


@dataclass(frozen=True)
class Reference:
    """What a kernel is compared with. out, plain, rounded_p: (batch, seqlen_q, heads_q, head_dim_v); lse: (batch,
    heads_q, seqlen_q), natural log.

    out: fp64, not rounded. plain: every step rounded to the low precision. rounded_p: fp32, only P and the output
    rounded.
    """

    dtype: str
    out: Array
    lse: Array
    plain: Array
    rounded_p: Array


def attention(q: Array, k: Array, v: Array, *, window: Window = (None, None), scale: float) -> tuple[Array, Array]:
    """(out, lse) in fp64. q: (batch, seqlen_q, heads_q, head_dim), k and v: (batch, seqlen_k, heads_kv, …).

    A row that sees no key gives 0 and −inf.
    """
    queries, keys, values = (_by_head(x.astype(np.float64), q.shape[2]) for x in (q, k, v))
    scores = _masked(queries @ keys.swapaxes(-1, -2) * scale, window)
    weights, total, highest = _exponentials(scores)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + highest)[..., 0]
    return _by_token(_divide(weights @ values, total)), lse


def reference(q: Array, k: Array, v: Array, dtype: str, *, window: Window = (None, None), scale: float) -> Reference:
    """All that `yardstick` needs, for inputs that are already values of `dtype`. Shapes as in `attention`."""
    out, lse = attention(q, k, v, window=window, scale=scale)
    queries, keys, values = (_by_head(x.astype(np.float32), q.shape[2]) for x in (q, k, v))
    exact = queries @ keys.swapaxes(-1, -2)

    low = _masked(rounded(rounded(exact, dtype) * np.float32(scale), dtype), window)
    weights, total, _ = _exponentials(low)
    plain = rounded(rounded(_divide(weights, total), dtype) @ values, dtype)

    weights, total, _ = _exponentials(_masked(exact * np.float32(scale), window))
    only_p = rounded(rounded(_divide(weights, total), dtype) @ values, dtype)
    return Reference(dtype, out, lse, _by_token(plain), _by_token(only_p))


def yardstick(out: Array, expected: Reference, lse: Array | None = None) -> list[str]:
    """Why `out` (values of the output dtype, fp32) and `lse` are not good enough; empty if they are.

    max|out − ref| ≤ 2·max|plain − ref| + 2 ulp(max|ref|), and RMS(out − ref) ≤ 2·RMS(rounded_p − ref), where ref is
    the fp64 result rounded to the output dtype; |Δlse| ≤ 2e-5·max(1, |lse|), and −inf only where it belongs.
    """
    problems = []
    ref = rounded(expected.out, expected.dtype).astype(np.float64)
    if not np.isfinite(out).all():
        problems.append(f"{np.count_nonzero(~np.isfinite(out))} of {out.size} outputs are not finite")
    elif out.size:
        error = out.astype(np.float64) - ref
        top = np.abs(ref).max()
        limit = 2 * np.abs(expected.plain - ref).max() + 2 * ulp(top, expected.dtype)
        if np.abs(error).max() > limit:
            problems.append(f"max|out - ref| = {np.abs(error).max():.3g} > {limit:.3g}")
        if rms(error) > (limit := 2 * rms(expected.rounded_p - ref)):
            problems.append(f"RMS(out - ref) = {rms(error):.3g} > {limit:.3g}")
    if lse is not None:
        problems += _lse_problems(lse.astype(np.float64), expected.lse)
    return problems


def _lse_problems(lse: Array, expected: Array) -> list[str]:
    empty = np.isneginf(expected)
    if (np.isneginf(lse) != empty).any():
        return ["lse is -inf where it should not be, or the other way round"]
    difference = np.abs(lse[~empty] - expected[~empty])
    allowed = LSE_TOLERANCE * np.maximum(1, np.abs(expected[~empty]))
    if (difference <= allowed).all():
        return []
    return [f"|lse - ref| = {np.nanmax(difference, initial=0):.3g}, NaN in {np.count_nonzero(np.isnan(lse))} rows"]


def ulp(value: float, dtype: str) -> float:
    """The distance between neighbours of `dtype` at `value`; 0 at 0."""
    return float(2.0 ** (np.floor(np.log2(value)) - FRACTION_BITS[dtype])) if value > 0 else 0.0


def rms(error: Array) -> float:
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))


def _by_head(x: Array, heads: int) -> Array:
    """(batch, seqlen, heads_kv, dim) -> (batch, heads, seqlen, dim): query head h reads key head h // group."""
    return np.repeat(x, heads // x.shape[2], axis=2).swapaxes(1, 2)


def _by_token(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(1, 2))


def _masked(scores: Array, window: Window) -> Array:
    return np.where(visible(scores.shape[-2], scores.shape[-1], window), scores, scores.dtype.type(-np.inf))


def _exponentials(scores: Array) -> tuple[Array, Array, Array]:
    """exp(scores − row maximum), its row sums and the row maximum (0 for an empty row)."""
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    highest = np.where(np.isneginf(highest), 0, highest).astype(scores.dtype)
    weights = np.exp(scores - highest)
    return weights, weights.sum(-1, keepdims=True), highest


def _divide(weights: Array, total: Array) -> Array:
    return weights / np.where(total == 0, 1, total).astype(weights.dtype)
