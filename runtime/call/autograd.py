"""What torch's autograd sees of `flash_attn`. Imports torch, and so is imported where something first requires grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from runtime.call import backward, checks, memory
from runtime.call.arguments import Arguments, Call
from runtime.errors import ArgumentError

INPUTS = ("q", "k", "v", "sink", "alibi_slopes")  # those with gradients, as `Attention.apply` takes them


def apply(given: Arguments, call: Call, deterministic: Any, run: Callable[[], tuple[Any, Any]]) -> Any:
    """out, or (out, lse), with the backward behind them.

    given: tensors and return_lse of a call of which one requires grad. run: makes (out, lse). Raises ArgumentError
    where there are no gradients, and what flash_attn raises.
    """
    tensors, optional = given.tensors, given.optional or backward.NOTHING
    main = ("q", given.q), ("k", given.k), ("v", given.v)
    if given.is_cached:
        checks.check_no_grad([*main, ("out", given.out)], list(tensors.items()))
    if given.out is not None:
        message = "cannot be given where it or an input requires grad; leave it out, or call under torch.no_grad()"
        raise ArgumentError("out", message, reason="requires_grad")
    memory.check_storage(*main)
    checks.check_tangents(forward_ad, *main, *tensors.items())
    inputs = given.q, given.k, given.v, tensors["sink"], tensors["alibi_slopes"]
    return Attention.apply(*inputs, call, optional, bool(deterministic), bool(given.return_lse), run)


class Attention(torch.autograd.Function):
    """Keeps q, k, v, the optional tensors, out and lse."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        q, k, v, _, _, call, optional, deterministic, return_lse, run = given
        out, lse = run()  # grad mode is off here
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *optional)
        ctx.call, ctx.deterministic = call, deterministic
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        nothing = (None,) * 5  # for the arguments that are no tensors
        if dout is None and dlse is None:
            return (*(None for _ in INPUTS), *nothing)
        needs = backward.Needs(*ctx.needs_input_grad[: len(INPUTS)])
        deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
        saved = backward.Saved(*ctx.saved_tensors)
        return (*backward.gradients(ctx.call, saved, dout, dlse, needs, deterministic), *nothing)
