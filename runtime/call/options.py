"""The checks of a call's arguments that are no tensors; each refusal names the argument and what would be accepted."""

from __future__ import annotations

import numbers
import operator
from typing import Any

from registry.contract import WINDOW_OPEN
from runtime.call import checks
from runtime.call.splits import MAX_SPLITS
from runtime.errors import ArgumentError

MIN_SCALE, MAX_SCALE = 1e-30, 1e30  # finite in fp32, and positive: the kernels scale the row's largest score


def window_bounds(causal: Any, window: Any) -> tuple[int, int]:
    """(left, right) as the kernels take them. causal bounds the right side by 0."""
    if window is None:
        window = (None, None)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ArgumentError("window", f"{window!r:.100} is not (left, right) or None", reason="type")
    bounds = []
    for side in window:
        try:
            bound = WINDOW_OPEN if side is None else operator.index(side)
        except TypeError:
            bound = -1
        if bound < 0:
            message = f"{side!r:.50} is no bound: each is a number of tokens ≥ 0, or None for an open side"
            raise ArgumentError("window", message, reason="value")
        bounds.append(min(bound, WINDOW_OPEN))
    return bounds[0], 0 if causal else bounds[1]


def have_hash_of_value(window: Any, num_splits: Any) -> bool:
    """Whether both can be part of a key: a list or an array has no hash, and a tensor's is not of its value."""
    if not isinstance(num_splits, numbers.Integral):
        return False
    return window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window))


def scale(softmax_scale: Any, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, (int, float)) or not MIN_SCALE <= softmax_scale <= MAX_SCALE:
        message = f"{softmax_scale!r:.100} is not a number from {MIN_SCALE} to {MAX_SCALE}, or None for head_dim**-0.5"
        raise ArgumentError("softmax_scale", message, reason="value")
    return float(softmax_scale)


def softcap(given: Any, softmax_scale: float) -> float:
    """0 or positive; the kernels take softcap and softmax_scale / softcap, both in fp32."""
    if not isinstance(given, (int, float)) or not (given == 0 or MIN_SCALE <= given <= MAX_SCALE):
        message = f"{given!r:.100} is not a number from {MIN_SCALE} to {MAX_SCALE}, or 0 for none"
        raise ArgumentError("softcap", message, reason="value")
    if given and not MIN_SCALE <= softmax_scale / given <= MAX_SCALE:
        message = f"softmax_scale / softcap is {softmax_scale / given}, must be from {MIN_SCALE} to {MAX_SCALE}"
        raise ArgumentError("softcap", message, reason="value")
    return float(given)


def max_seqlen(name: str, given: Any, longest: int, typical: int) -> int:
    """A hint about the longest entry, cut to `longest`; `typical` if it is not given.

    A tensor is refused: reading one from a device would synchronise.
    """
    if given is None:
        return typical
    if not isinstance(given, numbers.Integral) or int(given) < 0:
        raise ArgumentError(name, f"{given!r:.100} is neither an integer ≥ 0 nor None", reason="value")
    return min(int(given), longest)


def num_splits(given: Any, has_seqused_q: bool) -> int:
    try:
        found = operator.index(given)
    except TypeError:
        found = -1
    if not 0 <= found <= MAX_SPLITS:
        message = f"{given!r:.50}, must be an integer from 1 to {MAX_SPLITS}, or 0 for our choice"
        raise ArgumentError("num_splits", message, reason="value")
    if has_seqused_q and found > 1:
        message = f"{found}, must be 0 or 1 with seqused_q: rows beyond it would hold no partial output"
        raise ArgumentError("num_splits", message, reason="unsupported")
    return 1 if has_seqused_q else found


def flag(name: str, given: Any) -> int:
    """1 or 0."""
    checks.check_flag(name, given)
    return int(given)
