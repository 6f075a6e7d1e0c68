"""`flash_attn`: the hot path of a plain dense call, and `attend`, the path of every other call of attention."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from runtime.call import forward, tensors
from runtime.call.plan import Plan, execute, prepare, prepare_packed
from runtime.call.request import PLAIN, SIDES, Hints, Options, Request
from runtime.call.run import run
from runtime.load import plans
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch

REQUIRES_GRAD = attrgetter("requires_grad")
NO_HINTS = Hints()


@untraced
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
    softmax_scale: a number from 1e-30 to 1e30, so neither 0 nor negative; None is head_dim ** -0.5.
    window: (left, right): how many keys before and after that diagonal a query sees; None is an open side. With
        causal, right is 0. Calls are fastest when it is a tuple of ints and None.
    softcap: c > 0 makes a scaled score s into c · tanh(s / c); 0 does not.
    sink: (heads_q,), fp32, bf16 or fp16: each row's softmax gets one more column with this score, unscaled, that
        has no value; the LSE includes it. One of 16 bits that is not of q's dtype takes a conversion in each call.
    alibi_slopes: (heads_q,) or (batch, heads_q), fp32: slope · |i + seqlen_k - seqlen_q - j| is taken off the score of
        query i and key j, after scale and softcap.
    return_lse: True or False (or 1 or 0): also return the log-sum-exp of the scores, natural log, fp32,
        (batch, heads_q, seqlen_q).
    out: written and returned in place of a new contiguous tensor; (batch, seqlen_q, heads_q, head_dim_v) of q's dtype,
        memory apart from the inputs'. Not where an input requires grad.
    deterministic: True or False (or 1 or 0): the backward gives the same bits each time; docs/tuning.md has its cost.
        The forward always does. torch.use_deterministic_algorithms(True) asks for the same.

    A number counts as what it equals, whatever its type: an int, a Fraction, one of NumPy's. So does a tensor of one
    element, which is read, and that synchronises if it is on a device.

    A query that sees no key gives zeros and an LSE of -inf, or of the sink. Returns out, or (out, lse).

    Differentiable, once, in q, k, v, sink and alibi_slopes, through out and the returned lse. The backward runs on the
    current stream, without synchronising, and takes one buffer from torch's allocator for its time. With rows = batch ·
    (seqlen_q rounded up to 128) and D = head_dim rounded up to its kernel's, it has
        heads_q · rows · (4 · D + 8) bytes;
        heads_q · rows / 4 more if deterministic;
        4 · heads_q more for each tile of keys if alibi_slopes require grad;
        4 · s more for each element of k and v where groups of query heads are split in s parts to fill the GPU, whose
        sums one more kernel adds up.

    The first call, or backward, of each kernel loads it, which a CUDA graph cannot hold: warm up before any thread
    captures.
    Raises ArgumentError, CaptureError, ConfigError, ContractError, DriverError, InstallError, IntegrityError,
    NoKernelError, SourceError, UntrustedError: runtime.errors says what each means.
    """
    if deterministic is not False:
        tensors.check_flag("deterministic", deterministic)
    if sink is not None or alibi_slopes is not None:
        given = given_of(q, k, v, out, sink=sink, alibi_slopes=alibi_slopes)
        return attend("fwd", given, Options(causal, softmax_scale, window, softcap, return_lse),
                      deterministic=deterministic)  # fmt: skip
    key: Any = None
    try:  # torch.device objects are slow to make and hash: k and v of q's index are taken to be on q's device
        key = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
               q.is_cuda, q.get_device(), k.get_device(), v.get_device(),
               causal, softmax_scale, window, softcap, return_lse)  # fmt: skip
        if out is not None:
            key = (key, out.shape, out.stride(), out.dtype, out.get_device())
        plan = plans.plans.by_call[key]
    except Exception:  # a new call, or arguments of the wrong kind: the slow path tells which
        plan = None
    if plan is None:
        given = given_of(q, k, v, out)
        request = Request("fwd", given, Options(causal, softmax_scale, window, softcap, return_lse))
        if not _is_plain(request) and (simple := _plain(request)) is not request:
            causal, softmax_scale, window, softcap, return_lse, *_ = simple.options
            return flash_attn(q, k, v, causal=causal, softmax_scale=softmax_scale, window=window, softcap=softcap,
                              return_lse=return_lse, out=out, deterministic=deterministic)  # fmt: skip
        plan = prepare(forward, request, key)
        if plan.grad_enabled() and any(map(REQUIRES_GRAD, given.values())):
            out, lse = run(plan, given, return_lse, deterministic)
        else:
            out, lse = execute(plan, given, return_lse)
        return out if lse is None else (out, lse)
    return _run_dense(plan, q, k, v, return_lse, out, deterministic)


def attend(op: str, given: dict[str, Any], options: Options, hints: Hints = NO_HINTS, deterministic: Any = False,
           zeros: Any = False) -> Any:  # fmt: skip
    """`flash_attn` with everything that a call can have.

    op: 'fwd', or 'fwd_paged' where k and v are a cache. given: tensors by name, only those that are there, q first.
    options: as runtime.call.request.Options has them. zeros: see runtime.call.run.
    """
    key: Any = None
    try:
        key = (op, options, hints, given["q"].is_cuda,
               *[(name, t.shape, t.stride(), t.dtype, t.get_device()) for name, t in given.items()])  # fmt: skip
        plan = plans.plans.by_call[key]
    except KeyError:
        plan = None
    except Exception:  # as in flash_attn; what has no hash cannot be kept either
        plan = key = None
    if plan is None:
        request = Request(op, given, options, hints)
        if not _is_plain(request) and (simple := _plain(request)) is not request:
            return attend(*simple, deterministic, zeros)
        plan = prepare_packed(forward, request, key) or prepare(forward, request, key)
    out, lse = run(plan, given, options.return_lse, deterministic, zeros)
    return out if lse is None else (out, lse)


def given_of(q: Any, k: Any, v: Any, out: Any, **optional: Any) -> dict[str, Any]:
    """Only what is there."""
    found = {"q": q, "k": k, "v": v}
    if out is not None:
        found["out"] = out
    for name, tensor in optional.items():
        if tensor is not None:
            found[name] = tensor
    return found


def _plain(request: Request) -> Request:
    from runtime.call.plain import plain  # here: few calls need it

    return plain(request)


def _is_plain(request: Request) -> bool:
    """Whether `plain` has nothing to do, as for most calls."""
    asked, window = request.options, request.options.window
    if window is not None and (type(window) is not tuple or not SIDES.issuperset(map(type, window))):
        return False
    if not SIDES.issuperset(map(type, (asked.num_splits, *request.hints))):
        return False
    scalars = (asked.causal, asked.softmax_scale, asked.softcap, asked.return_lse, asked.pack_gqa,
               asked.rotary_interleaved)  # fmt: skip
    return "sink" not in request.tensors and PLAIN.issuperset(map(type, scalars))


def _run_dense(plan: Plan, q: Any, k: Any, v: Any, return_lse: Any, out: Any, deterministic: Any) -> Any:
    """`run` and `plan.execute`, inlined for a call without optional tensors: whoever changes one changes the other."""
    if (
        plan.grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad))
    ) or plan.single is None:
        out, lse = run(plan, given_of(q, k, v, out), return_lse, deterministic)
        return out if lse is None else (out, lse)
    if plan.forward_ad._current_level >= 0:
        tensors.check_tangents(plan.forward_ad, given_of(q, k, v, out).items())
    is_given = out is not None
    if out is None:
        out = plan.new_out(q)
    try:
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        out_at = out.data_ptr()
    except RuntimeError:  # of torch.func's wrappers
        q_at = k_at = v_at = out_at = 0
    if not (q_at and k_at and v_at and out_at):  # as an empty k and v may have it
        tensors.check_storage(("q", q), ("k", k), ("v", v), ("out", out))
    if q.is_neg() or k.is_neg() or v.is_neg() or out.is_neg():
        tensors.check_positive(("q", q), ("k", k), ("v", v), ("out", out))
    if (q_at | k_at | v_at | out_at) & 15:
        tensors.check_alignment(tensors.ALIGNMENT, ("q", q_at), ("k", k_at), ("v", v_at), ("out", out_at))
    if is_given:
        for start, (_, nbytes) in zip((q_at, k_at, v_at), plan.spans, strict=True):
            if out_at < start + nbytes and start < out_at + plan.out_span:
                from runtime.call import memory

                memory.check_apart(out, ("q", q), ("k", k), ("v", v))
        plan.mark_written(out)
    lse = plan.new_lse() if return_lse else None
    launch = plan.single
    launch.write_dense_addresses(q_at, k_at, v_at, out_at, 0 if lse is None else lse.data_ptr())
    device = launch.device
    if launch.current_device() != device:
        with launch.guard(device):
            (status,) = launch.fire(launch.raw_stream(device), launch.params, 0)
    else:
        (status,) = launch.fire(launch.raw_stream(device), launch.params, 0)
    if status is not launch.success:
        launch.check(status, "cuLaunchKernel")
    return out if lse is None else (out, lse)
