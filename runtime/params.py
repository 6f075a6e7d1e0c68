"""The parameters of each op that a plan holds, by name with their types: all but the addresses of its call slots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from registry.contract import division
from runtime.arguments import Arguments, Call
from runtime.cached import Cached

LOG2E = math.log2(math.e)
ABSENT = ("o_partial", "lse_partial", "k_descale", "v_descale")  # of op `fwd`, which leaves them to fwd_paged
Steps = tuple[int, int, int]  # strides in elements of batch, seqlen, heads
Typed = dict[str, tuple[str, int | float]]  # name -> (type, value)
ROWS = 128  # of queries, to whose multiples the backward's workspaces round
SUM_UNIT = 256  # elements of dk or dv that are a row of `bwd_sum`'s grid


def steps(shape: Sequence[int], strides: Sequence[int]) -> Steps:
    """Of batch (0 of a packed array), tokens, heads; 0 where there is but one entry: torch leaves that stride open."""
    found = [step if n > 1 else 0 for n, step in zip(shape[:-1], strides[:-1], strict=True)]
    batch, tokens, heads = found if len(found) == 3 else (0, *found)
    return batch, tokens, heads


def contiguous(shape: Sequence[int], head_dim: int) -> Steps:
    """Of a new tensor like one of this shape, but for its head_dim."""
    *outer, tokens, heads, _ = shape
    row = (heads * head_dim, head_dim, 1)
    return steps(shape, (tokens * row[0], *row) if outer else row)


def all_steps(given: Arguments) -> dict[str, Steps]:
    """Of q, k, v, and o, which is `out` or a new contiguous tensor."""
    q, k, v, out = given.q, given.k, given.v, given.out
    found = {name: steps(tensor.shape, tensor.stride()) for name, tensor in (("q", q), ("k", k), ("v", v))}
    return found | {"o": contiguous(q.shape, v.shape[-1]) if out is None else steps(out.shape, out.stride())}


def _strides(tensors: Mapping[str, Steps]) -> Typed:
    return {
        f"{name}_stride_{axis}": ("i64", step)
        for name, of_tensor in tensors.items()
        for axis, step in zip("bsh", of_tensor, strict=True)
    }


def _typed(kind: str, values: Mapping[str, int]) -> Typed:
    return {name: (kind, value) for name, value in values.items()}


def forward(call: Call, tensors: Mapping[str, Steps], pack: int, splits: int = 1) -> Typed:
    """Of op `fwd`, or `fwd_paged` for a call with a cache.

    tensors: of q, k, v and o. With several splits, o is contiguous partial outputs instead (splits, [batch,] seqlen_q,
    heads_q, head_dim_v); a q that is rotated is a contiguous copy.
    """
    facts = call.facts
    left, right = call.window
    magic, shift = division(pack)
    packed = bool(facts["varlen"])
    i32 = {name: facts[name] for name in ("batch", "heads_q", "heads_kv", "head_dim", "head_dim_v")}
    i32 |= {"seqlen_q": call.seqlen_q, "seqlen_k": call.seqlen_k, "window_left": left, "window_right": right}
    i32 |= {"pack": pack, "pack_shift": shift, "sink_low": call.sink_low, "alibi_stride_b": call.alibi_stride_b}
    i64 = {"pack_magic": magic, "lse_stride_h": call.seqlen_q}
    i64["lse_stride_b"] = 0 if packed else facts["heads_q"] * call.seqlen_q
    found = _scales(call)
    if call.cached is None:
        found |= {name: ("ptr", 0) for name in ABSENT}
        i32 |= {"page_size": 0, "page_table_stride": 0, "num_splits": 1}
        return found | _strides(tensors) | _typed("i64", i64) | _typed("i32", i32)
    cache, rows, heads, head_dim_v = call.cached, partial_rows(call), facts["heads_q"], facts["head_dim_v"]
    if cache.rotary_dim:
        tensors = {**tensors, "q": rotated_steps(call)}
    if splits > 1:
        row = heads * head_dim_v
        tensors = {**tensors, "o": (0 if packed else call.seqlen_q * row, row, head_dim_v)}
    i64 |= {"o_stride_split": rows * head_dim_v, "lse_stride_split": rows} if splits > 1 else NO_SPLIT
    i64["page_magic"], i32["page_shift"] = division(max(cache.page_size, 1))
    i32 |= {"page_size": cache.page_size, "page_table_stride": cache.page_table_stride, "num_splits": splits}
    i32 |= {"k_descale_stride_b": cache.k_descale_stride_b, "v_descale_stride_b": cache.v_descale_stride_b}
    i32["seqlen_k_new"] = cache.seqlen_new
    return found | _strides(tensors) | _typed("i64", i64) | _typed("i32", i32)


def _scales(call: Call) -> Typed:
    scale, softcap = call.scale, call.softcap
    return {
        "scale_log2": ("f32", (softcap or scale) * LOG2E),
        "softcap_scale": ("f32", 2 * LOG2E * scale / softcap if softcap else 0.0),
    }


def rotated_steps(call: Call) -> Steps:
    """Of the contiguous copy of q that `kv_append` rotates."""
    shape = call.facts["batch"], call.seqlen_q, call.facts["heads_q"], call.facts["head_dim"]
    return contiguous(shape, shape[3])


NO_SPLIT = {"o_stride_split": 0, "lse_stride_split": 0}


def partial_rows(call: Call) -> int:
    """Rows of the output: a row is one head of one query."""
    batch = 1 if call.facts["varlen"] else call.facts["batch"]
    rows: int = batch * call.seqlen_q * call.facts["heads_q"]
    return rows


def combine(shape: tuple[int, int, int, int, int], splits: tuple[int, int], lse_partial: Steps, o: Steps,
            lse: Steps) -> Typed:  # fmt: skip
    """Of op `fwd_combine`. shape: (splits, batch, seqlen, heads, head_dim_v). splits: strides of o_partial and
    lse_partial from split to split."""
    num_splits, batch, seqlen, heads, head_dim_v = shape
    i32 = {"num_splits": num_splits, "rows": batch * seqlen * heads, "seqlen": seqlen, "heads": heads}
    i64 = {"o_partial_stride_split": splits[0], "lse_partial_stride_split": splits[1]}
    tensors = {"lse_partial": lse_partial, "o": o, "lse": lse}
    return _strides(tensors) | _typed("i64", i64) | _typed("i32", i32 | {"head_dim_v": head_dim_v})


def append(call: Call, cache: Cached, tensors: Mapping[str, Steps]) -> Typed:
    """Of op `kv_append`. tensors: of k_new, v_new, k, v, q and q_out."""
    magic, shift = division(max(cache.page_size, 1))
    facts = call.facts
    i32 = {name: facts[name] for name in ("batch", "heads_q", "heads_kv", "head_dim", "head_dim_v")}
    seqlen_q = call.seqlen_q if cache.rotary_dim else 0
    i32 |= {"seqlen_new": cache.seqlen_new, "seqlen_q": seqlen_q, "seqlen_k": call.seqlen_k}
    i32 |= {name: getattr(cache, name) for name in ("rotary_dim", "rotary_rows", "rotary_stride", "interleaved")}
    i32 |= {name: getattr(cache, name) for name in ("page_size", "page_table_stride", "q_still")}
    i32 |= {"k_descale_stride_b": cache.k_descale_stride_b, "v_descale_stride_b": cache.v_descale_stride_b}
    return _strides(tensors) | _typed("i64", {"page_magic": magic}) | _typed("i32", i32 | {"page_shift": shift})


def append_rows(call: Call, cache: Cached) -> int:
    """Rows that `kv_append` writes: of K, of V, of a rotated q."""
    facts = call.facts
    rows: int = 2 * facts["batch"] * cache.seqlen_new * facts["heads_kv"]
    if cache.rotary_dim:
        rows += facts["batch"] * call.seqlen_q * facts["heads_q"]
    return rows


def backward_rows(call: Call) -> int:
    """Rows of a head in the backward's workspaces; `kernels/abi.py` says which query has which."""
    batch: int = call.facts["batch"]
    if call.facts["varlen"]:
        return (call.seqlen_q // ROWS + batch) * ROWS
    return batch * -(-call.seqlen_q // ROWS) * ROWS


def bwd_preprocess(call: Call, tensors: Mapping[str, Steps], head_dim_accum: int) -> Typed:
    """Of op `bwd_preprocess`. tensors: of o, dout and dlse. head_dim_accum: of dq_accum."""
    facts = call.facts
    i32 = {name: facts[name] for name in ("batch", "heads_q", "head_dim_v")}
    i32 |= {"seqlen_q": call.seqlen_q, "head_dim_accum": head_dim_accum}
    i64 = {"rows": backward_rows(call), "lse_stride_h": call.seqlen_q}
    i64["lse_stride_b"] = 0 if facts["varlen"] else facts["heads_q"] * call.seqlen_q
    return _strides(tensors) | _typed("i64", i64) | _typed("i32", i32)


def bwd(call: Call, tensors: Mapping[str, Steps], splits: int, stride_split: int) -> Typed:
    """Of op `bwd`. tensors: of q, k, v, dout, dk and dv. stride_split: from split to split of the partial sums."""
    left, right = call.window
    i32 = {name: call.facts[name] for name in ("batch", "heads_q", "heads_kv", "head_dim", "head_dim_v")}
    i32 |= {"seqlen_q": call.seqlen_q, "seqlen_k": call.seqlen_k, "window_left": left, "window_right": right}
    i32 |= {"splits": splits, "alibi_stride_b": call.alibi_stride_b}
    i64 = dict.fromkeys(("dk_partial_stride_split", "dv_partial_stride_split"), stride_split)
    i64["rows"] = backward_rows(call)
    found = _scales(call)
    found |= {"slope_scale": ("f32", 1 / (call.softcap or call.scale)), "softmax_scale": ("f32", call.scale)}
    return found | _strides(tensors) | _typed("i64", i64) | _typed("i32", i32)


def bwd_sum(splits: int, stride_split: int, elements: tuple[int, int]) -> Typed:
    """Of op `bwd_sum`. stride_split: as in `bwd`. elements: of dk and dv."""
    i64 = dict.fromkeys(("dk_partial_stride_split", "dv_partial_stride_split"), stride_split)
    i64 |= dict(zip(("dk_elements", "dv_elements"), elements, strict=True))
    return _typed("i64", i64) | _typed("i32", {"splits": splits})


def sum_rows(elements: tuple[int, int]) -> int:
    """What `bwd_sum` counts as rows."""
    return sum(-(-n // SUM_UNIT) for n in elements)


def bwd_postprocess(call: Call, dq: Steps, head_dim_accum: int) -> Typed:
    """Of op `bwd_postprocess`."""
    i32 = {name: call.facts[name] for name in ("batch", "heads_q", "head_dim")}
    i32 |= {"seqlen_q": call.seqlen_q, "head_dim_accum": head_dim_accum}
    found: Typed = {"softmax_scale": ("f32", call.scale)}
    return found | _strides({"dq": dq}) | _typed("i64", {"rows": backward_rows(call)}) | _typed("i32", i32)
