"""The kernels of a KV cache on the CPU, from nothing but their parameters, and a registry that has them.

They compute entry by entry as registry/ops says what the parameters mean, and read no page that they must not.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from registry.contract import WINDOW_OPEN, Condition, DispatchRow, Grid, Index, Variant, fast_divmod, sha256_hex
from tests.support.abis import ABIS, FWD

LN2 = 0.6931471805599453
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT, FP32, E4M3 = torch.int32, torch.float32, torch.float8_e4m3fn


def view(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Memory at an address as a tensor."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    n = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    raw = (ctypes.c_byte * (n * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, strides)


# -- the cache --------------------------------------------------------------------------------------------------------


def length(p: dict[str, Any], b: int, new: int) -> int:
    """Tokens of an entry, `new` ones included."""
    if not p["seqused_k"]:
        return p["seqlen_k"]
    return min(max(view(p["seqused_k"], INT, (p["batch"],), (1,)).tolist()[b] + new, 0), p["seqlen_k"])


def first_key(p: dict[str, Any], b: int, n: int) -> int:
    """Of the n tokens of an entry: those before it are padding."""
    if not p["leftpad_k"]:
        return 0
    return min(max(view(p["leftpad_k"], INT, (p["batch"],), (1,)).tolist()[b], 0), n)


def keys(p: dict[str, Any], name: str, dtype: torch.dtype, dim: int, b: int, n: int) -> torch.Tensor:
    """(n, heads_kv, dim): the first n keys or values of entry b, page by page; zeros for padding, which is not read."""
    size, first = p["page_size"], first_key(p, b, n)
    parts = [torch.zeros(first, p["heads_kv"], dim)]
    strides = p[f"{name}_stride_s"], p[f"{name}_stride_h"], 1
    for page in range(first // size, -(-n // size)):
        from_row = max(page * size, first)
        start = cache_row(p, name, dtype, dim, b, from_row).data_ptr()
        parts.append(view(start, dtype, (min((page + 1) * size, n) - from_row, p["heads_kv"], dim), strides).float())
    return torch.cat(parts)


def page_of(p: dict[str, Any], b: int, j: int) -> int:
    """The page of key j of entry b, negative for one that is lost."""
    assert (p["page_magic"], p["page_shift"]) == fast_divmod(p["page_size"])
    column = j // p["page_size"]
    if p["page_table"]:
        place = p["page_table"] + 4 * (b * p["page_table_stride"] + column)
        return int(view(place, INT, (1,), (1,)).item())
    assert column == 0
    return b


def cache_row(p: dict[str, Any], name: str, dtype: torch.dtype, dim: int, b: int, j: int) -> torch.Tensor:
    """(heads_kv, dim): key or value j of entry b, where the page table says."""
    page, row = max(page_of(p, b, j), 0), j % p["page_size"]
    place = page * p[f"{name}_stride_b"] + row * p[f"{name}_stride_s"]
    return view(p[name] + place * dtype.itemsize, dtype, (p["heads_kv"], dim), (p[f"{name}_stride_h"], 1))


def descale(p: dict[str, Any], name: str, b: int) -> torch.Tensor:
    """(heads_kv, 1)"""
    if not p[f"{name}_descale"]:
        return torch.ones(p["heads_kv"], 1)
    address = p[f"{name}_descale"] + 4 * b * p[f"{name}_descale_stride_b"]
    return view(address, FP32, (p["heads_kv"],), (1,))[:, None]


def kv_dtype(variant: Variant) -> torch.dtype:
    return E4M3 if "e4m3kv" in variant.features else DTYPES[variant.dtype]


# -- fwd_paged --------------------------------------------------------------------------------------------------------


def forward(variant: Variant, p: dict[str, Any]) -> None:
    assert p["head_dim"] <= variant.head_dim and p["head_dim_v"] <= variant.head_dim_v
    assert p["pack"] in (1, p["heads_q"] // p["heads_kv"]) and (p["pack_magic"], p["pack_shift"]) == fast_divmod(
        p["pack"]
    )
    assert p["num_splits"] == 1 or (p["lse"] and not p["seqused_q"])
    for b in range(p["batch"]):
        first, tokens = 0, p["seqlen_q"]
        if p["cu_seqlens_q"]:
            assert p["q_stride_b"] == p["o_stride_b"] == 0
            ends = view(p["cu_seqlens_q"], INT, (p["batch"] + 1,), (1,)).tolist()
            first, tokens = ends[b], ends[b + 1] - ends[b]
        if p["seqused_q"]:
            tokens = min(tokens, view(p["seqused_q"], INT, (p["batch"],), (1,)).tolist()[b])
        _entry(variant, p, b, first, tokens)


def _entry(variant: Variant, p: dict[str, Any], b: int, first: int, tokens: int) -> None:
    dtype, stored, heads = DTYPES[variant.dtype], kv_dtype(variant), p["heads_q"]
    n, group = length(p, b, p["seqlen_k_new"]), heads // p["heads_kv"]
    all_k = keys(p, "k", stored, p["head_dim"], b, n).to(dtype).float()
    all_v = keys(p, "v", stored, p["head_dim_v"], b, n).to(dtype).float()
    q = view(p["q"] + (b * p["q_stride_b"] + first * p["q_stride_s"]) * dtype.itemsize, dtype,
             (heads, tokens, p["head_dim"]), (p["q_stride_h"], p["q_stride_s"], 1)).float()  # fmt: skip
    splits, block = p["num_splits"], variant.size("n")
    blocks = -(-n // block)
    for split in range(splits):
        some = range(*(min(i * blocks // splits * block, n) for i in (split, split + 1)))
        scores = torch.zeros(heads, tokens, len(some))
        if len(some):
            k = (all_k[some.start : some.stop] * descale(p, "k", b)).repeat_interleave(group, 1)
            scores = _scores(p, b, torch.einsum("hqd,khd->hqk", q, k), n, torch.tensor(some))
        if p["sink"] and split == 0:
            sink = view(p["sink"], dtype if p["sink_low"] else FP32, (heads,), (1,)).float()
            scores = torch.cat((scores, sink[:, None, None].expand(-1, tokens, 1)), 2)
        weights = torch.nan_to_num(torch.softmax(scores, -1))[..., : len(some)]
        out = torch.zeros(heads, tokens, p["head_dim_v"])
        if len(some):
            v = all_v[some.start : some.stop].repeat_interleave(group, 1)
            out = torch.einsum("hqk,khd->hqd", weights, v) * descale(p, "v", b).repeat_interleave(group, 0)[:, None]
        result = FP32 if splits > 1 else dtype
        place = split * p["o_stride_split"] + b * p["o_stride_b"] + first * p["o_stride_s"]
        strides = p["o_stride_h"], p["o_stride_s"], 1
        view(p["o"] + place * result.itemsize, result, tuple(out.shape), strides).copy_(out)
        if p["lse"]:
            place = split * p["lse_stride_split"] + b * p["lse_stride_b"] + first
            view(p["lse"] + 4 * place, FP32, (heads, tokens), (p["lse_stride_h"], 1)).copy_(torch.logsumexp(scores, -1))


def _scores(p: dict[str, Any], b: int, scores: torch.Tensor, n: int, j: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, keys): scaled, capped, biased, masked."""
    heads, tokens, _ = scores.shape
    if p["softcap_scale"]:
        scores = torch.tanh(scores * p["softcap_scale"] * LN2 / 2)
    scores = scores * (p["scale_log2"] * LN2)
    i = torch.arange(tokens)[:, None] + n - tokens
    if p["alibi_slopes"]:
        slopes = view(p["alibi_slopes"] + 4 * b * p["alibi_stride_b"], FP32, (heads,), (1,))
        scores = scores - slopes[:, None, None] * (i - j).abs()
    left, right = (bound if bound < WINDOW_OPEN else 1 << 40 for bound in (p["window_left"], p["window_right"]))
    return scores.masked_fill((j < i - left) | (j > i + right) | (j < first_key(p, b, n)), -torch.inf)


# -- fwd_combine ------------------------------------------------------------------------------------------------------


def combine(variant: Variant, p: dict[str, Any]) -> None:
    splits, heads, seqlen, dim = p["num_splits"], p["heads"], p["seqlen"], p["head_dim_v"]
    batch = p["rows"] // max(heads * seqlen, 1)
    assert batch * seqlen * heads == p["rows"] and dim <= variant.head_dim_v
    part = view(p["o_partial"], FP32, (splits, batch, seqlen, heads, dim),
                (p["o_partial_stride_split"], seqlen * heads * dim, heads * dim, dim, 1))  # fmt: skip
    of_parts = view(p["lse_partial"], FP32, (splits, batch, seqlen, heads), (p["lse_partial_stride_split"], *(
        p[f"lse_partial_stride_{axis}"] for axis in "bsh")))  # fmt: skip
    lse = torch.logsumexp(of_parts, 0)
    weights = torch.nan_to_num(torch.exp(of_parts - lse))
    out = torch.where(weights[..., None] > 0, weights[..., None] * part, 0).sum(0)
    o = view(p["o"], DTYPES[variant.dtype], tuple(out.shape), (*(p[f"o_stride_{axis}"] for axis in "bsh"), 1))
    o.copy_(out)
    if p["lse"]:
        view(p["lse"], FP32, tuple(lse.shape), tuple(p[f"lse_stride_{axis}"] for axis in "bsh")).copy_(lse)


# -- kv_append --------------------------------------------------------------------------------------------------------


def append(variant: Variant, p: dict[str, Any]) -> None:
    dtype, stored = DTYPES[variant.dtype], kv_dtype(variant)
    for b in range(p["batch"]):
        start = view(p["seqused_k"], INT, (p["batch"],), (1,)).tolist()[b]
        for i in range(p["seqlen_new"]):
            for name, dim in (("k", p["head_dim"]), ("v", p["head_dim_v"])):
                row = _row(p, f"{name}_new", dtype, p["heads_kv"], dim, b, i)
                if name == "k":
                    row = _rotate(p, dtype, row, start + i)
                if 0 <= start + i < p["seqlen_k"] and page_of(p, b, start + i) >= 0:
                    row = row / descale(p, name, b) if stored == E4M3 else row
                    cache_row(p, name, stored, dim, b, start + i).copy_(row.clamp(-448, 448) if stored == E4M3 else row)
        for i in range(p["seqlen_q"]):
            row = _row(p, "q", dtype, p["heads_q"], p["head_dim"], b, i)
            rotated = _rotate(p, dtype, row, start if p["q_still"] else start + i)
            _row(p, "q_out", dtype, p["heads_q"], p["head_dim"], b, i, write=rotated)


def _row(p: dict[str, Any], name: str, dtype: torch.dtype, heads: int, dim: int, b: int, i: int,
         write: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    place = b * p[f"{name}_stride_b"] + i * p[f"{name}_stride_s"]
    found = view(p[name] + place * dtype.itemsize, dtype, (heads, dim), (p[f"{name}_stride_h"], 1))
    if write is not None:
        found.copy_(write)
    return found.float()


def _rotate(p: dict[str, Any], dtype: torch.dtype, row: torch.Tensor, position: int) -> torch.Tensor:
    half = p["rotary_dim"] // 2
    if not half:
        return row
    at = min(max(position, 0), p["rotary_rows"] - 1) * p["rotary_stride"] * dtype.itemsize
    cos, sin = (view(p[f"rotary_{name}"] + at, dtype, (half,), (1,)).float() for name in ("cos", "sin"))
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if p["interleaved"] else (
        slice(half), slice(half, 2 * half))  # fmt: skip
    a, b, row = row[:, first], row[:, second], row.clone()
    row[:, first], row[:, second] = a * cos - b * sin, a * sin + b * cos
    return row


KERNELS = {"fwd_paged": forward, "fwd_combine": combine, "kv_append": append}


# -- a registry -------------------------------------------------------------------------------------------------------


def table() -> tuple[DispatchRow, ...]:
    """Rows of the three ops: head dims 64 and 128 for the forward, packed wherever heads share keys."""
    rows = []
    for dtype in ("bf16", "fp16", "fp32"):
        of_dtype = Condition("dtype", "==", dtype)
        rows.append(DispatchRow("fwd_combine", (of_dtype,), f"fwd_combine-{dtype}-d256-dv256-m4"))
        for suffix, kv in (("", dtype), ("-e4m3kv", "e4m3")):
            when = (of_dtype, Condition("kv_dtype", "==", kv))
            if dtype == "fp32":
                continue
            rows.append(DispatchRow("kv_append", when, f"kv_append-{dtype}-d256-dv256-m4{suffix}"))
            for d in (64, 128):
                dims = (Condition("head_dim", "<=", d), Condition("head_dim_v", "<=", d))
                key = f"fwd_paged-{dtype}-d{d}-dv{d}-m16-n32-w1-s2-q8{suffix}"
                rows.append(DispatchRow("fwd_paged", (*when, *dims, Condition("group", ">=", 2)), key, pack=True))
                rows.append(DispatchRow("fwd_paged", (*when, *dims), key))
    return tuple(rows)


def write_cache_registry(path: Path, arch: str = "sm_120") -> None:
    """As fakes.write_registry does, with the three ops beside the table there."""
    from registry.store import Store
    from tests.runtime import fakes

    variants = [Variant.parse(key) for key in dict.fromkeys(row.variant for row in table())]
    made = [fakes.toy_artifact(v, arch) for *_, v in fakes.TABLE]
    for v in variants:
        grid = Grid("tiles_heads_batch" if v.op == "fwd_paged" else "rows", v.size("m"))
        made.append(fakes.toy_artifact(v, arch, abi=ABIS[v.op], grid=grid, threads=32))
    index = Index(arch, "0.1", tuple(a for a, _ in made), (*fakes.rows(), *table()), (FWD, *(
        ABIS[op] for op in KERNELS)))  # fmt: skip
    with Store(path) as store:
        for artifact, frame in made:
            store.put_artifact(sha256_hex(artifact.frame_sha256.encode()), artifact, frame)
        store.put_index(index, "stable")
