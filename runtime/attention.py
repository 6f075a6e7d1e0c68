"""`flash_attn`: arguments to plan, plan to launch. The hot path is the body of `flash_attn` and `Plan.launch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from runtime import arguments, launch, session, stages

if TYPE_CHECKING:
    import torch

LOG2E = math.log2(math.e)
Steps = tuple[int, int, int]  # strides in elements of batch, seqlen, heads
ABSENT = (  # inputs of the ABI that this client does not offer yet: null
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "sink", "alibi_slopes"),
    *("o_partial", "lse_partial", "k_descale", "v_descale"),
)


class _Ready:
    """What `flash_attn` needs once a call's key is known: how to launch, to allocate, and to check the rest."""

    __slots__ = ("forward_ad", "grad_enabled", "launch", "new_lse", "new_out", "out_span", "spans", "written")
    forward_ad: Any  # torch.autograd.forward_ad
    grad_enabled: Callable[[], bool]
    launch: Callable[[int, int, int, int, int], None]
    new_lse: Callable[[], torch.Tensor]
    new_out: Callable[[torch.Tensor], torch.Tensor]
    spans: tuple[int, int, int]  # bytes from the first to past the last element of q, k, v
    out_span: int  # and of a given out
    written: Callable[[torch.Tensor], None]  # tells autograd that a tensor's values change


def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q·kᵀ · softmax_scale + mask) · v, on torch's current stream, without synchronising.

    q: (batch, seqlen_q, heads_q, head_dim). k, v: (batch, seqlen_k, heads_kv, head_dim), heads_q a multiple of
        heads_kv. All bf16 or all fp16, on one CUDA device, with memory of their own; head_dim contiguous, other strides
        multiples of 8 elements, 16-byte aligned; seqlen_q + seqlen_k below 2**30.
    causal: True or False (or 1 or 0): query i sees keys up to i + seqlen_k - seqlen_q (aligned bottom-right).
    softmax_scale: an int or float from 1e-30 to 1e30, so neither 0 nor negative; None is head_dim ** -0.5.
    window: (left, right): how many keys before and after that diagonal a query sees; None is an open side. With
        causal, right is 0. Calls are fastest when it is a tuple of ints and None.
    return_lse: True or False (or 1 or 0): also return the log-sum-exp of the scaled scores, natural log, fp32,
        (batch, heads_q, seqlen_q).
    out: written and returned in place of a new contiguous tensor; q's shape and dtype, memory apart from the inputs'.

    A query that sees no key gives zeros and an LSE of -inf. Forward only. Returns out, or (out, lse).
    The first call of each kernel loads it, which a CUDA graph cannot hold: warm up before any thread captures.
    Raises ArgumentError, CaptureError, ConfigError, ContractError, DriverError, InstallError, IntegrityError,
    NoKernelError, SourceError, UntrustedError: runtime.errors says what each means.
    """
    key: Any = None
    try:  # a device costs 0.07 µs more than its index: q's tells the type, and k, v of the same index are taken for it
        key = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
               q.device, k.get_device(), v.get_device(), causal, softmax_scale, window, return_lse)  # fmt: skip
        if out is not None:
            key = (key, out.shape, out.stride(), out.dtype, out.get_device())
        ready = launch.plans.by_call[key]
    except Exception:  # a new call, or arguments of the wrong kind: the slow path tells which
        ready = None
    if ready is None:
        ready = _prepare(key, q, k, v, causal, softmax_scale, window, return_lse, out)
    if ready.grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad)
    ):
        raise arguments.wants_grad()
    if ready.forward_ad._current_level >= 0:
        arguments.check_tangents(ready.forward_ad, ("q", q), ("k", k), ("v", v), ("out", out))
    given = out
    if out is None:
        out = ready.new_out(q)
    try:
        qp, kp, vp = q.data_ptr(), k.data_ptr(), v.data_ptr()
        op = out.data_ptr()
    except RuntimeError:  # of torch.func's wrappers
        qp = kp = vp = op = 0
    if not (qp and kp and vp and op):  # as an empty k and v may have it
        arguments.check_storage(("q", q), ("k", k), ("v", v), ("out", out))
    if (qp | kp | vp | op) & 15:
        raise arguments.misaligned(("q", qp), ("k", kp), ("v", vp), ("out", op))
    if given is not None:
        for start, nbytes in zip((qp, kp, vp), ready.spans, strict=True):
            if op < start + nbytes and start < op + ready.out_span:
                arguments.check_apart(out, ("q", q), ("k", k), ("v", v))
        ready.written(out)
    if return_lse:
        lse = ready.new_lse()
        ready.launch(qp, kp, vp, op, lse.data_ptr())
        return out, lse
    ready.launch(qp, kp, vp, op, 0)
    return out


def _prepare(key: Any, q: Any, k: Any, v: Any, causal: Any, softmax_scale: Any, window: Any, return_lse: Any,
             out: Any) -> _Ready:  # fmt: skip
    """Check everything, find and load the kernel, keep the plan. Raises whatever flash_attn raises."""
    plans = launch.plans  # before the session: a configure() in between must not get a plan of the old one
    now = session.current()
    backend = now.backend
    torch = backend.torch
    call = arguments.check(q, k, v, causal, softmax_scale, window, return_lse, out, torch, backend.device_type)
    ready = _Ready()
    ready.grad_enabled = torch.is_grad_enabled
    ready.forward_ad = torch.autograd.forward_ad
    ready.written = torch.autograd.graph.increment_version
    if q.is_contiguous():
        ready.new_out = torch.empty_like  # the fastest way to a contiguous tensor
    else:
        ready.new_out = partial(torch.empty_like, memory_format=torch.contiguous_format)
    ready.spans = (arguments.span(q), arguments.span(k), arguments.span(v))
    ready.out_span = 0 if out is None else arguments.span(out)
    batch, seqlen_q, heads_q, head_dim = q.shape
    ready.new_lse = partial(torch.empty, (batch, heads_q, seqlen_q), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        ready.launch = _nothing
    else:
        o_steps = (seqlen_q * heads_q * head_dim, heads_q * head_dim, head_dim) if out is None else _steps(out)
        _plan(ready, now, call, (_steps(q), _steps(k), _steps(v), o_steps), q.get_device())
    if key is not None and _serves_in_a_key(window):
        plans.keep(key, ready)
    return ready


def _serves_in_a_key(window: Any) -> bool:
    """Other windows are served, but a list or an array has no hash, and a tensor's is not of its value."""
    return window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window))


def _nothing(*addresses: int) -> None:
    """The launch of a call without queries."""


def _steps(tensor: Any) -> Steps:
    """Strides of batch, seqlen and heads; 0 where there is but one, whose stride torch leaves open."""
    batch, seqlen, heads = (step if n > 1 else 0 for n, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True))
    return batch, seqlen, heads


def _plan(ready: _Ready, now: session.Session, call: arguments.Call, steps: tuple[Steps, ...], device: int) -> None:
    """Give `ready` its launch; a kernel's first plan and launch go to the ledger."""
    backend = now.backend
    capturing = backend.is_capturing()  # asked before the guard too: another device's capture forbids a load as well
    with backend.guard(device):
        kernel, fresh = now.kernel("fwd", call.facts, device, capturing or backend.is_capturing())
        start = perf_counter()
        with backend.driver.context(device):  # this thread may have none, though another has loaded the kernel
            plan = launch.Plan(kernel, values(call, steps), call.facts, device, backend)
    ready.launch = plan.launch
    if not fresh:
        return
    stages.record("plan", kernel.artifact.variant, (perf_counter() - start) * 1e3)

    def first_launch(*addresses: int) -> None:
        ready.launch = plan.launch
        with stages.stage("first launch", kernel.artifact.variant):
            plan.launch(*addresses)

    ready.launch = first_launch


def values(call: arguments.Call, steps: tuple[Steps, ...]) -> dict[str, tuple[str, int | float]]:
    """name -> (type, value) of every `fwd` parameter after the call slots. steps: those of q, k, v and out."""
    facts = call.facts
    found: dict[str, tuple[str, int | float]] = {name: ("ptr", 0) for name in ABSENT}
    for tensor, strides in zip("qkvo", steps, strict=True):
        for axis, step in zip("bsh", strides, strict=True):
            found[f"{tensor}_stride_{axis}"] = ("i64", step)
    found["lse_stride_b"] = ("i64", facts["heads_q"] * facts["seqlen_q"])
    found["lse_stride_h"] = ("i64", facts["seqlen_q"])
    for name in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k"):
        found[name] = ("i32", facts[name])
    left, right = call.window
    found |= {"window_left": ("i32", left), "window_right": ("i32", right)}
    found |= {"page_size": ("i32", 0), "page_table_stride": ("i32", 0), "num_splits": ("i32", 1)}
    return found | {"scale_log2": ("f32", call.scale * LOG2E), "softcap": ("f32", 0.0)}
