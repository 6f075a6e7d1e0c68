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
                from runtime.call import autograd  # here: it imports torch

                again = partial(execute, plan, return_lse=True, zeros=True)
                return autograd.apply(plan.call, given, return_lse, deterministic, again)
    return execute(plan, given, return_lse, zeros)
