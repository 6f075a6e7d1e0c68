"""The checks of a call's arguments, once per plan; each refusal names the argument and what would be accepted."""

from __future__ import annotations

import numbers
import operator
from typing import Any, NamedTuple

from registry.contract import WINDOW_OPEN
from runtime import cached, checks
from runtime.cached import Cached
from runtime.checks import Named
from runtime.errors import ArgumentError

DENSE, PACKED = "(batch, seqlen, heads, head_dim)", "(tokens, heads, head_dim)"
MIN_SCALE, MAX_SCALE = 1e-30, 1e30  # finite in fp32, and positive: the kernels scale the row's largest score
MAX_TOKENS = WINDOW_OPEN - 1  # of q and k together: sums with window bounds stay in 32 bits

# The optional tensors of op `fwd`, in the ABI's order. `cached.PAGED` has those of `fwd_paged`.
OPTIONAL = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "sink", "alibi_slopes")


class Arguments(NamedTuple):
    """A call's arguments as they were given; `flash_attn` and `flash_attn_varlen` say what each is.

    optional: the tensors that `names` names, None where absent; None for them all if no call of the key has any.
    pack_gqa: whether the query heads of a key/value head share tiles; None leaves it to the dispatch table.
    names: OPTIONAL (op `fwd`), cached.PAGED, or cached.APPENDING (op `fwd_paged`, whose k and v are a cache).
    num_splits, rotary_interleaved: of a call with a cache.
    """

    q: Any
    k: Any
    v: Any
    causal: Any
    softmax_scale: Any
    window: Any
    softcap: Any
    return_lse: Any
    out: Any
    optional: tuple[Any, ...] | None = None
    max_seqlen_q: Any = None
    max_seqlen_k: Any = None
    pack_gqa: Any = None
    names: tuple[str, ...] = OPTIONAL
    num_splits: Any = 1
    rotary_interleaved: Any = True

    @property
    def is_cached(self) -> bool:
        return self.names is not OPTIONAL

    @property
    def tensors(self) -> dict[str, Any]:
        """The optional ones by name."""
        return dict(zip(self.names, self.optional or (None,) * len(self.names), strict=True))

    @property
    def packed_q(self) -> bool:
        return self.optional is not None and self.optional[0] is not None

    @property
    def packed_k(self) -> bool:
        return not self.is_cached and self.optional is not None and self.optional[1] is not None

    @property
    def seqlen_k(self) -> int:
        """Tokens of an entry of a dense k or of a cache, all of a packed one."""
        tokens: int = self.k.shape[-3]
        if self.is_cached and (table := self.tensors["page_table"]) is not None:
            tokens *= table.shape[1]
        return tokens


class Call(NamedTuple):
    """A checked call.

    facts: what dispatch rows look at. window: (left, right) in tokens, open is WINDOW_OPEN. seqlen_q, seqlen_k: of an
    entry of a dense array or a cache, all tokens of a packed one. sink_low: 1 if the sink has q's dtype.
    alibi_stride_b: elements. cached: of a call with a cache.
    """

    facts: dict[str, Any]
    window: tuple[int, int]
    scale: float
    softcap: float
    pack_gqa: bool | None
    seqlen_q: int
    seqlen_k: int
    sink_low: int
    alibi_stride_b: int
    cached: Cached | None = None

    @property
    def op(self) -> str:
        return "fwd" if self.cached is None else "fwd_paged"


def check(given: Arguments, torch: Any, device_type: str) -> Call:
    """Everything that the call's key determines, and what hot calls check each time. Raises ArgumentError."""
    q, optional = given.q, given.tensors
    tensors = [("q", q), ("k", given.k), ("v", given.v)] + ([] if given.out is None else [("out", given.out)])
    others = [(name, tensor) for name, tensor in optional.items() if tensor is not None]
    _check_kinds(given, tensors, optional, torch, device_type)
    batch = q.shape[0] if optional["cu_seqlens_q"] is None else optional["cu_seqlens_q"].shape[0] - 1
    _check_shapes(given, optional, batch)
    _check_lengths(given)
    _check_memory(tensors, others)
    if given.is_cached and torch.is_grad_enabled():
        checks.check_no_grad(tensors, others)
    checks.check_tangents(torch.autograd.forward_ad, *tensors, *others)
    check_flag("causal", given.causal)
    check_flag("return_lse", given.return_lse)
    if given.pack_gqa is not None:
        check_flag("pack_gqa", given.pack_gqa)
    window = window_bounds(given.causal, given.window)
    scale = _scale(given.softmax_scale, q.shape[-1])
    sink, slopes = optional["sink"], optional["alibi_slopes"]
    dtype = "bf16" if q.dtype == torch.bfloat16 else "fp16"
    call = Call(
        facts=_facts_of(given, batch, window, dtype),
        window=window,
        scale=scale,
        softcap=_softcap(given.softcap, scale),
        pack_gqa=None if given.pack_gqa is None else bool(given.pack_gqa),
        seqlen_q=q.shape[-3],
        seqlen_k=given.seqlen_k,
        sink_low=int(sink is not None and sink.dtype != torch.float32),
        alibi_stride_b=alibi_stride_b(slopes, batch),
    )
    if not given.is_cached:
        return call
    check_flag("rotary_interleaved", given.rotary_interleaved)
    kv_dtype = dtype if given.k.dtype == q.dtype else "e4m3"
    interleaved = bool(given.rotary_interleaved)
    of_cache = cached.check(given.k, given.v, optional, batch, given.num_splits, window, interleaved)
    return call._replace(facts=call.facts | {"kv_dtype": kv_dtype}, cached=of_cache)


def alibi_stride_b(slopes: Any, batch: int) -> int:
    """Elements from one entry's slopes to the next one's."""
    if slopes is None or slopes.dim() < 2 or batch < 2:
        return 0
    stride: int = slopes.stride(0)
    if batch * stride + slopes.shape[1] > checks.MAX_I32:
        message = f"{batch} rows with a stride of {stride}, must be below 2**31 elements"
        raise ArgumentError("alibi_slopes", message, reason="too_large")
    return stride


def resized(call: Call, given: Arguments) -> Call:
    """A checked call with other numbers of tokens in its packed arrays or page table, and other hints. Raises
    ArgumentError.

    given: in all else what the key of `call` tells; a packed array has 0, 1 or more tokens as before.
    """
    _check_lengths(given)
    if given.out is not None:
        checks.check_apart_within("out", given.out)
    facts = _facts_of(given, call.facts["batch"], call.window, call.facts["dtype"])
    facts = call.facts | facts  # kv_dtype stays
    return call._replace(facts=facts, seqlen_q=given.q.shape[-3], seqlen_k=given.seqlen_k)


# -- tensors ----------------------------------------------------------------------------------------------------------


def _check_kinds(given: Arguments, tensors: Named, optional: dict[str, Any], torch: Any,
                 device_type: str) -> None:  # fmt: skip
    """Types, dtypes, ranks and devices."""
    low = (torch.bfloat16, torch.float16)
    q = given.q
    for name, tensor in tensors:
        lengths = "cu_seqlens_q" if name in ("q", "out") else "cu_seqlens_k"
        if given.is_cached and name in ("k", "v"):
            checks.check_tensor(name, tensor, torch, device_type, (*low, torch.float8_e4m3fn), {4: cached.PAGES})
        elif optional[lengths] is None:
            checks.check_tensor(name, tensor, torch, device_type, low, {4: DENSE})
        else:
            checks.check_tensor(name, tensor, torch, device_type, low, {3: f"{PACKED} with {lengths}"})
    batched = {1: "(batch,)"}
    kinds: dict[str, tuple[tuple[Any, ...], dict[int, str]]] = {
        "cu_seqlens_q": ((torch.int32,), {1: "(batch + 1,)"}),
        "cu_seqlens_k": ((torch.int32,), {1: "(batch + 1,)"}),
        "seqused_q": ((torch.int32,), batched),
        "seqused_k": ((torch.int32,), batched),
        "sink": ((torch.float32, q.dtype), {1: "(heads_q,)"}),
        "alibi_slopes": ((torch.float32,), {1: "(heads_q,)", 2: "(batch, heads_q)"}),
        **cached.kinds(q.dtype, torch),
    }
    others = [(name, optional[name]) for name in kinds if optional.get(name) is not None]
    for name, tensor in others:
        checks.check_tensor(name, tensor, torch, device_type, *kinds[name])
    for name, tensor in tensors[1:]:
        whose, wanted = ("k", given.k.dtype) if given.is_cached and name == "v" else ("q", q.dtype)
        is_fp8 = given.is_cached and name == "k" and tensor.dtype == torch.float8_e4m3fn
        if tensor.dtype != wanted and not is_fp8:
            raise ArgumentError(name, f"dtype {tensor.dtype}, must be {whose}'s, {wanted}", reason="dtype")
    checks.check_device(tensors + others)


def _check_shapes(given: Arguments, optional: dict[str, Any], batch: int) -> None:
    """What no number of tokens changes."""
    q, k, v = given.q, given.k, given.v
    (heads_q, head_dim), heads_kv = q.shape[-2:], k.shape[-2]
    step = 16 // min(t.element_size() for t in (q, k))
    checks.check_head_dim("q", head_dim, step)
    if k.shape[-1] != head_dim:
        raise ArgumentError("k", f"head_dim {k.shape[-1]}, must be q's, {head_dim}", reason="shape")
    checks.check_head_dim("v", v.shape[-1], step)
    if (heads_q % heads_kv if heads_kv else heads_q) != 0:
        message = f"{heads_q} heads, must be a multiple of k's and v's {heads_kv}"
        raise ArgumentError("q", message, reason="heads")
    if max(batch, heads_q) > checks.MAX_I32:
        raise ArgumentError("q", f"batch {batch} and heads {heads_q} must be below 2**31", reason="too_large")
    _check_optional_shapes(optional, batch, heads_q)
    if given.is_cached:
        cached.check_shapes(q, k, v, optional, batch)
    elif optional["cu_seqlens_k"] is None and k.shape[0] != batch:
        raise ArgumentError("k", f"batch {k.shape[0]}, must be q's, {batch}", reason="shape")


def _check_lengths(given: Arguments) -> None:
    """What each number of tokens, or hint, must be asked again."""
    q, k, v, out = given.q, given.k, given.v, given.out
    if v.shape[:-1] != k.shape[:-1]:
        message = f"shape {tuple(v.shape)}, must be k's, {tuple(k.shape)}, but for head_dim"
        raise ArgumentError("v", message, reason="shape")
    seqlen_q, seqlen_k = q.shape[-3], given.seqlen_k
    if seqlen_q + seqlen_k > MAX_TOKENS:
        message = f"{seqlen_q} tokens and k has {seqlen_k}, together they must be at most {MAX_TOKENS}"
        raise ArgumentError("q", message, reason="too_large")
    if out is not None and out.shape != (wanted := (*q.shape[:-1], v.shape[-1])):
        message = f"shape {tuple(out.shape)}, must be q's with v's head_dim, {wanted}"
        raise ArgumentError("out", message, reason="shape")
    _check_max_seqlen("max_seqlen_q", given.max_seqlen_q)
    _check_max_seqlen("max_seqlen_k", given.max_seqlen_k)


def _check_optional_shapes(optional: dict[str, Any], batch: int, heads_q: int) -> None:
    shapes = {"cu_seqlens_q": (batch + 1,), "cu_seqlens_k": (batch + 1,), "seqused_q": (batch,), "seqused_k": (batch,),
              "sink": (heads_q,)}  # fmt: skip
    if batch < 0:
        raise ArgumentError("cu_seqlens_q", "is empty, must have batch + 1 entries", reason="shape")
    for name, shape in shapes.items():
        tensor = optional.get(name)
        if tensor is not None and tensor.shape != shape:
            message = f"shape {tuple(tensor.shape)}, must be {shape} for this batch of {batch} and {heads_q} heads"
            raise ArgumentError(name, message, reason="shape")
    slopes = optional["alibi_slopes"]
    if slopes is not None and slopes.shape not in ((heads_q,), (batch, heads_q)):
        message = f"shape {tuple(slopes.shape)}, must be {(heads_q,)} or {(batch, heads_q)}"
        raise ArgumentError("alibi_slopes", message, reason="shape")


def _check_memory(tensors: Named, others: Named) -> None:
    """Strides, storage, alignment, and whether the elements of out lie apart."""
    for name, tensor in tensors:
        checks.check_rows(name, tensor)
    for name, tensor in others:
        (checks.check_rows if name in cached.NEW else checks.check_elements)(name, tensor)
    name, tensor = tensors[-1]
    if name == "out":
        checks.check_apart_within(name, tensor)


# -- options ----------------------------------------------------------------------------------------------------------


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, int) or flag not in (0, 1):
        raise ArgumentError(name, f"{flag!r:.100} is neither True nor False", reason="type")


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


def _scale(softmax_scale: Any, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, (int, float)) or not MIN_SCALE <= softmax_scale <= MAX_SCALE:
        message = f"{softmax_scale!r:.100} is not a number from {MIN_SCALE} to {MAX_SCALE}, or None for head_dim**-0.5"
        raise ArgumentError("softmax_scale", message, reason="value")
    return float(softmax_scale)


def _softcap(softcap: Any, scale: float) -> float:
    """0 or positive; the kernels take softcap and scale / softcap, both in fp32."""
    if not isinstance(softcap, (int, float)) or not (softcap == 0 or MIN_SCALE <= softcap <= MAX_SCALE):
        message = f"{softcap!r:.100} is not a number from {MIN_SCALE} to {MAX_SCALE}, or 0 for none"
        raise ArgumentError("softcap", message, reason="value")
    if softcap and not MIN_SCALE <= scale / softcap <= MAX_SCALE:
        message = f"softmax_scale / softcap is {scale / softcap}, must be from {MIN_SCALE} to {MAX_SCALE}"
        raise ArgumentError("softcap", message, reason="value")
    return float(softcap)


def _max_seqlen(max_seqlen: int | None, tokens: int, batch: int) -> int:
    """The length of a packed array's entries, as far as it guides the choice of a tile."""
    if max_seqlen is None:
        return -(-tokens // batch) if batch else 0
    return min(int(max_seqlen), tokens)


def _check_max_seqlen(name: str, max_seqlen: Any) -> None:
    """A tensor is refused: reading one from a device would synchronise."""
    if max_seqlen is not None and (not isinstance(max_seqlen, numbers.Integral) or int(max_seqlen) < 0):
        raise ArgumentError(name, f"{max_seqlen!r:.100} is neither an integer ≥ 0 nor None", reason="value")


# -- facts ------------------------------------------------------------------------------------------------------------

LENGTH_FACTS = frozenset(("seqlen_q", "seqlen_k", "total_q", "packed_rows"))  # what `resized` changes


def facts(*, dtype: str, head_dim: int, head_dim_v: int, batch: int, heads_q: int, heads_kv: int, seqlen_q: int,
          seqlen_k: int, window: tuple[int, int], total_q: int | None = None) -> dict[str, Any]:  # fmt: skip
    """All call facts of `fwd`. window: as `window_bounds` gives it. total_q: tokens of a packed q, None if dense."""
    group = heads_q // heads_kv if heads_kv else 0
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "group": group,
        "causal": int(window[1] == 0),
        "varlen": int(total_q is not None),
        "total_q": batch * seqlen_q if total_q is None else total_q,
        "packed_rows": seqlen_q * group,
        "window": int(window[0] != WINDOW_OPEN),
    }


def backward_facts(forward: dict[str, Any], total_k: int | None = None) -> dict[str, Any]:
    """All call facts of the backward's ops, from those of `fwd`. total_k: tokens of a packed k, None if dense."""
    tokens = forward["batch"] * forward["seqlen_k"] if total_k is None else total_k
    return forward | {"varlen_k": int(total_k is not None), "total_k": tokens}


def _facts_of(given: Arguments, batch: int, window: tuple[int, int], dtype: str) -> dict[str, Any]:
    seqlen_q, heads_q, head_dim = given.q.shape[-3:]
    seqlen_k, heads_kv = given.seqlen_k, given.k.shape[-2]
    total_q = None
    if given.packed_q:
        total_q, seqlen_q = seqlen_q, _max_seqlen(given.max_seqlen_q, seqlen_q, batch)
    if given.packed_k:
        seqlen_k = _max_seqlen(given.max_seqlen_k, seqlen_k, batch)
    elif given.is_cached and given.max_seqlen_k is not None:
        seqlen_k = min(int(given.max_seqlen_k), seqlen_k)
    return facts(
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=given.v.shape[-1],
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        window=window,
        total_q=total_q,
    )
