"""The backward's kernels on the CPU, from nothing but their parameters, and a registry that has them.

They compute as registry/ops says what the parameters mean: workspaces in the order of an mma's fragments, rows of
no sequence left alone, and nothing read that the launch before has not written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from registry import ops
from registry.contract import WINDOW_OPEN, Condition, DispatchRow, Grid, Index, Variant, sha256_hex
from tests.runtime.cache_kernels import DTYPES, FP32, INT, LN2, view
from tests.support.abis import ABIS, FWD

ROWS = 128
TILES = {64: "m64-n64-w4-s1", 128: "m64-n32-w4-s1"}  # of `bwd`, by head dims


def tokens(p: dict[str, Any], side: str, b: int) -> tuple[int, int]:
    """(first token in the array, number of tokens) of an entry's q or k."""
    first, n = 0, p[f"seqlen_{side}"]
    if p[f"cu_seqlens_{side}"]:
        ends = view(p[f"cu_seqlens_{side}"], INT, (p["batch"] + 1,), (1,)).tolist()
        first, n = ends[b], ends[b + 1] - ends[b]
    if p[f"seqused_{side}"]:
        n = min(n, view(p[f"seqused_{side}"], INT, (p["batch"],), (1,)).tolist()[b])
    if side == "k" and p["leftpad_k"]:
        padding = min(max(view(p["leftpad_k"], INT, (p["batch"],), (1,)).tolist()[b], 0), n)
        first, n = first + padding, n - padding
    return first, n


def array(p: dict[str, Any], name: str, dtype: torch.dtype, heads: int, dim: int, at: tuple[int, int, int],
          address: int | None = None) -> torch.Tensor:  # fmt: skip
    """(heads, tokens, dim). at: entry, first token, number of tokens."""
    b, first, n = at
    place = b * p[f"{name}_stride_b"] + first * p[f"{name}_stride_s"]
    start = p[name] if address is None else address
    assert start or n == 0
    strides = p[f"{name}_stride_h"], p[f"{name}_stride_s"], 1
    return view(start + place * dtype.itemsize, dtype, (heads, n, dim), strides)


def first_row(p: dict[str, Any], b: int) -> int:
    """Of an entry in the workspaces."""
    if p["cu_seqlens_q"]:
        return (tokens(p, "q", b)[0] // ROWS + b) * ROWS
    return b * -(-p["seqlen_q"] // ROWS) * ROWS


def workspace(p: dict[str, Any], name: str) -> torch.Tensor:
    """(heads_q, rows)"""
    assert p["rows"] % ROWS == 0
    return view(p[name], FP32, (p["heads_q"], p["rows"]), (p["rows"], 1))


def accumulator(p: dict[str, Any], dim: int) -> torch.Tensor:
    """(heads_q, rows / 16, 2, 8, dim / 8, 4, 2): row and column in their natural order, lanes in an mma's."""
    units, columns = p["rows"] // 16, dim // 8
    flat = view(p["dq_accum"], FP32, (p["heads_q"] * p["rows"] * dim,), (1,))
    return flat.view(p["heads_q"], units, columns, 8, 4, 2, 2).permute(0, 1, 5, 3, 2, 4, 6)


def preprocess(variant: Variant, p: dict[str, Any]) -> None:
    assert p["head_dim_v"] <= variant.head_dim_v and p["head_dim_accum"] % 32 == 0
    dtype, heads = DTYPES[variant.dtype], p["heads_q"]
    lse_log2, delta = workspace(p, "lse_log2"), workspace(p, "delta")
    lse_log2.fill_(torch.inf)
    delta.zero_()
    accumulator(p, p["head_dim_accum"]).zero_()
    if p["semaphores"]:
        view(p["semaphores"], INT, (heads * p["rows"] // 16,), (1,)).zero_()
    for b in range(p["batch"]):
        first, n = tokens(p, "q", b)
        o, dout = (array(p, name, dtype, heads, p["head_dim_v"], (b, first, n)).float() for name in ("o", "dout"))
        lse = view(p["lse"] + 4 * (b * p["lse_stride_b"] + first), FP32, (heads, n), (p["lse_stride_h"], 1))
        rows = slice(first_row(p, b), first_row(p, b) + n)
        lse_log2[:, rows] = torch.where(lse == -torch.inf, torch.inf, lse / LN2)
        delta[:, rows] = (o * dout).sum(2)
        if p["dlse"]:
            place = b * p["dlse_stride_b"] + first * p["dlse_stride_s"]
            delta[:, rows] -= view(p["dlse"] + 4 * place, FP32, (heads, n), (p["dlse_stride_h"], p["dlse_stride_s"]))


def backward(variant: Variant, p: dict[str, Any]) -> None:
    assert p["head_dim"] <= variant.head_dim and p["head_dim_v"] <= variant.head_dim_v
    assert p["heads_q"] // p["heads_kv"] % p["splits"] == 0
    assert (p["splits"] > 1) == bool(p["dk_partial"]) == bool(p["dv_partial"]) != bool(p["dk"])
    if p["semaphores"]:
        assert not view(p["semaphores"], INT, (p["heads_q"] * p["rows"] // 16,), (1,)).any()
    for b in range(p["batch"]):
        _entry(variant, p, b, (b, *tokens(p, "q", b)), (b, *tokens(p, "k", b)))


def _entry(variant: Variant, p: dict[str, Any], b: int, of_q: tuple[int, int, int], of_k: tuple[int, int, int]) -> None:
    dtype, heads, n = DTYPES[variant.dtype], p["heads_q"], (of_q[2], of_k[2])
    group = heads // p["heads_kv"]
    q = array(p, "q", dtype, heads, p["head_dim"], of_q).float()
    dout = array(p, "dout", dtype, heads, p["head_dim_v"], of_q).float()
    k = array(p, "k", dtype, p["heads_kv"], p["head_dim"], of_k).float().repeat_interleave(group, 0)
    v = array(p, "v", dtype, p["heads_kv"], p["head_dim_v"], of_k).float().repeat_interleave(group, 0)
    rows = slice(first_row(p, b), first_row(p, b) + n[0])
    distance = torch.arange(n[0])[:, None] + n[1] - n[0] - torch.arange(n[1])[None]
    scores, slope = q @ k.transpose(1, 2), torch.ones(())
    if p["softcap_scale"]:
        scores = torch.tanh(scores * p["softcap_scale"] * LN2 / 2)
        slope = 1 - scores**2
    if p["alibi_slopes"]:
        slopes = view(p["alibi_slopes"] + 4 * b * p["alibi_stride_b"], FP32, (heads,), (1,))
        scores = scores - p["slope_scale"] * slopes[:, None, None] * distance.abs()
    left, right = (bound if bound < WINDOW_OPEN else 1 << 40 for bound in (p["window_left"], p["window_right"]))
    weights = torch.exp2(scores * p["scale_log2"] - workspace(p, "lse_log2")[:, rows, None])
    weights = weights.masked_fill((distance > left) | (distance < -right), 0)
    dscores = weights * (dout @ v.transpose(1, 2) - workspace(p, "delta")[:, rows, None])
    ds = dscores * slope
    sums = accumulator(p, variant.head_dim)
    unit = slice(rows.start // 16, rows.start // 16 + -(-n[0] // 16))
    dq = torch.zeros(heads, 16 * (unit.stop - unit.start), variant.head_dim)
    dq[:, : n[0], : p["head_dim"]] = ds @ k
    sums[:, unit] += dq.view(heads, -1, 2, 8, variant.head_dim // 8, 4, 2)
    _write(p, "dk", dtype, p["head_dim"], of_k, p["softmax_scale"] * ds.transpose(1, 2) @ q)
    _write(p, "dv", dtype, p["head_dim_v"], of_k, weights.transpose(1, 2) @ dout)
    if p["dalibi"] and n[1]:
        tile = variant.size("n")
        row = of_k[1] // tile + b if p["cu_seqlens_k"] else b * -(-p["seqlen_k"] // tile)
        terms = -(dscores * distance.abs()).sum(1)  # (heads, keys)
        for i in range(-(-n[1] // tile)):
            of_tile = terms[:, i * tile : (i + 1) * tile].sum(1)
            view(p["dalibi"] + 4 * (row + i) * heads, FP32, (heads,), (1,)).copy_(of_tile)


def _write(p: dict[str, Any], name: str, dtype: torch.dtype, dim: int, at: tuple[int, int, int],
           grads: torch.Tensor) -> None:  # fmt: skip
    """grads: (heads_q, tokens, dim), to be summed over query heads; each split's, where there are several."""
    heads, splits = p["heads_kv"], p["splits"]
    parts = grads.view(heads, splits, p["heads_q"] // heads // splits, *grads.shape[1:]).sum(2)
    if splits == 1:
        array(p, name, dtype, heads, dim, at).copy_(parts[:, 0])
        return
    dense = not p["cu_seqlens_k"]
    strides = {f"{name}_stride_b": p["seqlen_k"] * heads * dim if dense else 0, f"{name}_stride_s": heads * dim,
               f"{name}_stride_h": dim}  # fmt: skip
    for split in range(splits):
        address = p[f"{name}_partial"] + 4 * split * p[f"{name}_partial_stride_split"]
        array(strides, name, FP32, heads, dim, at, address).copy_(parts[:, split])


def postprocess(variant: Variant, p: dict[str, Any]) -> None:
    assert p["head_dim"] <= p["head_dim_accum"]
    dim = p["head_dim_accum"]
    sums = accumulator(p, dim).reshape(p["heads_q"], p["rows"], dim)
    for b in range(p["batch"]):
        first, n = tokens(p, "q", b)
        dq = array(p, "dq", DTYPES[variant.dtype], p["heads_q"], p["head_dim"], (b, first, n))
        start = first_row(p, b)
        dq.copy_(p["softmax_scale"] * sums[:, start : start + n, : p["head_dim"]])


def sum_up(variant: Variant, p: dict[str, Any]) -> None:
    for name in ("dk", "dv"):
        n = p[f"{name}_elements"]
        parts = view(p[f"{name}_partial"], FP32, (p["splits"], n), (p[f"{name}_partial_stride_split"], 1))
        view(p[name], DTYPES[variant.dtype], (n,), (1,)).copy_(parts.sum(0))


KERNELS = {"bwd_preprocess": preprocess, "bwd": backward, "bwd_sum": sum_up, "bwd_postprocess": postprocess}


# -- a registry -------------------------------------------------------------------------------------------------------


def table() -> tuple[DispatchRow, ...]:
    rows = []
    for dtype in ("bf16", "fp16"):
        for d, tile in TILES.items():
            when = Condition("dtype", "==", dtype), Condition("head_dim", "<=", d), Condition("head_dim_v", "<=", d)
            rows.append(DispatchRow("bwd", when, f"bwd-{dtype}-d{d}-dv{d}-{tile}"))
        when = Condition("dtype", "==", dtype), Condition("head_dim", "<=", 256), Condition("head_dim_v", "<=", 256)
        for op in ("bwd_preprocess", "bwd_postprocess"):
            rows.append(DispatchRow(op, when, f"{op}-{dtype}-d256-dv256-m128"))
        rows.append(DispatchRow("bwd_sum", when, f"bwd_sum-{dtype}-d256-dv256-m8"))
    return tuple(rows)


def write_backward_registry(path: Path, arch: str = "sm_120") -> None:
    """As fakes.write_registry does, with the three ops beside the table there."""
    from registry.store import Store
    from tests.runtime import fakes

    made = [fakes.toy_artifact(v, arch) for *_, v in fakes.TABLE]
    for row in table():
        v = Variant.parse(row.variant)
        grid = Grid(ops.get(v.op).grid, v.size("n" if v.op == "bwd" else "m"))
        made.append(fakes.toy_artifact(v, arch, abi=ABIS[v.op], grid=grid, threads=128))
    abis = (FWD, *(ABIS[op] for op in KERNELS))
    index = Index(arch, "0.1", tuple(a for a, _ in made), (*fakes.rows(), *table()), abis)
    with Store(path) as store:
        for artifact, frame in made:
            store.put_artifact(sha256_hex(artifact.frame_sha256.encode()), artifact, frame)
        store.put_index(index, "stable")
