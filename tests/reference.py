"""Attention in fp64 and the yardstick that says how far a low-precision kernel may be from it. NumPy, for the CPU.

The yardstick is that of FlashAttention's tests (no worse than twice plain low-precision attention, at the worst
element), made sharper: the root-mean-square error may be at most twice that of an fp32 softmax whose P alone is
rounded. The worst element by itself lets an unmasked padding key or a scale that is off by 0.5 % pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx import formats

Array = np.ndarray[Any, Any]
Window = tuple[int | None, int | None]  # keys to the left and right of the diagonal; None: no bound

FRACTION_BITS = {"bf16": 7, "fp16": 10}
_PACK = {
    "bf16": (formats.f32_to_bf16, formats.bf16_to_f32),
    "fp16": (formats.f32_to_f16, formats.f16_to_f32),
    "e4m3": (formats.f32_to_e4m3, formats.e4m3_to_f32),
    "fp32": (lambda values: values.view(np.uint32), lambda bits: bits.view(np.float32)),
}
LSE_TOLERANCE = 2e-5


def encode(values: Array, dtype: str) -> Array:
    """Bits of `values` in 'bf16', 'fp16' (uint16), 'e4m3' (uint8, saturated) or 'fp32', rounded to nearest even."""
    with np.errstate(over="ignore"):
        return _PACK[dtype][0](np.asarray(values, np.float32))


def decode(bits: Array, dtype: str) -> Array:
    """fp32 values of such bits."""
    return _PACK[dtype][1](np.ascontiguousarray(bits))


def rounded(values: Array, dtype: str) -> Array:
    """fp32 values rounded to a dtype that `encode` knows."""
    return decode(encode(values, dtype), dtype)


def distances(seqlen_q: int, seqlen_k: int) -> Array:
    """How far right of the diagonal, aligned bottom-right, a key lies: (seqlen_q, seqlen_k)."""
    return np.arange(seqlen_k) - (np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)


def visible(seqlen_q: int, seqlen_k: int, window: Window = (None, None)) -> Array:
    """Which key each query sees, (seqlen_q, seqlen_k). The diagonal is aligned bottom-right; causal is right = 0."""
    left, right = window
    distance = distances(seqlen_q, seqlen_k)
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


@dataclass(frozen=True, eq=False)
class Scores:
    """What becomes of q·k: scaled, capped, biased, masked, in this order.

    softcap > 0: softcap · tanh(scale · q·k / softcap). alibi: slopes, (heads_q,) or (batch, heads_q); the bias is
    −slope · |i + seqlen_k − seqlen_q − j|. sink: (heads_q,), a further logit in each row's softmax, with no value.
    leftpad: the first keys of each entry that nobody sees; positions count them.
    """

    scale: float
    window: Window = (None, None)
    softcap: float = 0.0
    alibi: Array | None = None
    sink: Array | None = None
    leftpad: int = 0


@dataclass(frozen=True)
class Reference:
    """What a kernel is compared with. out, plain, rounded_p: (batch, seqlen_q, heads_q, head_dim_v); lse: (batch,
    heads_q, seqlen_q), natural log. Joined ones (`join`) lack the batch axis.

    out: fp64, not rounded. plain: every step rounded to the low precision. rounded_p: fp32, only P and the output
    rounded. lse_size: like lse, what its error is relative to: at least 1, |lse|, and the mean |ALiBi bias| under the
    softmax's weights, which scores may cancel but for rounding. floor: an error that any fp32 arithmetic may have,
    because terms cancel.
    """

    dtype: str
    out: Array
    lse: Array
    lse_size: Array
    plain: Array
    rounded_p: Array
    floor: float = 0.0


def attention(q: Array, k: Array, v: Array, scores: Scores) -> tuple[Array, Array]:
    """(out, lse) in fp64. q: (batch, seqlen_q, heads_q, head_dim), k and v: (batch, seqlen_k, heads_kv, …).

    A row that sees no key gives 0 and −inf, or with a sink 0 and the sink.
    """
    queries, keys, values = (by_head(x.astype(np.float64), q.shape[2]) for x in (q, k, v))
    logits = masked_logits(queries @ keys.swapaxes(-1, -2), scores, lambda x: x)
    weights, total, highest = exponentials(logits, scores.sink)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + highest)[..., 0]
    return by_token(divide(weights @ values, total)), lse


def reference(q: Array, k: Array, v: Array, dtype: str, scores: Scores) -> Reference:
    """All that `yardstick` needs, for inputs that are already values of `dtype`. Shapes as in `attention`."""
    out, lse = attention(q, k, v, scores)
    queries, keys, values = (by_head(x.astype(np.float32), q.shape[2]) for x in (q, k, v))
    exact = queries @ keys.swapaxes(-1, -2)

    low = masked_logits(rounded(exact, dtype), scores, lambda x: rounded(x, dtype))
    weights, total, _ = exponentials(low, scores.sink)
    plain = rounded(rounded(divide(weights, total), dtype) @ values, dtype)

    weights, total, _ = exponentials(masked_logits(exact, scores, lambda x: x), scores.sink)
    shares = divide(weights, total)
    only_p = rounded(rounded(shares, dtype) @ values, dtype)
    bias = (shares * np.abs(alibi_bias(shares, scores))).sum(-1)
    lse_size = np.maximum(1, np.maximum(np.abs(lse), bias))
    return Reference(dtype, out, lse, lse_size, by_token(plain), by_token(only_p))


def join(parts: Sequence[Reference]) -> Reference:
    """Batch entries of any lengths end to end: out (tokens, heads_q, head_dim_v) and so on, lse (heads_q, tokens)."""
    out, plain, rounded_p = (
        np.concatenate([entry for part in parts for entry in getattr(part, name)])
        for name in ("out", "plain", "rounded_p")
    )
    lse, lse_size = (
        np.concatenate([entry for part in parts for entry in getattr(part, name)], axis=-1)
        for name in ("lse", "lse_size")
    )
    return Reference(parts[0].dtype, out, lse, lse_size, plain, rounded_p, max(part.floor for part in parts))


def gather(pages: Array, table: Array, length: int, first: int = 0) -> Array:
    """(length − first, heads, dim): an entry's tokens from the first on. pages: (pages, page_size, heads, dim); table:
    its row of page numbers, of which no more is looked at than the tokens need."""
    token = np.arange(first, length)
    return pages[table[token // pages.shape[1]], token % pages.shape[1]]


def combine(outs: Array, lses: Array) -> tuple[Array, Array]:
    """(out, lse) in fp64 of softmaxes over parts of the keys. outs: (splits, …, dim), each normalised; lses: (splits,
    …). A part without keys has LSE −inf and counts nothing; without any the result is 0 and −inf."""
    highest = lses.astype(np.float64).max(0)
    weights = np.exp(lses - np.where(np.isneginf(highest), 0, highest))
    total = weights.sum(0)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(np.isneginf(highest), 0, highest)
    return (weights[..., None] * outs).sum(0) / np.where(total == 0, 1, total)[..., None], lse


def rotate(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> tuple[Array, Array]:
    """(x with rotary embedding in fp64, what its rounding errors are relative to). x: (seqlen, heads, dim).

    cos, sin: (rows, rotary_dim / 2), of which `positions` (seqlen,) choose rows; those behind the end take the last.
    Element j of the first rotary_dim goes with j + rotary_dim / 2 or, interleaved, 2j with 2j + 1; the others stay.
    """
    half = cos.shape[1]
    rows = np.clip(positions, 0, len(cos) - 1)
    c, s = (table.astype(np.float64)[rows, None] for table in (cos, sin))
    first = slice(0, 2 * half, 2) if interleaved else slice(half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first].astype(np.float64), x[..., second].astype(np.float64)
    out, size = x.astype(np.float64), np.zeros(x.shape)
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    size[..., first], size[..., second] = np.abs(a * c) + np.abs(b * s), np.abs(a * s) + np.abs(b * c)
    return out, size


def misrounded(got: Array, exact: Array, size: Array, dtype: str, error: float = 2.0**-21) -> int:
    """How many of `got` (values of `dtype`) are no rounding of anything within error·size of `exact`."""
    low, high = (rounded(exact + sign * error * size, dtype) for sign in (-1, 1))
    return int(np.count_nonzero(~((low <= got) & (got <= high))))


def yardstick(out: Array, expected: Reference, lse: Array | None = None, rms_rows: int = 0) -> list[str]:
    """Why `out` (values of the output dtype, fp32) and `lse` are not good enough; empty if they are.

    max|out − ref| ≤ 2·max|plain − ref| + 2 ulp(max|ref|), and RMS(out − ref) ≤ 2·RMS(rounded_p − ref), where ref is
    the fp64 result rounded to the output dtype, and `floor` is granted besides; |Δlse| ≤ 2e-5·lse_size, and −inf only
    where it belongs.
    rms_rows: judge the RMS only over at least this many rows of softmax.
    """
    problems = []
    ref = rounded(expected.out, expected.dtype).astype(np.float64)
    if not np.isfinite(out).all():
        problems.append(f"{np.count_nonzero(~np.isfinite(out))} of {out.size} outputs are not finite")
    elif out.size:
        error = out.astype(np.float64) - ref
        top = np.abs(ref).max()
        limit = 2 * np.abs(expected.plain - ref).max() + 2 * ulp(top, expected.dtype) + expected.floor
        if np.abs(error).max() > limit:
            problems.append(f"max|out - ref| = {np.abs(error).max():.3g} > {limit:.3g}")
        limit = 2 * rms(expected.rounded_p - ref) + expected.floor
        if out.size >= rms_rows * out.shape[-1] and rms(error) > limit:
            problems.append(f"RMS(out - ref) = {rms(error):.3g} > {limit:.3g}")
    if lse is not None:
        problems += _lse_problems(lse.astype(np.float64), expected)
    return problems


def _lse_problems(lse: Array, expected: Reference) -> list[str]:
    empty = np.isneginf(expected.lse)
    if (np.isneginf(lse) != empty).any():
        return ["lse is -inf where it should not be, or the other way round"]
    difference = np.abs(lse[~empty] - expected.lse[~empty])
    if (difference <= LSE_TOLERANCE * expected.lse_size[~empty]).all():
        return []
    return [f"|lse - ref| = {np.nanmax(difference, initial=0):.3g}, NaN in {np.count_nonzero(np.isnan(lse))} rows"]


def ulp(value: float, dtype: str) -> float:
    """The distance between neighbours of `dtype` at `value`; 0 at 0."""
    return float(2.0 ** (np.floor(np.log2(value)) - FRACTION_BITS[dtype])) if value > 0 else 0.0


def rms(error: Array) -> float:
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))


# ---- steps that the backward shares ----------------------------------------------------------------------------------
def by_head(x: Array, heads: int) -> Array:
    """(batch, seqlen, heads_kv, dim) -> (batch, heads, seqlen, dim): query head h reads key head h // group."""
    return np.repeat(x, heads // x.shape[2], axis=2).swapaxes(1, 2)


def by_token(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(1, 2))


def masked_logits(products: Array, scores: Scores, step: Callable[[Array], Array]) -> Array:
    """q·k, (batch, heads, seqlen_q, seqlen_k), made into what the softmax takes; `step` is applied to each result."""
    number = products.dtype.type
    seqlen_q, seqlen_k = products.shape[-2:]
    logits = step(products * number(scores.scale))
    if scores.softcap:
        logits = step(np.tanh(logits / number(scores.softcap)) * number(scores.softcap))
    if scores.alibi is not None:
        logits = step(logits + alibi_bias(products, scores))
    seen = visible(seqlen_q, seqlen_k, scores.window) & (np.arange(seqlen_k) >= scores.leftpad)
    return np.where(seen, logits, number(-np.inf))


def alibi_bias(products: Array, scores: Scores) -> Array:
    """ALiBi's, which broadcasts to the shape of q·k and has its dtype; 0 without slopes."""
    slopes = np.zeros(1) if scores.alibi is None else np.asarray(scores.alibi)
    size = np.abs(distances(*products.shape[-2:]))
    return -slopes.astype(products.dtype)[..., None, None] * size.astype(products.dtype)


def exponentials(logits: Array, sink: Array | None) -> tuple[Array, Array, Array]:
    """exp(logits − highest), row sums with the sink's, and highest: a row's largest logit or sink (0 if neither)."""
    extra = np.full((1, 1, 1), -np.inf) if sink is None else np.asarray(sink)[:, None, None]
    extra = extra.astype(logits.dtype)
    highest = np.maximum(logits.max(-1, keepdims=True, initial=-np.inf), extra)
    highest = np.where(np.isneginf(highest), 0, highest).astype(logits.dtype)
    weights = np.exp(logits - highest)
    return weights, weights.sum(-1, keepdims=True) + np.exp(extra - highest), highest


def divide(weights: Array, total: Array) -> Array:
    return weights / np.where(total == 0, 1, total).astype(weights.dtype)
