"""A call's arguments in the form by which plans are found: what equals a number counts as that number.

A key holds Fraction(1, 2) for 0.5 and True for 1, as Python's equality has it, while a tensor hashes as the object that
it is. So a call whose key is new has its numbers made plain here, is looked up again, and is checked in that form: what
is served does not depend on what was called before. What is no number is left for the checks, which name it.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

from runtime.call.request import PLAIN, SIDES, Hints, Options, Request

LOW = ("torch.float16", "torch.bfloat16")


def plain(request: Request) -> Request:
    """The same call in plain form; `request` itself where there is nothing to change.

    A tensor of one element is read, which synchronises if it is on a device, unless it is a hint.
    """
    tensors, options, hints = request.tensors, _options(request.options), Hints(*map(_hint, request.hints))
    sink = tensors.get("sink")
    if sink is not None and _converts(sink, next(iter(tensors.values()))):
        tensors = tensors | {"sink": sink.float()}
    if tensors is request.tensors and _same(options, request.options) and _same(hints, request.hints):
        return request
    return Request(request.op, tensors, options, hints)


def number(given: Any) -> Any:
    """The int or float that `given` equals, or `given`: also of a tensor with a gradient, which a number would lose."""
    if type(given) in PLAIN or getattr(given, "requires_grad", False):
        return given
    try:
        found = given.item() if hasattr(given, "item") else given
        if isinstance(found, Number) and found == found.real:  # type: ignore[attr-defined]
            real = found.real  # type: ignore[attr-defined]
            return int(real) if isinstance(real, int) else float(real)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # several elements, beyond floats, on meta
        pass
    return given


def integer(given: Any) -> Any:
    """The int that `given` equals, or `given`; None stays."""
    if type(given) in SIDES:
        return given
    found = number(given)
    return int(found) if type(found) in (bool, int) or (type(found) is float and found.is_integer()) else given


def flag(given: Any) -> Any:
    """True or False where `given` equals 1 or 0, else `given`; an int stays."""
    found = given if type(given) is int else number(given)
    return bool(found) if type(found) is float and found in (0, 1) else found


def _options(asked: Options) -> Options:
    window = asked.window
    if isinstance(window, (tuple, list)):
        sides = tuple(map(integer, window))
        window = window if type(window) is tuple and _same(sides, window) else sides
    return asked._replace(
        window=window,
        softmax_scale=number(asked.softmax_scale),
        softcap=number(asked.softcap),
        num_splits=integer(asked.num_splits),
        **{name: flag(getattr(asked, name)) for name in ("causal", "return_lse", "pack_gqa", "rotary_interleaved")},
    )


def _hint(given: Any) -> Any:
    """A hint is not worth a synchronisation: one that lies on a device says nothing."""
    return integer(given) if getattr(given, "is_cpu", True) else None


def _converts(sink: Any, first: Any) -> bool:
    """Whether a sink of 16 bits is not in the call's dtype: the kernels take that or fp32."""
    return str(getattr(sink, "dtype", None)) in LOW and sink.dtype != getattr(first, "dtype", None)


def _same(one: Any, other: Any) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))
