"""The forward, dense, packed and over a cache: its rules across arguments, its numbers, its chain of launches."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import Any

from registry import ops
from registry.contract import WINDOW_OPEN, fast_divmod
from runtime.call import tensors
from runtime.call.launch import Launch, Loaded, Maker, Settled
from runtime.call.plan import Chain, Outputs, Workspace
from runtime.call.request import Call, Options, Request
from runtime.call.tensors import Checked, Numbers
from runtime.errors import ArgumentError

ops.get("fwd")  # imported with this module: every process that calls needs it
LOG2E = math.log2(math.e)
MIN_SCALE, MAX_SCALE = 1e-30, 1e30  # finite in fp32, and positive: the kernels scale the row's largest score
MAX_TOKENS = WINDOW_OPEN - 1  # of q and k together: sums with window bounds stay in 32 bits
MAX_PACKED_ROWS = 2**31 - 2**10  # seqlen_q · pack: rows of a tile behind the last are counted in 32 bits too
NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


def fixed(request: Request) -> Any:
    asked, window = request.options, request.options.window
    # A list or an array has no hash, and a tensor's is not of its value.
    if not isinstance(asked.num_splits, Integral):
        return None
    if window is not None and (type(window) is not tuple or {*map(type, window)} - {int, type(None)}):
        return None
    return asked


def check(request: Request, checked: Checked) -> Call:
    """What depends on the call's key alone, so that a kept plan never asks again. Raises ArgumentError."""
    op, given, asked, _ = request
    sizes = checked.sizes
    _check_sizes(sizes)
    for name in ("causal", "return_lse", *(("pack_gqa",) if asked.pack_gqa is not None else ())):
        _check_flag(name, getattr(asked, name))
    window = window_bounds(asked.causal, asked.window)
    found = checked.strides | _of_scores(asked, sizes["head_dim"])
    if _is_expanded(given):
        sizes["heads_kv"] = 1
    found |= {name: sizes[name] for name in ("batch", "heads_q", "heads_kv", "head_dim", "head_dim_v")}
    found |= {"seqlen_q": _tokens(sizes, "q"), "seqlen_k": _tokens(sizes, "k")}
    found |= {"window_left": window[0], "window_right": window[1]}
    sink = given.get("sink")
    found["sink_low"] = int(sink is not None and sink.element_size() == 2)
    found["alibi_stride_b"] = stride_of_slopes(given.get("alibi_slopes"), sizes["batch"])
    num_splits = 1
    if op == "fwd_paged":
        from runtime.call import cache  # here, as all that dense calls do not need: a first call imports it

        cache.check(given, sizes)
        found |= cache.numbers(given, sizes, window, asked)
        num_splits = cache.check_num_splits(asked.num_splits, "seqused_q" in given)
    pack_gqa = None if asked.pack_gqa is None else bool(asked.pack_gqa)
    return Call(op, _facts_of_request(request, sizes, window), found, sizes, tuple(given), window, pack_gqa, num_splits)


def resized(call: Call, request: Request, sizes: dict[str, int]) -> Call:
    """A checked call, where only rows of packed arrays and hints have changed: rules about them are asked again."""
    _check_sizes(sizes)
    found = call.numbers | tensors.strides_of_new(call.op, call.given, sizes)
    found |= {"seqlen_q": _tokens(sizes, "q"), "seqlen_k": _tokens(sizes, "k")}
    return call._replace(facts=_facts_of_request(request, sizes, call.window), numbers=found, sizes=sizes)


def _tokens(sizes: Mapping[str, int], side: str) -> int:
    """Of an entry, all of a packed array, or what a cache has room for."""
    if f"total_{side}" in sizes:
        return sizes[f"total_{side}"]
    if side == "k" and "page_size" in sizes:
        return sizes["page_size"] * sizes.get("max_pages", 1)
    return sizes[f"seqlen_{side}"]


# -- rules ------------------------------------------------------------------------------------------------------------


def _check_sizes(sizes: Mapping[str, int]) -> None:
    heads_q, heads_kv, batch = sizes["heads_q"], sizes["heads_kv"], sizes["batch"]
    if (heads_q % heads_kv if heads_kv else heads_q) != 0:
        message = f"{heads_q} heads, must be a multiple of k's and v's {heads_kv}"
        raise ArgumentError("q", message, reason="heads")
    if max(batch, heads_q) > tensors.MAX_I32:
        raise ArgumentError("q", f"batch {batch} and heads {heads_q} must be below 2**31", reason="too_large")
    seqlen_q, seqlen_k = _tokens(sizes, "q"), _tokens(sizes, "k")
    if seqlen_q + seqlen_k > MAX_TOKENS:
        message = f"{seqlen_q} tokens and k has {seqlen_k}, together they must be at most {MAX_TOKENS}"
        raise ArgumentError("q", message, reason="too_large")


def _check_flag(name: str, flag: Any) -> None:
    if flag is not True and flag is not False:
        tensors.check_flag(name, flag)


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


def _softcap(given: Any, softmax_scale: float) -> float:
    """0 or positive; the kernels take softcap and softmax_scale / softcap, both in fp32."""
    if not isinstance(given, (int, float)) or not (given == 0 or MIN_SCALE <= given <= MAX_SCALE):
        message = f"{given!r:.100} is not a number from {MIN_SCALE} to {MAX_SCALE}, or 0 for none"
        raise ArgumentError("softcap", message, reason="value")
    if given and not MIN_SCALE <= softmax_scale / given <= MAX_SCALE:
        message = f"softmax_scale / softcap is {softmax_scale / given}, must be from {MIN_SCALE} to {MAX_SCALE}"
        raise ArgumentError("softcap", message, reason="value")
    return float(given)


def _max_seqlen(name: str, given: Any, longest: int, typical: int) -> int:
    """A hint about the longest entry, cut to `longest`; `typical` if it is not given."""
    if given is None:
        return typical
    if (type(given) is not int and not isinstance(given, Integral)) or int(given) < 0:
        raise ArgumentError(name, f"{given!r:.100} is neither an integer ≥ 0 nor None", reason="value")
    return min(int(given), longest)


def _is_expanded(given: Mapping[str, Any]) -> bool:
    """Whether all key/value heads are one, as `expand` makes them: that one then serves all query heads."""
    one = all(given[name].stride(-2) == 0 for name in ("k", "v"))
    return one and given["k"].shape[-2] > 1 and not given.keys() & {"k_descale", "v_descale", *tensors.APPENDED}


# -- numbers and facts ------------------------------------------------------------------------------------------------


def _of_scores(asked: Options, head_dim: int) -> Numbers:
    """How a product becomes a score: `registry.ops.attention` says what each factor holds."""
    scale = _scale(asked.softmax_scale, head_dim)
    softcap = _softcap(asked.softcap, scale)
    return {
        "scale_log2": (softcap or scale) * LOG2E,
        "softcap_scale": 2 * LOG2E * scale / softcap if softcap else 0.0,
        "slope_scale": 1 / (softcap or scale),
        "softmax_scale": scale,
    }


def stride_of_slopes(slopes: Any, batch: int) -> int:
    """Elements from one entry's slopes to the next one's, 0 where one row serves all; the kernels find a row with 32
    bits. Raises ArgumentError."""
    if slopes is None:
        return 0
    stride = tensors.stride_of_batch(slopes, batch)
    if stride and batch * stride + slopes.shape[1] > tensors.MAX_I32:
        message = f"{batch} rows with a stride of {stride}, must be below 2**31 elements"
        raise ArgumentError("alibi_slopes", message, reason="too_large")
    return stride


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


def backward_facts(forward: Mapping[str, Any], total_k: int | None = None) -> dict[str, Any]:
    """All call facts of the backward's ops, from those of `fwd`. total_k: tokens of a packed k, None if dense."""
    tokens = forward["batch"] * forward["seqlen_k"] if total_k is None else total_k
    return {**forward, "varlen_k": int(total_k is not None), "total_k": tokens}


def _facts_of_request(request: Request, sizes: Mapping[str, int], window: tuple[int, int]) -> dict[str, Any]:
    hints, given, batch = request.hints, request.tensors, sizes["batch"]
    seqlen_q, seqlen_k, total_q = _tokens(sizes, "q"), _tokens(sizes, "k"), sizes.get("total_q")
    is_cached = request.op == "fwd_paged"
    mean_q, mean_k = (-(-tokens // batch) if batch else 0 for tokens in (seqlen_q, seqlen_k))
    hint_q = _max_seqlen("max_seqlen_q", hints.max_seqlen_q, seqlen_q, mean_q)
    hint_k = _max_seqlen("max_seqlen_k", hints.max_seqlen_k, seqlen_k, seqlen_k if is_cached else mean_k)
    dtype = NAMES[str(given["q"].dtype)]
    found = facts(
        dtype=dtype,
        **{name: sizes[name] for name in ("head_dim", "head_dim_v", "batch", "heads_q", "heads_kv")},
        seqlen_q=seqlen_q if total_q is None else hint_q,
        seqlen_k=hint_k if is_cached or "total_k" in sizes else seqlen_k,
        window=window,
        total_q=total_q,
    )
    if is_cached:
        found["kv_dtype"] = dtype if given["k"].dtype == given["q"].dtype else "e4m3"
    return found


# -- chain ------------------------------------------------------------------------------------------------------------


def chain(call: Call, request: Request, maker: Maker) -> Chain:
    """Append what there is to append, attend, combine what is split."""
    launches: tuple[Launch, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    written: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = {}
    found = call.numbers
    if call.op == "fwd_paged":
        from runtime.call import cache

        launches, workspaces, written, elsewhere = cache.appending(call, maker)
        found = found | cache.numbers_of_copy(call) if "q" in elsewhere else found
    if call.sizes["batch"] == 0 or request.tensors["q"].numel() == 0:
        return Chain(launches, workspaces, written)
    num_splits = 1

    def settle(loaded: Loaded) -> Settled:
        nonlocal num_splits
        pack = _pack(call, loaded.packs)
        num_splits = _choose_splits(call, loaded, pack)
        more = _of_splits(call, num_splits) if num_splits > 1 else UNSPLIT
        return Settled(found | (_of_pack(pack) if pack > 1 else UNPACKED) | more, pack, num_splits)

    attend = maker.prepared(call.op, call.facts, settle)
    launches = (*launches, attend)
    if num_splits > 1:
        from runtime.call import combine

        workspaces = (*workspaces, *combine.partials(call.sizes, num_splits))
        elsewhere = {**elsewhere, "o": "o_partial", "lse": "lse_partial"}
        launches = (*launches, combine.joining(call, maker, num_splits))
    if call.op == "fwd_paged":
        attend.rename(elsewhere)
    return Chain(launches, workspaces, written)


def outputs(call: Call, request: Request, torch: Any) -> Outputs:
    q, sizes, varied = request.tensors["q"], call.sizes, _leaves_rows(call)
    head_dim_v, heads = sizes["head_dim_v"], sizes["heads_q"]
    of_lse = (heads, sizes["total_q"]) if "total_q" in sizes else (sizes["batch"], heads, sizes["seqlen_q"])
    new_lse = partial(torch.empty, of_lse, dtype=torch.float32, device=q.device)
    if head_dim_v != sizes["head_dim"]:
        new_out = lambda q: q.new_empty((*q.shape[:-1], head_dim_v))  # noqa: E731
    elif q.is_contiguous():
        new_out = torch.empty_like
    else:
        new_out = partial(torch.empty_like, memory_format=torch.contiguous_format)
    if not varied:
        return Outputs(new_out, new_lse, new_out, new_lse)
    zero_lse = partial(torch.zeros, of_lse, dtype=torch.float32, device=q.device)
    return Outputs(new_out, new_lse, lambda q: q.new_zeros((*q.shape[:-1], head_dim_v)), zero_lse)


def _leaves_rows(call: Call) -> bool:
    """Whether queries may belong to no sequence: their rows are not written."""
    return not {"cu_seqlens_q", "seqused_q"}.isdisjoint(call.given)


def _pack(call: Call, packs: bool) -> int:
    """How many query heads share a tile. packs: what the dispatch row says."""
    pack: int = call.facts["group"] if (packs if call.pack_gqa is None else call.pack_gqa) else 1
    seqlen_q = call.numbers["seqlen_q"]
    if seqlen_q * pack > MAX_PACKED_ROWS:
        message = f"{seqlen_q} tokens of {pack} packed heads, may be 2**31 - 2**10 rows; pass pack_gqa=False"
        raise ArgumentError("q", message, reason="too_large")
    return pack


def _of_pack(pack: int) -> Numbers:
    magic, shift = fast_divmod(pack)
    return {"pack": pack, "pack_magic": magic, "pack_shift": shift}


def _of_splits(call: Call, num_splits: int) -> Numbers:
    from runtime.call import combine

    return combine.partial_numbers(call.sizes, num_splits)


UNPACKED = _of_pack(1)
UNSPLIT: Numbers = {"num_splits": 1, "o_stride_split": 0, "lse_stride_split": 0}


def _choose_splits(call: Call, loaded: Loaded, pack: int) -> int:
    """How many blocks share a tile's keys."""
    if call.num_splits:
        return call.num_splits
    from registry.contract.variant import Variant
    from runtime.call import splits

    facts, artifact = call.facts, loaded.kernel.artifact
    keys = splits.visible_keys(facts["seqlen_q"], facts["seqlen_k"], call.window)
    variant = Variant.parse(artifact.variant)
    units, key_blocks = artifact.grid.blocks(facts, pack), -(-keys // variant.size("n"))
    return splits.num_splits(units, key_blocks, *loaded.resident, heavy=splits.is_heavy(variant))
