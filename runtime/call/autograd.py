"""What torch's autograd sees of a call. Imports torch, and so is imported where something first requires grad.

A call without gradients is recorded all the same: a backward that comes to it is told so, instead of missing a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from registry import ops
from runtime.call import backward, tensors
from runtime.call.request import Call
from runtime.errors import ArgumentError

# Op.backward -> the function that computes the gradients: of a call's saved tensors, {name: gradient}.
GRADIENTS: dict[str, Callable[..., dict[str, Any]]] = {"bwd": backward.gradients}
Run = Callable[[Mapping[str, Any]], tuple[Any, Any]]


def apply(call: Call, given: Mapping[str, Any], return_lse: Any, deterministic: Any, run: Run) -> Any:
    """(out, lse), with the backward behind them; lse None if it is not wanted.

    given: the call's tensors by name, of which one requires grad. run: makes (out, lse) of them. Raises what flash_attn
    raises.
    """
    if "out" in given:
        message = "cannot be given where it or an input requires grad; leave it out, or call under torch.no_grad()"
        raise ArgumentError("out", message, reason="requires_grad")
    tensors.check_storage(*given.items())
    tensors.check_tangents(forward_ad, given.items())
    names = tuple(given)
    if not ops.get(call.op).backward:
        out, lse = WithoutGradient.apply(call.op, names, run, *given.values())
        return out, lse if return_lse else None
    found = Attention.apply(call, names, bool(deterministic), bool(return_lse), run, *given.values())
    return found if return_lse else (found, None)


class Attention(torch.autograd.Function):
    """Keeps all tensors of the call, out and lse."""

    @staticmethod
    def forward(ctx: Any, call: Call, names: tuple[str, ...], deterministic: bool, return_lse: bool, run: Run,
                *given: Any) -> Any:  # fmt: skip
        out, lse = run(dict(zip(names, given, strict=True)))  # grad mode is off here
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, out, lse)
        ctx.call, ctx.names, ctx.deterministic = call, names, deterministic
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        first = len(ctx.needs_input_grad) - len(ctx.names)  # of the tensors among the arguments
        nothing = (None,) * first
        if dout is None and dlse is None:
            return (*nothing, *(None for _ in ctx.names))
        known = tensors.described(ctx.call.op)
        wanted = zip(ctx.names, ctx.needs_input_grad[first:], strict=True)
        needs = frozenset(name for name, needed in wanted if needed and known[name].differentiable)
        saved = dict(zip((*ctx.names, "out", "lse"), ctx.saved_tensors, strict=True))
        deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
        gradients = GRADIENTS[ops.get(ctx.call.op).backward]
        found = gradients(ctx.call, saved, dout, dlse, needs, deterministic)
        return (*nothing, *(found.get(name) for name in ctx.names))


class WithoutGradient(torch.autograd.Function):
    """A call of an op that has no backward. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, op: str, names: tuple[str, ...], run: Run, *given: Any) -> Any:
        ctx.op, ctx.names = op, names
        return run(dict(zip(names, given, strict=True)))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        wanting = zip(ctx.names, ctx.needs_input_grad[-len(ctx.names) :], strict=True)
        name = next(name for name, needed in wanting if needed)
        message = f"requires grad, and gradients are not implemented {ops.get(ctx.op).no_gradient}; call under "
        raise ArgumentError(name, message + "torch.no_grad() or .detach() it", reason="requires_grad")
