"""Gradients of attention in fp64, and how far plain low-precision arithmetic is from them. NumPy, for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.reference import (
    Array,
    Reference,
    Scores,
    attention,
    by_head,
    by_token,
    distances,
    divide,
    exponentials,
    join,
    masked_logits,
    rounded,
)

FLOOR = 2.0**-20  # of the largest sum of a gradient's terms without their signs
_NO_LSE = np.zeros((1, 0, 0))


@dataclass(frozen=True)
class Gradients:
    """dq, dk, dv: shaped like q, k, v; dsink: (heads_q,); dalibi: (batch, heads_q), of slopes that are 0 if absent."""

    dq: Array
    dk: Array
    dv: Array
    dsink: Array
    dalibi: Array


@dataclass(frozen=True)
class BackwardReference:
    """What the backward's kernels are compared with. Joined ones (`join_backward`) lack the batch axis.

    All follows from the forward's output as it was rounded, so that only a kernel's arithmetic is judged. dq, dk, dv:
    for `yardstick`; no LSE is theirs. out (values of the dtype) and lse (fp32): what the forward hands over. dsink and
    dalibi: fp64, as in `Gradients`; *_size: what their errors are relative to, the sums of their terms without signs.
    """

    dq: Reference
    dk: Reference
    dv: Reference
    out: Array
    lse: Array
    dsink: Array
    dsink_size: Array
    dalibi: Array
    dalibi_size: Array


def gradients(q: Array, k: Array, v: Array, scores: Scores, dout: Array, dlse: Array | None = None) -> Gradients:
    """In fp64. q, k, v, scores as in `attention`; dout: like its output; dlse: (batch, heads_q, seqlen_q), or none.

    A row that sees no key gives and gets nothing, but that with a sink its LSE is the sink.
    """
    out, lse = attention(q, k, v, scores)
    return _backward(_in(np.float64, q, k, v, dout), scores, lse, row_sums(out, dout, dlse))[0]


def backward_reference(
    q: Array, k: Array, v: Array, dtype: str, scores: Scores, dout: Array, dlse: Array | None = None
) -> BackwardReference:
    """All that a check needs, for inputs that are already values of `dtype`. Shapes as in `gradients`."""
    out, lse = attention(q, k, v, scores)
    low = rounded(out, dtype)
    delta = row_sums(low, dout, dlse)
    right, size = _backward(_in(np.float64, q, k, v, dout), scores, lse, delta)
    singles = _in(np.float32, q, k, v, dout)
    only_p, _ = _backward(singles, scores, lse, delta, lambda x: rounded(x, dtype))
    plain = _plain(singles, dtype, scores, dlse)

    def of(name: str) -> Reference:
        floor = FLOOR * float(np.abs(getattr(size, name)).max(initial=0))
        model = rounded(getattr(only_p, name), dtype)
        return Reference(dtype, getattr(right, name), _NO_LSE, _NO_LSE, plain[name], model, floor)

    return BackwardReference(
        of("dq"), of("dk"), of("dv"), low, lse.astype(np.float32), right.dsink, size.dsink, right.dalibi, size.dalibi
    )


def join_backward(parts: Sequence[BackwardReference]) -> BackwardReference:
    """Batch entries end to end, as `join`: lse (heads_q, tokens); dalibi keeps its batch axis, dsink is the sum."""

    def of(name: str) -> list:
        return [getattr(part, name) for part in parts]

    return BackwardReference(
        join(of("dq")), join(of("dk")), join(of("dv")),
        np.concatenate([entry for out in of("out") for entry in out]),
        np.concatenate([entry for lse in of("lse") for entry in lse], axis=-1),
        np.sum(of("dsink"), 0), np.sum(of("dsink_size"), 0),
        np.concatenate(of("dalibi")), np.concatenate(of("dalibi_size")),
    )  # fmt: skip


def row_sums(out: Array, dout: Array, dlse: Array | None = None) -> Array:
    """delta in fp64, (batch, heads_q, seqlen_q): Σ out · dout over a row, less dlse."""
    sums = (out.astype(np.float64) * dout).sum(-1).swapaxes(1, 2)
    return sums if dlse is None else sums - dlse


def _in(kind: type, *arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(kind) for x in arrays)


def _backward(
    inputs: tuple[Array, ...], scores: Scores, lse: Array, delta: Array, step: Callable[[Array], Array] = lambda x: x
) -> tuple[Gradients, Gradients]:
    """(gradients, sums of their terms without signs) in the dtype of the inputs, q, k, v and dout.

    step: applied to P and dS before they are multiplied, as a kernel rounds them.
    """
    number = inputs[0].dtype.type
    heads, group = inputs[0].shape[2], inputs[0].shape[2] // inputs[1].shape[2]
    q, k, v, dout = (by_head(x, heads) for x in inputs)
    lse, delta = (x.astype(number)[..., None] for x in (lse, delta))
    logits = masked_logits(q @ k.swapaxes(-1, -2), scores, lambda x: x)
    with np.errstate(invalid="ignore"):
        p = np.where(np.isneginf(logits) | np.isneginf(lse), number(0), np.exp(logits - lse))
    dp = dout @ v.swapaxes(-1, -2)
    dscore, dscore_size = p * (dp - delta), p * (np.abs(dout) @ np.abs(v).swapaxes(-1, -2) + np.abs(delta))
    slope, slope_size = (np.full_like(dp, scores.scale) for _ in range(2))
    if scores.softcap:
        tanh = np.tanh(q @ k.swapaxes(-1, -2) * number(scores.scale / scores.softcap))
        slope, slope_size = slope * (1 - tanh * tanh), slope_size * (1 + tanh * tanh)
    distance = np.abs(distances(*p.shape[-2:])).astype(number)
    sink = np.full(heads, -np.inf) if scores.sink is None else scores.sink
    with np.errstate(invalid="ignore"):
        share = np.where(np.isneginf(lse), 0, np.exp(np.asarray(sink, number)[:, None, None] - lse))

    def of(p: Array, ds: Array, q: Array, k: Array, dout: Array, sinks: Array, biases: Array) -> Gradients:
        dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout
        dk, dv = over_group(dk, group), over_group(dv, group)
        return Gradients(by_token(ds @ k), dk, dv, sinks.sum((0, 2, 3)), biases.sum((-2, -1)))

    # A kernel rounds dS without the softmax scale.
    low = step(dscore * slope / number(scores.scale)) * number(scores.scale)
    signed = of(step(p), low, q, k, dout, -share * delta, -dscore * distance)
    unsigned = of(p, dscore_size * slope_size, abs(q), abs(k), abs(dout), abs(share * delta), dscore_size * distance)
    return signed, unsigned


def over_group(x: Array, group: int) -> Array:
    """(batch, heads, seqlen, dim) -> (batch, seqlen, heads / group, dim): the sum over each group of heads."""
    batch, heads, seqlen, dim = x.shape
    return by_token(x.reshape(batch, heads // group, group, seqlen, dim).sum(2))


def _plain(inputs: tuple[Array, ...], dtype: str, scores: Scores, dlse: Array | None) -> dict[str, Array]:
    """dq, dk, dv by name as PyTorch's own operations give them in the low precision: every result is rounded."""

    def low(x: Array) -> Array:
        return rounded(x, dtype)

    heads, group = inputs[0].shape[2], inputs[0].shape[2] // inputs[1].shape[2]
    q, k, v, dout = (by_head(x, heads) for x in inputs)
    products = low(q @ k.swapaxes(-1, -2))
    weights, total, _ = exponentials(masked_logits(products, scores, low), scores.sink)
    p = low(divide(weights, total))
    dp = low(dout @ v.swapaxes(-1, -2))
    ds = low(p * (dp - (p * dp).sum(-1, keepdims=True)))
    if dlse is not None:
        ds = low(ds + low(p * dlse.astype(np.float32)[..., None]))
    if scores.softcap:
        tanh = low(np.tanh(low(low(products * np.float32(scores.scale)) / np.float32(scores.softcap))))
        ds = low(ds * low(1 - tanh * tanh))
    ds = low(ds * np.float32(scores.scale))
    return {
        "dq": by_token(low(ds @ k)),
        "dk": low(over_group(low(ds.swapaxes(-1, -2) @ q), group)),
        "dv": low(over_group(low(p.swapaxes(-1, -2) @ dout), group)),
    }
