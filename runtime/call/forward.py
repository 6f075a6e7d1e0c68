"""The forward, dense, packed and over a cache: its rules across arguments, its numbers, its chain of launches."""

from __future__ import annotations

from functools import partial
from typing import Any

from registry.contract import WINDOW_OPEN, Variant
from runtime.call import checks, numbers, options, splits, tensors
from runtime.call.launch import Launch
from runtime.call.numbers import Numbers
from runtime.call.plan import Chain, Maker, Outputs, Workspace
from runtime.call.request import Call, Request
from runtime.errors import ArgumentError

MAX_TOKENS = WINDOW_OPEN - 1  # of q and k together: sums with window bounds stay in 32 bits
MAX_PACKED_ROWS = 2**31 - 2**10  # seqlen_q · pack: rows of a tile behind the last are counted in 32 bits too
ROTARY_STEP = 16  # of rotary_dim: each half of the rotated columns is whole pieces of 16 bytes
NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
APPENDED = ("k_new", "v_new")


def fixed(request: Request) -> Any:
    """The options but for hints about lengths."""
    asked = request.options
    if not options.have_hash_of_value(asked.window, asked.num_splits):
        return None
    return asked._replace(max_seqlen_q=None, max_seqlen_k=None), type(asked.max_seqlen_q), type(asked.max_seqlen_k)


def check(request: Request, torch: Any, device_type: str) -> Call:
    """Everything that the call's key determines. Raises ArgumentError."""
    op, given, asked = request
    tensors.check_kinds(op, given, torch, device_type)
    sizes = tensors.sizes(op, given)
    _check_dims(given, sizes)
    tensors.check_memory(op, given)
    checks.check_tangents(torch.autograd.forward_ad, given.items())
    checks.check_flag("causal", asked.causal)
    checks.check_flag("return_lse", asked.return_lse)
    if asked.pack_gqa is not None:
        checks.check_flag("pack_gqa", asked.pack_gqa)
    window = options.window_bounds(asked.causal, asked.window)
    scale = options.scale(asked.softmax_scale, sizes["head_dim"])
    found = numbers.of_scores(scale, options.softcap(asked.softcap, scale)) | _strides(given, sizes)
    is_cached = op == "fwd_paged"
    if is_cached:
        _check_cache(given, sizes)
        found |= _cache_numbers(given, sizes, window, asked)
    if _is_expanded(given):
        sizes["heads_kv"] = 1
    facts = _facts(request, sizes, window)
    dims = ("batch", "heads_q", "heads_kv", "head_dim", "head_dim_v")
    found |= {name: sizes[name] for name in dims} | {"window_left": window[0], "window_right": window[1]}
    found |= {"seqlen_q": _tokens(sizes, "q"), "seqlen_k": _tokens(sizes, "k")}
    num_splits = options.num_splits(asked.num_splits, "seqused_q" in given) if is_cached else 1
    pack_gqa = None if asked.pack_gqa is None else bool(asked.pack_gqa)
    return Call(op, facts, found, sizes, tuple(given), window, pack_gqa, num_splits)


def _tokens(sizes: dict[str, int], side: str) -> int:
    """Of an entry, all of a packed array, or what a cache has room for."""
    if f"total_{side}" in sizes:
        return sizes[f"total_{side}"]
    if side == "k" and "page_size" in sizes:
        return sizes["page_size"] * sizes.get("max_pages", 1)
    return sizes[f"seqlen_{side}"]


# -- rules ------------------------------------------------------------------------------------------------------------


def _check_dims(given: dict[str, Any], sizes: dict[str, int]) -> None:
    step = 16 // min(given[name].element_size() for name in ("q", "k"))
    checks.check_head_dim("q", sizes["head_dim"], step)
    checks.check_head_dim("v", sizes["head_dim_v"], step)
    heads_q, heads_kv, batch = sizes["heads_q"], sizes["heads_kv"], sizes["batch"]
    if (heads_q % heads_kv if heads_kv else heads_q) != 0:
        message = f"{heads_q} heads, must be a multiple of k's and v's {heads_kv}"
        raise ArgumentError("q", message, reason="heads")
    if max(batch, heads_q) > checks.MAX_I32:
        raise ArgumentError("q", f"batch {batch} and heads {heads_q} must be below 2**31", reason="too_large")
    seqlen_q, seqlen_k = _tokens(sizes, "q"), _tokens(sizes, "k")
    if seqlen_q + seqlen_k > MAX_TOKENS:
        message = f"{seqlen_q} tokens and k has {seqlen_k}, together they must be at most {MAX_TOKENS}"
        raise ArgumentError("q", message, reason="too_large")


def _is_expanded(given: dict[str, Any]) -> bool:
    """Whether all key/value heads are one, as `expand` makes them: that one then serves all query heads."""
    one = all(given[name].stride(-2) == 0 for name in ("k", "v"))
    return one and given["k"].shape[-2] > 1 and not given.keys() & {"k_descale", "v_descale", *APPENDED}


def _check_cache(given: dict[str, Any], sizes: dict[str, int]) -> None:
    batch = sizes["batch"]
    if "page_table" not in given and sizes["pages"] < batch:
        message = f"{sizes['pages']} entries, must be at least q's batch, {batch}, where no table places its pages"
        raise ArgumentError("k", message, reason="shape")
    if "page_table" in given and given["page_table"].stride(0) > checks.MAX_I32:
        message = f"row stride {given['page_table'].stride(0)}, must be below 2**31"
        raise ArgumentError("page_table", message, reason="stride")
    for name in ("k", "v"):
        if sizes["page_size"] > 1 and given[name].stride(1) > checks.MAX_I32:
            message = f"stride {given[name].stride(1)} from token to token, must be below 2**31 elements"
            raise ArgumentError(name, message, reason="stride")
    for name in ("k_descale", "v_descale"):
        if name in given and given["k"].element_size() > 1:
            message = f"needs a cache of float8_e4m3fn, this one is {given['k'].dtype}"
            raise ArgumentError(name, message, reason="unsupported")
    _check_pair(given, *APPENDED)
    _check_pair(given, "rotary_cos", "rotary_sin")
    if "k_new" in given:
        if "seqused_k" not in given:
            message = "must say how long each sequence is, as tokens are appended behind it"
            raise ArgumentError("seqused_k", message, reason="value")
        for name in ("k", "v"):
            checks.check_apart_within(name, given[name])
    if "rotary_cos" in given:
        _check_rotary(given, sizes)


def _check_pair(given: dict[str, Any], first: str, second: str) -> None:
    for name, other in ((first, second), (second, first)):
        if name not in given and other in given:
            raise ArgumentError(name, f"must be given with {other}", reason="value")


def _check_rotary(given: dict[str, Any], sizes: dict[str, int]) -> None:
    cos, sin = given["rotary_cos"], given["rotary_sin"]
    if "k_new" not in given:
        message = "needs the new k and v: only what is appended, and q, are rotated"
        raise ArgumentError("rotary_cos", message, reason="value")
    rotary_dim, positions, head_dim = sizes["rotary_dim"], sizes["positions"], sizes["head_dim"]
    if not 0 < rotary_dim <= head_dim or rotary_dim % ROTARY_STEP or positions == 0:
        message = (
            f"shape {tuple(cos.shape)}, must be (positions, rotary_dim / 2) with a position or more and a rotary_dim "
            f"that is a multiple of {ROTARY_STEP} up to head_dim, {head_dim}"
        )
        raise ArgumentError("rotary_cos", message, reason="shape")
    if cos.stride(0) != sin.stride(0) and positions > 1:
        message = f"row stride {sin.stride(0)}, must be rotary_cos's, {cos.stride(0)}"
        raise ArgumentError("rotary_sin", message, reason="stride")
    if positions > 1 and positions * cos.stride(0) > checks.MAX_I32:
        message = f"{positions} rows with a stride of {cos.stride(0)}, must be below 2**31 elements"
        raise ArgumentError("rotary_cos", message, reason="too_large")


# -- numbers ----------------------------------------------------------------------------------------------------------


def _strides(given: dict[str, Any], sizes: dict[str, int]) -> Numbers:
    """Of q, k, v, the output (`out`, or a new contiguous tensor), its LSE, slopes, and what is appended."""
    q, v, out = given["q"], given["v"], given.get("out")
    found: Numbers = {}
    for name in ("q", "k", "v", *APPENDED):
        if name in given:
            found |= numbers.strides(name, given[name].shape, given[name].stride())
    shape = (*q.shape[:-1], v.shape[-1])
    found |= numbers.contiguous("o", shape) if out is None else numbers.strides("o", shape, out.stride())
    found |= numbers.of_lse(sizes, sizes["heads_q"])
    sink = given.get("sink")
    found["sink_low"] = int(sink is not None and sink.element_size() == 2)
    found["alibi_stride_b"] = stride_of_slopes(given.get("alibi_slopes"), sizes["batch"])
    return found


def stride_of_slopes(slopes: Any, batch: int) -> int:
    """As `_stride_of_batch`; the kernels find a row of slopes with 32 bits. Raises ArgumentError."""
    stride = _stride_of_batch(slopes, batch)
    if stride and batch * stride + slopes.shape[1] > checks.MAX_I32:
        message = f"{batch} rows with a stride of {stride}, must be below 2**31 elements"
        raise ArgumentError("alibi_slopes", message, reason="too_large")
    return stride


def _stride_of_batch(tensor: Any, batch: int) -> int:
    """Elements from one entry's row to the next one's; 0 where one row serves all."""
    return tensor.stride(0) if tensor is not None and tensor.dim() == 2 and batch > 1 else 0


def _cache_numbers(given: dict[str, Any], sizes: dict[str, int], window: tuple[int, int], asked: Any) -> Numbers:
    batch, cos = sizes["batch"], given.get("rotary_cos")
    is_rotated = cos is not None
    return numbers.of_pages(sizes["page_size"]) | {
        "page_table_stride": _stride_of_batch(given.get("page_table"), batch),
        "k_descale_stride_b": _stride_of_batch(given.get("k_descale"), batch),
        "v_descale_stride_b": _stride_of_batch(given.get("v_descale"), batch),
        "seqlen_new": sizes.get("seqlen_new", 0),
        "seqlen_rotated": sizes.get("seqlen_q", 0) if is_rotated else 0,
        "rotary_dim": sizes.get("rotary_dim", 0),
        "rotary_rows": sizes.get("positions", 0),
        "rotary_stride": cos.stride(0) if cos is not None and sizes["positions"] > 1 else 0,
        "interleaved": options.flag("rotary_interleaved", asked.rotary_interleaved),
        "q_still": int(is_rotated and window == (WINDOW_OPEN, WINDOW_OPEN)),
    }


def _facts(request: Request, sizes: dict[str, int], window: tuple[int, int]) -> dict[str, Any]:
    asked, given, batch = request.options, request.tensors, sizes["batch"]
    seqlen_q, seqlen_k, total_q = _tokens(sizes, "q"), _tokens(sizes, "k"), sizes.get("total_q")
    mean_q, mean_k = (-(-tokens // batch) if batch else 0 for tokens in (seqlen_q, seqlen_k))
    hint_q = options.max_seqlen("max_seqlen_q", asked.max_seqlen_q, seqlen_q, mean_q)
    is_cached = request.op == "fwd_paged"
    hint_k = options.max_seqlen("max_seqlen_k", asked.max_seqlen_k, seqlen_k, seqlen_k if is_cached else mean_k)
    dtype = NAMES[str(given["q"].dtype)]
    found = numbers.facts(
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
    launches: list[Launch] = []
    workspaces: list[Workspace] = []
    written: tuple[str, ...] = ()
    elsewhere: dict[str, str] = {}
    found, sizes = call.numbers, call.sizes
    if rows := _append_rows(call):
        facts = {name: call.facts[name] for name in ("dtype", "kv_dtype", "head_dim", "head_dim_v")} | {"rows": rows}
        launches.append(
            maker.prepared("kv_append", facts, lambda _: (_append_numbers(call), 1, 1), _append_names(call))
        )
        written = ("k", "v") if call.numbers["seqlen_new"] else ()
    if call.numbers.get("rotary_dim"):
        shape = _rotated_shape(sizes)
        workspaces.append(Workspace("q_out", 2 * shape[0] * shape[1] * shape[2] * shape[3]))
        elsewhere["q"], found = "q_out", found | numbers.contiguous("q", shape)
    if sizes["batch"] == 0 or request.tensors["q"].numel() == 0:
        return Chain(tuple(launches), tuple(workspaces), written)
    num_splits = 1

    def of_forward(launch: Launch) -> tuple[Numbers, int, int]:
        nonlocal num_splits
        pack = _pack(call, launch.packs_heads)
        num_splits = _choose_splits(call, launch, pack)
        return found | numbers.of_pack(pack) | _split_numbers(call, num_splits), pack, num_splits

    attend = maker.prepared(call.op, call.facts, of_forward)
    launches.append(attend)
    if num_splits > 1:
        rows, head_dim_v = numbers.output_rows(sizes), sizes["head_dim_v"]
        workspaces += [Workspace("o_partial", 4 * num_splits * rows * head_dim_v)]
        workspaces += [Workspace("lse_partial", 4 * num_splits * rows)]
        elsewhere |= {"o": "o_partial", "lse": "lse_partial"}
        launches.append(_combine(call, maker, num_splits))
    if call.op == "fwd_paged":
        attend.rename(elsewhere)
    return Chain(tuple(launches), tuple(workspaces), written)


def outputs(call: Call, request: Request, torch: Any) -> Outputs:
    q, head_dim_v, varied = request.tensors["q"], call.sizes["head_dim_v"], _leaves_rows(call)
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    new_lse = partial(torch.empty, lse_shape, dtype=torch.float32, device=q.device)
    if head_dim_v != q.shape[-1]:
        new_out = lambda q: q.new_empty((*q.shape[:-1], head_dim_v))  # noqa: E731
    elif q.is_contiguous():
        new_out = torch.empty_like
    else:
        new_out = partial(torch.empty_like, memory_format=torch.contiguous_format)
    if not varied:
        return Outputs(new_out, new_lse, new_out, new_lse)
    zero_lse = partial(torch.zeros, lse_shape, dtype=torch.float32, device=q.device)
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


def _choose_splits(call: Call, launch: Launch, pack: int) -> int:
    """How many blocks share a tile's keys."""
    if call.num_splits:
        return call.num_splits
    facts, artifact = call.facts, launch.kernel.artifact
    keys = splits.visible_keys(facts["seqlen_q"], facts["seqlen_k"], call.window)
    variant = Variant.parse(artifact.variant)
    units, key_blocks = artifact.grid.blocks(facts, pack), -(-keys // variant.size("n"))
    return splits.num_splits(units, key_blocks, *launch.resident, heavy=splits.is_heavy(variant))


def _split_numbers(call: Call, num_splits: int) -> Numbers:
    """With several splits, o is contiguous partial outputs (splits, [batch,] seqlen_q, heads_q, head_dim_v)."""
    if num_splits == 1:
        return {"num_splits": 1, "o_stride_split": 0, "lse_stride_split": 0}
    rows, head_dim_v = numbers.output_rows(call.sizes), call.sizes["head_dim_v"]
    return numbers.contiguous("o", _output_shape(call.sizes)) | {
        "num_splits": num_splits,
        "o_stride_split": rows * head_dim_v,
        "lse_stride_split": rows,
    }


def _output_shape(sizes: dict[str, int]) -> tuple[int, ...]:
    outer = (sizes["total_q"],) if "total_q" in sizes else (sizes["batch"], sizes["seqlen_q"])
    return (*outer, sizes["heads_q"], sizes["head_dim_v"])


def _rotated_shape(sizes: dict[str, int]) -> tuple[int, int, int, int]:
    """Of the contiguous copy of q that `kv_append` rotates."""
    return sizes["batch"], sizes["seqlen_q"], sizes["heads_q"], sizes["head_dim"]


def _append_rows(call: Call) -> int:
    """Rows that `kv_append` writes: of K, of V, of a rotated q."""
    found, sizes = call.numbers, call.sizes
    rows = 2 * sizes["batch"] * int(found.get("seqlen_new", 0)) * sizes["heads_kv"]
    return rows + sizes["batch"] * int(found.get("seqlen_rotated", 0)) * sizes["heads_q"]


def _append_numbers(call: Call) -> Numbers:
    none = dict.fromkeys((f"{name}_stride_{axis}" for name in (*APPENDED, "q_out") for axis in "bsh"), 0)
    rotated = numbers.contiguous("q_out", _rotated_shape(call.sizes)) if call.numbers["rotary_dim"] else {}
    return none | call.numbers | rotated


def _append_names(call: Call) -> dict[str, str]:
    """Without rotation q is not read."""
    return {} if call.numbers["rotary_dim"] else {"q": "", "q_out": ""}


def _combine(call: Call, maker: Maker, num_splits: int) -> Launch:
    sizes, rows = call.sizes, numbers.output_rows(call.sizes)
    if rows > checks.MAX_I32:
        raise ArgumentError("q", f"{rows} rows of partial outputs, must be below 2**31; split it", reason="too_large")
    seqlen, heads = int(call.numbers["seqlen_q"]), sizes["heads_q"]
    lse = {"lse_stride_b": heads * seqlen, "lse_stride_s": 1, "lse_stride_h": seqlen}  # contiguous along seqlen
    found = {name: value for name, value in call.numbers.items() if name.startswith("o_stride")} | lse
    found |= {name.replace("lse", "lse_partial"): step for name, step in lse.items()}
    found |= {"o_partial_stride_split": rows * sizes["head_dim_v"], "lse_partial_stride_split": rows}
    found |= {"num_splits": num_splits, "partial_rows": rows, "seqlen": seqlen, "heads": heads}
    found["head_dim_v"] = sizes["head_dim_v"]
    facts = {"dtype": call.facts["dtype"], "head_dim": sizes["head_dim_v"], "head_dim_v": sizes["head_dim_v"]}
    names = {"o_partial": "o_partial", "lse_partial": "lse_partial"}  # not the arguments of flash_attn_combine
    return maker.prepared("fwd_combine", facts | {"rows": rows}, lambda _: (found, 1, 1), names)
