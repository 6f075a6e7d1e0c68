"""`flash_attn_combine`: the outputs of parts of the keys made into one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from runtime.call import checks, launch, memory, params, planning
from runtime.call.arguments import check_flag
from runtime.call.splits import MAX_SPLITS
from runtime.errors import ArgumentError
from runtime.load import session

if TYPE_CHECKING:
    import torch

PARTIAL = {5: "(splits, batch, seqlen, heads, head_dim_v)", 4: "(splits, tokens, heads, head_dim_v)"}
LSE = {4: "(splits, batch, seqlen, heads)", 3: "(splits, tokens, heads)"}


class _Ready:
    """What a call needs once its key is known."""

    __slots__ = ("forward_ad", "grad_enabled", "new_lse", "new_out", "plan", "spans", "written")
    forward_ad: Any
    grad_enabled: Any
    new_lse: Any
    new_out: Any
    plan: launch.Plan | None  # None: there is nothing to write
    spans: tuple[int, int, int]  # bytes from the first to past the last element of out_partial, lse_partial and out
    written: Any


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = True,
) -> Any:
    """Attention over all keys from attention over parts of them: Σ exp(lse_i − lse) · out_i, lse = log Σ exp(lse_i).

    out_partial: (splits, batch, seqlen, heads, head_dim_v) or (splits, tokens, heads, head_dim_v), fp32, 1 to 256
        splits, head_dim_v a multiple of 8 up to 256; contiguous but for its first stride; 16-byte aligned.
    lse_partial: the same without head_dim_v, fp32, natural log, any strides. A part that saw no key has -inf, and its
        output, even NaN, does not count.
    out: written and returned in place of a new contiguous tensor; (batch, seqlen, heads, head_dim_v) or (tokens, …),
        of out_dtype, the last dimension contiguous, other strides multiples of 16 bytes, memory of its own.
    out_dtype: fp32, bf16 or fp16; None is out's, or fp32.
    return_lse: True or False (or 1 or 0): also return the LSE, (batch, seqlen, heads) or (tokens, heads), fp32; in
        memory seqlen is its last dimension, as in other functions' LSE.

    Runs on torch's current stream, without synchronising. Not differentiable. Returns (out, lse), or out. Raises what
    flash_attn raises.
    """
    key: Any = None
    try:
        key = ("combine", out_partial.shape, lse_partial.shape, out_partial.stride(), lse_partial.stride(),
               out_partial.dtype, lse_partial.dtype, out_partial.is_cuda, out_partial.get_device(),
               lse_partial.get_device(), out_dtype, return_lse)  # fmt: skip
        if out is not None:
            key = (key, out.shape, out.stride(), out.dtype, out.get_device())
        ready = launch.plans.by_call[key]
    except Exception:  # as in flash_attn
        ready = None
    if ready is None:
        ready = _prepare(key, out_partial, lse_partial, out, out_dtype, return_lse)
    if ready.grad_enabled() and (
        out_partial.requires_grad or lse_partial.requires_grad or (out is not None and out.requires_grad)
    ):
        raise checks.wants_grad("out_partial, lse_partial, out", "for flash_attn_combine")
    if ready.forward_ad._current_level >= 0:
        named = ("out_partial", out_partial), ("lse_partial", lse_partial), ("out", out)
        checks.check_tangents(ready.forward_ad, *named)
    given, plan = out, ready.plan
    if out is None:
        out = ready.new_out()
    lse = ready.new_lse() if return_lse else None
    if plan is not None:
        pp, lp, op = _addresses(ready, out_partial, lse_partial, out, given is not None)
        if given is not None:
            ready.written(out)
        plan.pack(pp, lp, op, 0 if lse is None else lse.data_ptr())
        launch.launch_all((plan,))
    return out if lse is None else (out, lse.transpose(-1, -2))


def _addresses(ready: _Ready, out_partial: Any, lse_partial: Any, out: Any, is_given: bool) -> tuple[int, int, int]:
    """Of the three, after the checks that the key leaves open."""
    try:
        pp, lp, op = out_partial.data_ptr(), lse_partial.data_ptr(), out.data_ptr()
    except RuntimeError:  # of torch.func's wrappers
        pp = lp = op = 0
    if not (pp and lp and op):
        memory.check_storage(("out_partial", out_partial), ("lse_partial", lse_partial), ("out", out))
    memory.check_alignment(memory.ALIGNMENT, ("out_partial", pp), ("out", op))
    memory.check_alignment(4, ("lse_partial", lp))
    if is_given:
        of_partial, of_lse, of_out = ready.spans
        for name, start, nbytes in (("out_partial", pp, of_partial), ("lse_partial", lp, of_lse)):
            if op < start + nbytes and start < op + of_out:
                raise ArgumentError("out", f"shares memory with {name}; give it its own", reason="overlap")
    return pp, lp, op


def combine_plan(now: session.Session, old: launch.Plan | None, dtype: str, head_dim_v: int, rows: int,
                 values: params.Typed, device: int) -> launch.Plan:  # fmt: skip
    """A plan, `old` if there is one, with these parameters. dtype: of the output."""
    if rows > checks.MAX_I32:
        raise ArgumentError("q", f"{rows} rows of partial outputs, must be below 2**31; split it", reason="too_large")
    facts = {"dtype": dtype, "head_dim": head_dim_v, "head_dim_v": head_dim_v, "rows": rows}
    if old is not None:
        old.rewrite(values, facts)
        return old
    return planning.make(now, "fwd_combine", facts, device,
                         lambda kernel, _: launch.Plan(kernel, values, facts, 1, device, now.backend))  # fmt: skip


def _prepare(key: Any, out_partial: Any, lse_partial: Any, out: Any, out_dtype: Any, return_lse: Any) -> _Ready:
    plans = launch.plans  # as in attention._prepare
    now = session.current()
    torch = now.backend.torch
    dtype = _check(out_partial, lse_partial, out, out_dtype, torch, now.backend.device_type)
    check_flag("return_lse", return_lse)
    splits, *shape, head_dim_v = out_partial.shape
    batch, seqlen, heads = shape if len(shape) == 3 else (1, *shape)
    rows = batch * seqlen * heads
    ready = _Ready()
    ready.grad_enabled, ready.forward_ad = torch.is_grad_enabled, torch.autograd.forward_ad
    ready.written = torch.autograd.graph.increment_version
    device = out_partial.device
    ready.new_out = partial(torch.empty, (*shape, head_dim_v), dtype=dtype, device=device)
    ready.new_lse = partial(torch.empty, (*shape[:-2], heads, seqlen), dtype=torch.float32, device=device)
    of_out = params.contiguous((*shape, head_dim_v), head_dim_v)
    if out is not None:
        of_out = params.steps(out.shape, out.stride())
    of_lse = params.steps((*lse_partial.shape[1:], 1), (*lse_partial.stride()[1:], 1))
    between = (out_partial.stride(0), lse_partial.stride(0)) if splits > 1 else (0, 0)
    values = params.combine((splits, batch, seqlen, heads, head_dim_v), between, of_lse, of_out,
                            (heads * seqlen, 1, seqlen))  # fmt: skip
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    outer = 0 if out is None else memory.span(out)
    ready.spans, ready.plan = (memory.span(out_partial), memory.span(lse_partial), outer), None
    if rows:
        ready.plan = combine_plan(now, None, name, head_dim_v, rows, values, out_partial.get_device())
    if key is not None:
        plans.keep(key, ready)
    return ready


def _check(out_partial: Any, lse_partial: Any, out: Any, out_dtype: Any, torch: Any, device_type: str) -> Any:
    """The dtype of the output, with everything right that the key determines. Raises ArgumentError."""
    fp32 = (torch.float32,)
    checks.check_tensor("out_partial", out_partial, torch, device_type, fp32, PARTIAL)
    splits, *shape, head_dim_v = out_partial.shape
    n = out_partial.dim() - 1
    checks.check_tensor("lse_partial", lse_partial, torch, device_type, fp32, {n: LSE[n]})
    checks.check_shape("lse_partial", lse_partial, (splits, *shape))
    if not 1 <= splits <= MAX_SPLITS:
        raise ArgumentError("out_partial", f"{splits} splits, must be from 1 to {MAX_SPLITS}", reason="shape")
    checks.check_head_dim("out_partial", head_dim_v)
    named = [("out_partial", out_partial), ("lse_partial", lse_partial)]
    outputs = (torch.float32, torch.bfloat16, torch.float16)
    dtype = out_dtype or (out.dtype if out is not None and isinstance(out, torch.Tensor) else torch.float32)
    if dtype not in outputs:
        raise ArgumentError("out_dtype", f"{dtype}, must be fp32, bf16 or fp16", reason="dtype")
    if out is not None:
        checks.check_tensor("out", out, torch, device_type, (dtype,), {n: PARTIAL[n + 1].replace("splits, ", "")})
        checks.check_shape("out", out, (*shape, head_dim_v))
        checks.check_rows("out", out)
        checks.check_apart_within("out", out)
        named.append(("out", out))
    checks.check_device(named)
    if out_partial.numel() and not out_partial[0].is_contiguous():
        message = "must be contiguous but for its first stride; .contiguous() it"
        raise ArgumentError("out_partial", message, reason="contiguity")
    if splits > 1 and out_partial.stride(0) % 4:
        message = f"stride {out_partial.stride(0)} between splits, must be a multiple of 4 elements; .contiguous() it"
        raise ArgumentError("out_partial", message, reason="stride")
    for name, tensor in named[:2]:
        memory.check_storage((name, tensor))
    return dtype
