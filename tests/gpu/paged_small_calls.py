"""The few small calls of the ops behind KV caches that a sanitizer watches (see `small_calls`)."""

from __future__ import annotations

from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.calls import append, paged
from tests.gpu.combine_checks import OUT_DTYPES, Partials
from tests.gpu.dut import Dut
from tests.gpu.harness import made
from tests.gpu.inputs import DTYPES
from tests.gpu.paged_inputs import cache_dtype, is_low
from tests.support.call import CAUSAL, Append, Cache, Call, Dims

MODIFIED: dict[str, Any] = {"softcap": 15.0, "alibi": "batch"}


def calls(key: str) -> list[Call]:
    """Several key blocks and pages, splits and none, groups that come packed; columns of tables that nobody owns."""
    variant, step = Variant.parse(key), 16 if is_low(key) else 8
    if variant.op == "kv_append":
        return _appending(key, (64, 64))
    smaller = (variant.head_dim - step, variant.head_dim_v - step)
    keys, rows = (70, 0, 1, 150), (40, 0, 1, 7)
    tight = Cache(16, spare=0, descale="batch")
    return [
        paged(key, (4, 2), 2, keys, tight, num_splits=3, dims=smaller, sink="fp32", window=CAUSAL, **MODIFIED),
        paged(key, (2, 2), 1, (200, 33), Cache(None, "in order", spare=0)),
        paged(key, (3, 1), rows, keys, Cache(3, spare=0, descale="heads"), window=(33, 7), sink="low", **MODIFIED),
        paged(key, (2, 2), rows, keys, Cache(48), used_q=(38, 0, 1, 5), num_splits=1, window=CAUSAL),
        paged(key, (2, 1), 3, keys, tight, num_splits=2, leftpad=(33, -3, 1, 150), window=CAUSAL, alibi="heads"),
        *_appending(key, (variant.head_dim, variant.head_dim_v)),
    ]


def _appending(key: str, dims: Dims) -> list[Call]:
    """Into pages and into a contiguous cache with too little room; rotary both ways and none."""
    tight, before = Cache(16, spare=0, descale="batch"), (15, 0, 31)
    return [
        append(key, (4, 2), 3, before, Append(3, "halves", 16), tight, dims=dims, window=CAUSAL),
        append(key, (2, 2), 3, before, Append(3, "interleaved", 32), Cache(None), capacity=40, dims=dims),
        append(key, (2, 1), 1, before, Append(1), Cache(3, descale="heads"), dims=dims),
    ]


def launch(dut: Dut, key: str, device: str = "cuda") -> None:
    """Every small call, and those whose lengths point far outside the arrays: no check of values, they must only end.

    Each tensor is an allocation of its own, just as large as it must be: what lies beyond is nobody's.
    """
    variant = Variant.parse(key)
    if variant.op == "fwd_combine":
        for case in (Partials(3, 2, 5, 6, 72, "some empty"), Partials(40, 3, 1, 7, variant.head_dim_v, flat=True)):
            out, lse = (tight(x, device) for x in case.make("cpu"))
            dut.combine(out, lse, out_dtype=OUT_DTYPES[variant.dtype])
            dut.combine(out, lse, out_dtype=OUT_DTYPES[variant.dtype], return_lse=False)
        return
    for call in calls(key):
        run = made(call, "cpu")
        run(dut, **{name: tight(x, device) for name, x in run.given().items() if torch.is_tensor(x)})
    dims = (64, 64) if variant.op == "kv_append" else (variant.head_dim, variant.head_dim_v)
    for given in astray(key, dims, device):
        dut.kvcache(**given)


def tight(x: torch.Tensor, device: str) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).to(device)


def astray(key: str, dims: tuple[int, int], device: str) -> list[dict[str, Any]]:
    """Two entries with room for 48 tokens each, and lengths that are negative or claim more: kernels must cut them.

    And an entry all of whose pages are -1.
    """
    dtype = DTYPES[Variant.parse(key).dtype]

    def ones(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(shape, device=device).to(dtype)

    cache = {
        name: ones(6, 16, 1, dim, dtype=cache_dtype(key))
        for name, dim in zip(("k_cache", "v_cache"), dims, strict=True)
    }
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    lost = table.clone()
    lost[1] = -1  # as graphs are padded
    lengths = torch.tensor([-3, 2**30], dtype=torch.int32, device=device)
    padding = torch.tensor([2**30, -5], dtype=torch.int32, device=device)
    given = {"q": ones(2, 2, 2, dims[0]), **cache, "block_table": table, "cache_seqlens": lengths}
    new = {"k": ones(2, 2, 1, dims[0]), "v": ones(2, 2, 1, dims[1])}
    rotary = {"rotary_cos": ones(9, 8), "rotary_sin": ones(9, 8)}
    appending = {**given, **new, **rotary, "causal": True}
    return [
        given, {**given, "num_splits": 3}, {**given, "cache_leftpad": padding}, appending,
        {**appending, "block_table": lost, "cache_seqlens": torch.zeros_like(lengths) + 15},
    ]  # fmt: skip
