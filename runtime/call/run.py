"""From a kept plan and a call's tensors to its results, through autograd where something requires grad."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from runtime.call.plan import Plan, execute


def run(plan: Plan, given: Mapping[str, Any], return_lse: Any, deterministic: Any = False, zeros: Any = False) -> Any:
    """(out, lse) of a call with these tensors, lse None if it is not wanted; through autograd where one requires grad.

    zeros: rows of new outputs that no sequence owns are zeros. They always are where autograd records: the next
    layer's weight gradient reads them.
    """
    if plan.grad_enabled():
        for tensor in given.values():
            if tensor.requires_grad:
                flags = bool(return_lse), bool(deterministic)
                return (plan.recorded.get(flags) or _record(plan, given, flags))(plan, given)
    return execute(plan, given, return_lse, zeros)


def _record(plan: Plan, given: Mapping[str, Any], flags: tuple[bool, bool]) -> Any:
    """The call through autograd, kept by its plan. Raises ArgumentError where an op has no gradients."""
    from runtime.call import autograd  # here: it imports torch

    made = plan.recorded[flags] = partial(autograd.apply, autograd.recorded(plan.call, given, *flags))
    return made
