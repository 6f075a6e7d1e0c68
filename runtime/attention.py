"""`flash_attn`: arguments to plan, plan to launch. The hot path is the body of `flash_attn` and `_run`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from registry.contract import DispatchRow
from runtime import arguments, cached, checks, launch, memory, params, planning, select, session
from runtime.arguments import Arguments, Call, check_flag
from runtime.chain import Chain, choose_splits
from runtime.errors import ArgumentError
from runtime.load import Kernel

if TYPE_CHECKING:
    import torch


class _Ready:
    """What a call needs once its key is known: how to launch, to allocate, and to check the rest."""

    __slots__ = ("call", "chain", "forward", "forward_ad", "grad_enabled", "lengths", "lse_shape", "masks", "names",
                 "new_lse", "new_out", "out_span", "plan", "plans", "rows", "spans", "splits", "written")  # fmt: skip
    forward_ad: Any  # torch.autograd.forward_ad
    grad_enabled: Callable[[], bool]
    new_lse: Callable[[tuple[int, ...]], torch.Tensor]
    new_out: Callable[[torch.Tensor], torch.Tensor]
    written: Callable[[torch.Tensor], None]  # tells autograd that a tensor's values change
    names: tuple[str, ...]  # of the optional tensors
    masks: tuple[int, ...]  # bits of their addresses that must be 0
    # What follows serves calls with these `lengths`; `_resize` makes it serve others.
    lengths: tuple[Any, ...] | None  # as `_shapes` has them; None for a call of `flash_attn` without optional tensors
    lse_shape: tuple[int, ...]
    plan: launch.Plan | None  # the only launch; None: there are no queries, or there is a chain
    chain: Chain | None  # where more than the forward is launched
    # Where out is given: bytes from the first to past the last element of q, k, v and the optional tensors, and of out.
    spans: tuple[int, ...]
    out_span: int
    call: Call  # with these lengths, too
    # What `_resize` needs.
    forward: launch.Plan | None  # None: there are no queries
    splits: int  # blocks that share a tile's keys
    rows: list[DispatchRow] | None  # that such calls can get, with the conditions that lengths decide; None: not asked
    plans: dict[tuple[str, bool], launch.Plan]  # by variant and pack of the row


def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q·kᵀ · softmax_scale + mask) · v, on torch's current stream, without synchronising.

    q: (batch, seqlen_q, heads_q, head_dim). k: (batch, seqlen_k, heads_kv, head_dim), heads_q a multiple of heads_kv.
        v: (batch, seqlen_k, heads_kv, head_dim_v). head_dim and head_dim_v: multiples of 8 up to 256. All bf16 or all
        fp16, on one CUDA device, with memory of their own; the last dimension contiguous, other strides multiples of
        8 elements, 16-byte aligned; seqlen_q + seqlen_k below 2**30.
    causal: True or False (or 1 or 0): query i sees keys up to i + seqlen_k - seqlen_q (aligned bottom-right).
    softmax_scale: an int or float from 1e-30 to 1e30, so neither 0 nor negative; None is head_dim ** -0.5.
    window: (left, right): how many keys before and after that diagonal a query sees; None is an open side. With
        causal, right is 0. Calls are fastest when it is a tuple of ints and None.
    softcap: c > 0 makes a scaled score s into c · tanh(s / c); 0 does not.
    sink: (heads_q,), fp32 or of q's dtype: each row's softmax gets one more column with this score, unscaled, that
        has no value; the LSE includes it.
    alibi_slopes: (heads_q,) or (batch, heads_q), fp32: slope · |i + seqlen_k - seqlen_q - j| is taken off the score of
        query i and key j, after scale and softcap.
    return_lse: True or False (or 1 or 0): also return the log-sum-exp of the scores, natural log, fp32,
        (batch, heads_q, seqlen_q).
    out: written and returned in place of a new contiguous tensor; (batch, seqlen_q, heads_q, head_dim_v) of q's dtype,
        memory apart from the inputs'. Not where an input requires grad.
    deterministic: True or False (or 1 or 0): the backward gives the same bits each time; docs/tuning.md has its cost.
        The forward always does. torch.use_deterministic_algorithms(True) asks for the same.

    A query that sees no key gives zeros and an LSE of -inf, or of the sink. Returns out, or (out, lse).

    Differentiable, once, in q, k, v, sink and alibi_slopes, through out and the returned lse; the backward runs on the
    current stream, without synchronising, and takes for its time, from torch's allocator, these workspaces. With rows
    = batch · (seqlen_q rounded up to 128) and D = head_dim rounded up to its kernel's: heads_q · rows · (4 · D + 8)
    bytes; if deterministic heads_q · rows / 4 more; 4 · heads_q for each tile of keys if alibi_slopes require grad; and
    where there are too few keys to fill the GPU, for s parts of each group of query heads, s · 4 bytes for each element
    of k and v.

    The first call, or backward, of each kernel loads it, which a CUDA graph cannot hold: warm up before any thread
    captures.
    Raises ArgumentError, CaptureError, ConfigError, ContractError, DriverError, InstallError, IntegrityError,
    NoKernelError, SourceError, UntrustedError: runtime.errors says what each means.
    """
    if deterministic is not False:
        check_flag("deterministic", deterministic)
    if sink is not None or alibi_slopes is not None:
        optional = (None, None, None, None, None, sink, alibi_slopes)
        return attend(q, k, v, causal, softmax_scale, window, softcap, return_lse, out, optional,
                      deterministic=deterministic)  # fmt: skip
    key: Any = None
    try:  # torch.device objects are slow to make and hash: k and v of q's index are taken to be on q's device
        key = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
               q.is_cuda, q.get_device(), k.get_device(), v.get_device(),
               causal, softmax_scale, window, softcap, return_lse)  # fmt: skip
        if out is not None:
            key = (key, out.shape, out.stride(), out.dtype, out.get_device())
        ready = launch.plans.by_call[key]
    except Exception:  # a new call, or arguments of the wrong kind: the slow path tells which
        ready = None
    if ready is None:
        ready = _prepare(key, Arguments(q, k, v, causal, softmax_scale, window, softcap, return_lse, out), None)
    return _run(ready, q, k, v, return_lse, out, None, deterministic)


def attend(q: Any, k: Any, v: Any, causal: Any, softmax_scale: Any, window: Any, softcap: Any, return_lse: Any,
           out: Any, optional: tuple[Any, ...], max_seqlen_q: Any = None, max_seqlen_k: Any = None,
           pack_gqa: Any = None, deterministic: Any = False) -> Any:  # fmt: skip
    """`flash_attn` with everything that a call can have; `arguments.Arguments` says what each is."""
    key: Any = None
    lengths: Any = None
    try:
        shapes, lengths = _shapes(q, k, v, out, optional, max_seqlen_q, max_seqlen_k)
        key = (shapes, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
               q.is_cuda, q.get_device(), k.get_device(), v.get_device(),
               causal, softmax_scale, window, softcap, return_lse, pack_gqa,
               *[t if t is None else (t.shape, t.stride(), t.dtype, t.get_device()) for t in optional])  # fmt: skip
        if out is not None:
            key = (key, out.stride(), out.dtype, out.get_device())
        ready = launch.plans.by_call[key]
    except Exception:  # as in flash_attn
        ready = None
    if ready is None or ready.lengths != lengths:
        given = Arguments(q, k, v, causal, softmax_scale, window, softcap, return_lse, out, optional, max_seqlen_q,
                          max_seqlen_k, pack_gqa)  # fmt: skip
        if ready is None:
            ready = _prepare(key, given, lengths)
        else:
            _resize(ready, given, lengths)
    return _run(ready, q, k, v, return_lse, out, optional, deterministic)


def attend_cached(q: Any, k: Any, v: Any, causal: Any, softmax_scale: Any, window: Any, softcap: Any, return_lse: Any,
                  out: Any, names: tuple[str, ...], optional: tuple[Any, ...], num_splits: Any, interleaved: Any = True,
                  max_seqlen_q: Any = None, max_seqlen_k: Any = None, pack_gqa: Any = None) -> Any:  # fmt: skip
    """`attend` where k and v are a cache. optional: the tensors that names, cached.PAGED or .APPENDING, names."""
    key: Any = None
    lengths: Any = None
    try:
        q_shape, out_shape, table = q.shape, None if out is None else out.shape, optional[3]
        width = 0 if table is None else table.shape[1]
        lengths = (q_shape[0], out_shape and out_shape[0], width, max_seqlen_q, max_seqlen_k)
        if optional[0] is not None:  # as in _shapes
            q_shape, out_shape = (min(lengths[0], 2), q_shape[1:]), out_shape and out_shape[1:]
        key = (q_shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
               q.is_cuda, q.get_device(), k.get_device(), v.get_device(),
               causal, softmax_scale, window, softcap, return_lse, pack_gqa, num_splits, interleaved,
               type(max_seqlen_q), type(max_seqlen_k), min(width, 2),
               *[t if t is None else ((t.shape[0] if t is table else t.shape), t.stride(), t.dtype, t.get_device())
                 for t in optional])  # fmt: skip
        if out is not None:
            key = (key, out_shape, out.stride(), out.dtype, out.get_device())
        ready = launch.plans.by_call[key]
    except Exception:  # as in flash_attn
        ready = None
    if ready is None or ready.lengths != lengths:
        given = Arguments(q, k, v, causal, softmax_scale, window, softcap, return_lse, out, optional, max_seqlen_q,
                          max_seqlen_k, pack_gqa, names, num_splits, interleaved)  # fmt: skip
        if ready is None:
            ready = _prepare(key, given, lengths)
        else:
            _resize(ready, given, lengths)
    return _run(ready, q, k, v, return_lse, out, optional)


def _shapes(q: Any, k: Any, v: Any, out: Any, optional: tuple[Any, ...], max_seqlen_q: Any,
            max_seqlen_k: Any) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
    """(shapes, lengths): the part of a call's shapes that its key has, and the part that may change under a plan.

    Of a packed array's tokens, a key tells none, one and more apart: none need no kernel, one's stride is not checked.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    out_shape = None if out is None else out.shape
    lengths = (q_shape[0], k_shape[0], v_shape[0], out_shape and out_shape[0], max_seqlen_q, max_seqlen_k)
    if optional[0] is not None:
        q_shape, out_shape = (min(lengths[0], 2), q_shape[1:]), out_shape and out_shape[1:]
    if optional[1] is not None:
        k_shape, v_shape = (min(lengths[1], 2), k_shape[1:]), v_shape[1:]
    return (q_shape, k_shape, v_shape, out_shape, type(max_seqlen_q), type(max_seqlen_k)), lengths


def _run(ready: _Ready, q: Any, k: Any, v: Any, return_lse: Any, out: Any, optional: tuple[Any, ...] | None,
         deterministic: Any = False) -> Any:  # fmt: skip
    """Check what the key leaves open, allocate, launch. optional: None if no call of this key has any."""
    if ready.grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad)
    ):
        return _run_differentiable(ready, q, k, v, return_lse, out, optional, deterministic)
    if ready.forward_ad._current_level >= 0:
        checks.check_tangents(ready.forward_ad, ("q", q), ("k", k), ("v", v), ("out", out))
    given = out
    if out is None:
        out = ready.new_out(q)
    try:
        qp, kp, vp = q.data_ptr(), k.data_ptr(), v.data_ptr()
        op = out.data_ptr()
    except RuntimeError:  # of torch.func's wrappers
        qp = kp = vp = op = 0
    if not (qp and kp and vp and op):  # as an empty k and v may have it
        memory.check_storage(("q", q), ("k", k), ("v", v), ("out", out))
    if (qp | kp | vp | op) & 15:
        memory.check_alignment(memory.ALIGNMENT, ("q", qp), ("k", kp), ("v", vp), ("out", op))
    addresses = None
    if optional is not None:
        addresses = _addresses(ready, optional)
        if addresses is None:
            return _run_differentiable(ready, q, k, v, return_lse, given, optional, deterministic)
    if given is not None:
        for start, nbytes in zip((qp, kp, vp, *(addresses or ())), ready.spans, strict=True):
            if op < start + nbytes and start < op + ready.out_span:
                others = zip(ready.names, optional or (), strict=False)
                memory.check_apart(out, ("q", q), ("k", k), ("v", v), *others)
        ready.written(out)
    lse = ready.new_lse(ready.lse_shape) if return_lse else None
    plan = ready.plan
    if plan is not None:
        plan.pack(qp, kp, vp, op, 0 if lse is None else lse.data_ptr())
        if addresses is not None:
            plan.pack_optional(*addresses)
        device = plan.device
        if plan.current_device() != device:
            with plan.guard(device):
                (status,) = plan.fire(plan.raw_stream(device), plan.params, 0)
        else:
            (status,) = plan.fire(plan.raw_stream(device), plan.params, 0)
        if status is not plan.success:
            plan.check(status, "cuLaunchKernel")
    elif ready.chain is not None and addresses is not None:
        ready.chain.run(q, k, v, (qp, kp, vp, op, 0 if lse is None else lse.data_ptr()), addresses)
    return out if lse is None else (out, lse)


def _run_differentiable(ready: _Ready, q: Any, k: Any, v: Any, return_lse: Any, out: Any,
                        optional: tuple[Any, ...] | None, deterministic: Any) -> Any:  # fmt: skip
    """`_run` where something requires grad."""
    from runtime import autograd  # here: it imports torch

    given = Arguments(q, k, v, None, None, None, None, return_lse, out, optional, names=ready.names)
    return autograd.apply(given, ready.call, deterministic, partial(_run, ready, q, k, v, True, None, optional))


def _addresses(ready: _Ready, optional: tuple[Any, ...]) -> list[int] | None:
    """Of the optional tensors, 0 where there is none, after the checks that the key leaves open. None: one requires
    grad."""
    found = []
    for name, mask, tensor in zip(ready.names, ready.masks, optional, strict=True):
        if tensor is None:
            found.append(0)
            continue
        if tensor.requires_grad and ready.grad_enabled():
            return None
        try:
            address = tensor.data_ptr()
        except RuntimeError:
            address = 0
        if address == 0:
            memory.check_storage((name, tensor))
        elif address & mask:
            memory.check_alignment(mask + 1, (name, address))
        found.append(address)
    if ready.forward_ad._current_level >= 0:
        checks.check_tangents(ready.forward_ad, *zip(ready.names, optional, strict=True))
    return found


def _prepare(key: Any, given: Arguments, lengths: tuple[Any, ...] | None) -> _Ready:
    """Check everything, find and load the kernel, keep the plan. Raises whatever flash_attn raises."""
    plans = launch.plans  # before the session: a configure() in between must not get a plan of the old one
    now = session.current()
    backend = now.backend
    torch = backend.torch
    call = arguments.check(given, torch, backend.device_type)
    q = given.q
    ready = _Ready()
    ready.grad_enabled = torch.is_grad_enabled
    ready.forward_ad = torch.autograd.forward_ad
    ready.written = torch.autograd.graph.increment_version
    ready.new_out = _allocator(q, given.v.shape[-1], torch)
    ready.new_lse = partial(torch.empty, dtype=torch.float32, device=q.device)
    ready.names, ready.masks = given.names, tuple(_mask(name, t) for name, t in given.tensors.items())
    ready.call, ready.rows, ready.plans, ready.splits, ready.chain = call, None, {}, 1, None
    empty = q.numel() == 0 or call.facts["batch"] == 0
    ready.forward = None if empty else _plan(now, ready, given, call)
    _set_chain(ready, given, call)
    _set_lengths(ready, given, lengths)
    if key is not None and _serves_in_a_key(given.window):
        plans.keep(key, ready)
    return ready


def _resize(ready: _Ready, given: Arguments, lengths: tuple[Any, ...]) -> None:
    """Make `ready` serve a call of its key with other lengths; as _prepare, but for what the key has settled."""
    ready.call = call = arguments.resized(ready.call, given)
    ready.lengths = ()  # of no call, should anything below fail
    if ready.forward is not None:
        if ready.rows is None:
            ready.rows = _open_rows(session.current(), call, given.q.get_device())
        row = select.first(ready.rows, call.facts)
        plan = row and ready.plans.get((row.variant, row.pack))
        if row and plan:
            pack = _pack(call, row.pack)
            if call.cached is None:
                plan.resize(call.facts, call.seqlen_q, call.seqlen_k)
            else:
                ready.splits = choose_splits(call, plan.kernel, pack, plan.resident)
                values = params.forward(call, params.all_steps(given), pack, ready.splits)
                plan.rewrite(values, call.facts, ready.splits)
        else:
            plan = _plan(session.current(), ready, given, call)
        ready.forward = plan
    _set_chain(ready, given, call)
    _set_lengths(ready, given, lengths)


def _open_rows(now: session.Session, call: Call, device: int) -> list[DispatchRow]:
    known = {name: value for name, value in call.facts.items() if name not in arguments.LENGTH_FACTS}
    return select.open_rows(now.index_for(now.backend.capability(device)), call.op, known)


def _mask(name: str, tensor: Any) -> int:
    """Bits of the address that must be 0: of 16 bytes where the kernels copy rows, else of an element."""
    if tensor is None:
        return 0
    alignment: int = memory.ALIGNMENT if name in cached.NEW else tensor.element_size()
    return alignment - 1


def _set_chain(ready: _Ready, given: Arguments, call: Call) -> None:
    """With everything else about the forward settled."""
    if ready.splits > 1 or given.names is cached.APPENDING:
        ready.chain = Chain.of(session.current(), ready.chain, given, call, ready.forward, ready.splits)
        ready.plan = None
    else:
        ready.chain, ready.plan = None, ready.forward


def _set_lengths(ready: _Ready, given: Arguments, lengths: tuple[Any, ...] | None) -> None:
    """The last step: from here on, `ready` serves calls with these lengths."""
    shape, out = given.q.shape, given.out
    ready.lse_shape = (*shape[:-3], shape[-2], shape[-3])
    if out is not None:
        spans = [memory.span(tensor) for tensor in (given.q, given.k, given.v)]
        spans += [0 if tensor is None else memory.span(tensor) for tensor in given.optional or ()]
        ready.spans, ready.out_span = tuple(spans), memory.span(out)
    ready.lengths = lengths


def _allocator(q: Any, head_dim_v: int, torch: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a contiguous tensor for the output from q, the fastest way."""
    if head_dim_v != q.shape[-1]:
        return lambda q: q.new_empty((*q.shape[:-1], head_dim_v))
    if q.is_contiguous():
        return torch.empty_like
    return partial(torch.empty_like, memory_format=torch.contiguous_format)


def _serves_in_a_key(window: Any) -> bool:
    """Other windows are served, but a list or an array has no hash, and a tensor's is not of its value."""
    return window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window))


def _plan(now: session.Session, ready: _Ready, given: Arguments, call: Call) -> launch.Plan:
    """A new plan of the forward, which goes among ready.plans; sets ready.splits."""
    backend, device = now.backend, given.q.get_device()

    def build(kernel: Kernel, packs: bool) -> launch.Plan:
        pack, resident, artifact = _pack(call, packs), (0, 0), kernel.artifact
        if call.cached is not None:
            resident = backend.driver.resident_blocks(device, kernel.function, artifact.threads, kernel.smem)
        ready.splits = choose_splits(call, kernel, pack, resident)
        values = params.forward(call, params.all_steps(given), pack, ready.splits)
        plan = launch.Plan(kernel, values, call.facts, pack, device, backend, ready.splits)
        plan.resident = resident
        ready.plans[artifact.variant, packs] = plan
        return plan

    return planning.make(now, call.op, call.facts, device, build)


def _pack(call: Call, packs: bool) -> int:
    """How many query heads share a tile. packs: what the dispatch row says."""
    pack: int = call.facts["group"] if (packs if call.pack_gqa is None else call.pack_gqa) else 1
    if call.seqlen_q * pack > launch.MAX_PACKED_ROWS:
        message = f"{call.seqlen_q} tokens of {pack} packed heads, may be 2**31 - 2**10 rows; pass pack_gqa=False"
        raise ArgumentError("q", message, reason="too_large")
    return pack
