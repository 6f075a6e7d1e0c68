"""What torch's autograd sees of a call. Imports torch, and so is imported where something first requires grad.

A call without gradients is recorded all the same: a backward that comes to it is told so, instead of missing a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from registry import ops
from runtime.call import backward, tensors
from runtime.call.plan import Plan, execute
from runtime.call.request import Call
from runtime.errors import ArgumentError

# Op.backward -> the function that computes the gradients: of a call's saved tensors, {name: gradient}.
GRADIENTS: dict[str, Callable[..., dict[str, Any]]] = {"bwd": backward.gradients}


class Recorded(NamedTuple):
    """What the calls of one plan leave to their backward, beside their tensors. names: of what is saved. gradients:
    None for an op without."""

    call: Call
    names: tuple[str, ...]
    return_lse: bool
    deterministic: bool
    gradients: Callable[..., dict[str, Any]] | None


def recorded(call: Call, given: Mapping[str, Any], return_lse: bool, deterministic: bool) -> Recorded:
    """For calls like this one, with these tensors by name. Raises ArgumentError if `out` is one of them."""
    if "out" in given:
        message = "cannot be given where it or an input requires grad; leave it out, or call under torch.no_grad()"
        raise ArgumentError("out", message, reason="requires_grad")
    return Recorded(call, (*given, "out", "lse"), return_lse, deterministic, GRADIENTS.get(ops.get(call.op).backward))


def apply(kept: Recorded, plan: Plan, given: Mapping[str, Any]) -> Any:
    """(out, lse), with the backward behind them; lse None if it is not wanted.

    given: the call's tensors by name, of which one requires grad. Raises what flash_attn raises.
    """
    if plan.forward_ad._current_level >= 0:
        tensors.check_tangents(plan.forward_ad, given.items())
    try:
        found = (Attention if kept.gradients else WithoutGradient).apply(kept, plan, *given.values())
    except RuntimeError:  # torch has other words for torch.func's wrappers
        tensors.check_storage(*given.items())
        raise
    return found if kept.return_lse else (found, None)


class Attention(torch.autograd.Function):
    """Keeps all tensors of the call, out and lse."""

    @staticmethod
    def forward(ctx: Any, kept: Recorded, plan: Plan, *given: Any) -> Any:
        # grad mode is off here
        out, lse = execute(plan, dict(zip(kept.call.given, given, strict=True)), return_lse=True, zeros=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, out, lse)
        ctx.kept = kept
        return (out, lse) if kept.return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        # The decorator takes several µs, and changes nothing unless autograd records the backward (create_graph).
        return (_once_differentiable if torch.is_grad_enabled() else _gradients)(ctx, dout, dlse)


class WithoutGradient(torch.autograd.Function):
    """A call of an op that has no backward. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, kept: Recorded, plan: Plan, *given: Any) -> Any:
        ctx.op, ctx.names = kept.call.op, kept.call.given
        out, lse = execute(plan, dict(zip(ctx.names, given, strict=True)), return_lse=True, zeros=True)
        return (out, lse) if kept.return_lse else out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        wanting = zip(ctx.names, ctx.needs_input_grad[-len(ctx.names) :], strict=True)
        name = next(name for name, needed in wanting if needed)
        message = f"requires grad, and gradients are not implemented {ops.get(ctx.op).no_gradient}; call under "
        raise ArgumentError(name, message + "torch.no_grad() or .detach() it", reason="requires_grad")


def _gradients(ctx: Any, dout: Any, dlse: Any) -> Any:
    """One for each argument of `Attention.forward`."""
    kept, needed = ctx.kept, ctx.needs_input_grad
    if dout is None and dlse is None:
        return (None,) * len(needed)
    call = kept.call
    needs = _needs(call.op, call.given, needed)
    saved = dict(zip(kept.names, ctx.saved_tensors, strict=True))
    deterministic = kept.deterministic or torch.are_deterministic_algorithms_enabled()
    found = kept.gradients(call, saved, dout, dlse, needs, deterministic)
    return (None, None, *map(found.get, call.given))


_once_differentiable = once_differentiable(_gradients)


@lru_cache(maxsize=256)
def _needs(op: str, given: tuple[str, ...], needed: tuple[bool, ...]) -> frozenset[str]:
    """Names of the tensors whose gradients are wanted. needed: by torch, of the arguments of `Attention.forward`."""
    known, of_tensors = tensors.described(op), needed[len(needed) - len(given) :]
    wanted = zip(given, of_tensors, strict=True)
    return frozenset(name for name, is_needed in wanted if is_needed and known[name].differentiable)
