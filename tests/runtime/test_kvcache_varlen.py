"""`flash_attn_varlen` and the drop-ins over a cache of pages: packed queries, totals that change, splits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import runtime
from runtime import fa4
from runtime.api import attention
from runtime.errors import ArgumentError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, inputs, reference
from tests.support.kvcache import E4M3, Cache
from tests.support.varlen import ints, packed

LENGTHS = (9, 1, 70, 5)


pytestmark = pytest.mark.usefixtures("cache_registry")


def step(queries=(3, 1, 7, 1), lengths=LENGTHS, max_pages=20):
    """(arguments, cache) of chunked prefill mixed with decode."""
    torch.manual_seed(5)
    cache = Cache(lengths, max_pages=max_pages)
    ends = ints(0, *torch.tensor(queries).cumsum(0).tolist())
    q = torch.randn(sum(queries), 4, cache.k.shape[3]).to(BF16)
    return {"q": q, "k": cache.k, "v": cache.v, "cu_seqlens_q": ends, "page_table": cache.table,
            "seqused_k": cache.lengths}, cache  # fmt: skip


def close(given, cache, out, lse, **options):
    for b, (first, last) in enumerate(pairwise(given["cu_seqlens_q"].tolist())):
        q, n = given["q"][None, first:last], cache.lengths[b].item()
        want, want_lse = reference(q, cache.entry(cache.k, b, n), cache.entry(cache.v, b, n), **options)
        torch.testing.assert_close(out[None, first:last].double(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[None, :, first:last], want_lse.float(), atol=1e-3, rtol=1e-4)


def check(given, cache, num_splits=0, hints=(None, None), **options):
    out, lse = runtime.flash_attn_varlen(**given, num_splits=num_splits, max_seqlen_q=hints[0], max_seqlen_k=hints[1],
                                         return_lse=True, **options)  # fmt: skip
    assert out.shape == given["q"].shape and lse.shape == (4, len(given["q"]))
    close(given, cache, out, lse, **options)
    return out


@pytest.mark.parametrize("num_splits", [0, 1, 2, 4])
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (3, 0)}, {"softcap": 0.7, "sink": torch.tensor([1.0, -2, 0, 5])},
], ids=lambda options: " ".join(options))  # fmt: skip
def test_packed_queries(backend: FakeBackend, num_splits, options):
    for _ in range(2):
        check(*step(), num_splits, **options)
    check(*step(queries=(0, 5, 0, 1), lengths=(4, 8, 0, 0)), num_splits, **options)


def test_the_parameter_buffers_of_packed_queries(backend: FakeBackend):
    given, _ = step()
    out = torch.empty(12, 8, 64, dtype=BF16)[:, ::2]
    found, _ = runtime.flash_attn_varlen(**given, num_splits=2, return_lse=True, out=out)
    assert found is out
    forward, combine = (made["params"] for made in backend.driver.launches)
    assert (forward["q_stride_b"], forward["o_stride_b"], forward["o_stride_s"], forward["o_stride_h"]) == (
        0,
        0,
        256,
        64,
    )
    assert (forward["o_stride_split"], forward["lse_stride_split"]) == (12 * 4 * 64, 48)
    assert (forward["lse_stride_b"], forward["lse_stride_h"]) == (0, 12)
    assert (forward["batch"], forward["seqlen_q"], forward["seqlen_k"]) == (4, 12, 80)
    assert backend.driver.launches[0]["grid"] == ((12 * 2 // 16 + 4) * 2 * 2, 1, 1)
    assert [combine[f"o_stride_{axis}"] for axis in "bsh"] == [0, 512, 128]
    assert [combine[f"lse_stride_{axis}"] for axis in "bsh"] == [48, 1, 12]
    assert (combine["rows"], combine["seqlen"], combine["heads"]) == (48, 12, 4)
    runtime.flash_attn_varlen(**given, num_splits=1, out=out)
    p = backend.driver.launches[-1]["params"]
    assert (p["o_stride_s"], p["o_stride_h"], p["o_stride_split"], p["lse"]) == (512, 128, 0, 0)


def test_other_totals_and_hints_need_no_plan(backend: FakeBackend, monkeypatch):
    for _ in range(2):
        for queries in ((1, 1, 1, 1), (3, 1, 7, 1), (40, 1, 1, 0), (2, 0, 0, 0)):
            for hints in ((None, None), (max(queries), max(LENGTHS))):
                check(*step(queries, max_pages=500), hints=hints)
    assert len(plans.plans.families) == 1
    assert backend.driver.calls.count("load_library") == 2
    made = [m for m in backend.driver.launches if "paged" in m["variant"]]
    for m in made:
        p = m["params"]
        assert m["grid"][0] == (p["seqlen_q"] * 2 // 16 + 4) * 2 * p["num_splits"]
    splits = [m["params"]["num_splits"] for m in made]
    assert min(splits) >= 1 and len(set(splits)) > 2
    given, cache = step(max_pages=500)
    check(given, cache)
    monkeypatch.setattr(attention, "prepare", None)
    check(given, cache)


def test_dense_queries_and_seqused_q(backend: FakeBackend):
    cache, q = Cache((5, 1, 17), max_pages=500), torch.randn(3, 4, 4, 64).to(BF16)  # long enough to be split
    given = {"k": cache.k, "v": cache.v, "page_table": cache.table, "seqused_k": cache.lengths}
    used, out = ints(4, 0, 2), torch.full((3, 4, 4, 64), 9.0, dtype=BF16)
    runtime.flash_attn_varlen(q, **given, seqused_q=used, out=out, causal=True)
    for b, n in enumerate(used.tolist()):
        want, _ = cache.wanted(q[:, :n], b, cache.lengths[b].item(), causal=True)
        torch.testing.assert_close(out[b : b + 1, :n].double(), want, atol=2e-2, rtol=2e-2)
        assert (out[b, n:] == 9).all()
    assert [m["params"]["num_splits"] for m in backend.driver.launches] == [1]
    for _ in range(2):
        with pytest.raises(ArgumentError, match="seqused_q") as error:
            runtime.flash_attn_varlen(q, **given, seqused_q=used, num_splits=2)
        assert (error.value.argument, error.value.reason) == ("num_splits", "unsupported")
    check(*step(), num_splits=1)


def test_dense_keys_can_be_split(backend: FakeBackend):
    q, k, v = inputs(seqlen_q=2, seqlen_k=90)
    used = ints(70, 3)
    out = runtime.flash_attn_varlen(q, k, v, seqused_k=used, num_splits=3, causal=True)
    assert [m["params"]["num_splits"] for m in backend.driver.launches] == [3, 3]
    for b, n in enumerate(used.tolist()):
        want, _ = reference(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True)
        torch.testing.assert_close(out[b : b + 1].double(), want, atol=2e-2, rtol=2e-2)
    for num_splits in (0, 1):
        runtime.flash_attn_varlen(q, k, v, seqused_k=used, num_splits=num_splits)
        assert backend.driver.launches[-1]["variant"].startswith("fwd-")
    low = [x.to(E4M3) for x in (k, v)]
    one = torch.tensor([2.0, 1.0])
    out = runtime.flash_attn_varlen(q, *low, seqused_k=used, k_descale=one)
    want, _ = reference(q[1:], low[0][1:, :3].float() * one[:, None], low[1][1:, :3].float())
    torch.testing.assert_close(out[1:].double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_fa4_over_pages(backend: FakeBackend, num_splits):
    given, cache = step()
    call = {name: given[name] for name in ("cu_seqlens_q", "seqused_k", "page_table")}
    out, lse = fa4.flash_attn_varlen_func(given["q"], cache.k, cache.v, **call, causal=True, num_splits=num_splits,
                                          return_lse=True)  # fmt: skip
    close(given, cache, out, lse, causal=True)
    dense = torch.randn(4, 2, 4, 64).to(BF16)
    out, lse = fa4.flash_attn_varlen_func(dense, cache.k, cache.v, seqused_k=cache.lengths, page_table=cache.table,
                                          num_splits=num_splits)  # fmt: skip
    assert lse is None
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(out[b : b + 1].double(), cache.wanted(dense, b, n)[0], atol=2e-2, rtol=2e-2)


def test_fa2_over_pages(backend: FakeBackend):
    """Its lengths are the differences of cu_seqlens_k, unless seqused_k has them."""
    given, cache = step()
    ends_k = ints(0, *cache.lengths.cumsum(0).tolist())
    for lengths in ({"cu_seqlens_k": ends_k}, {"cu_seqlens_k": ends_k * 3, "seqused_k": cache.lengths},
                    {"seqused_k": cache.lengths}):  # fmt: skip
        out, lse, _ = runtime.flash_attn_varlen_func(
            given["q"], cache.k, cache.v, given["cu_seqlens_q"], max_seqlen_q=7, max_seqlen_k=70, causal=True,
            return_attn_probs=True, block_table=cache.table, num_splits=0, **lengths,
        )  # fmt: skip
        close(given, cache, out, lse, causal=True)


@pytest.mark.parametrize(("changes", "argument"), [
    ({"block_table": ints(0, 1)}, "block_table"), ({"cu_seqlens_k": ints(0, 1)}, "cu_seqlens_k"),
    ({"cu_seqlens_k": torch.arange(5)}, "cu_seqlens_k"), ({"cu_seqlens_k": [0, 1]}, "cu_seqlens_k"),
    ({"num_splits": 500}, "num_splits"), ({"seqused_k": ints(1)}, "seqused_k"),
], ids=str)  # fmt: skip
def test_fa2_names_its_own_arguments(backend: FakeBackend, changes, argument):
    given, cache = step()
    options = {"cu_seqlens_q": given["cu_seqlens_q"], "cu_seqlens_k": ints(0, 1, 2, 3, 4), "block_table": cache.table}
    with pytest.raises(ArgumentError) as error:
        runtime.flash_attn_varlen_func(given["q"], cache.k, cache.v, **options | changes)
    assert error.value.argument == argument


def bad(**changes):
    given, _ = step()
    return given | changes


CASES = {
    "cu_seqlens_k": (bad(cu_seqlens_k=ints(0, 1, 2, 3, 4)), "page_table", "unsupported"),
    "page_table dtype": (bad(page_table=torch.zeros(4, 20)), "page_table", "dtype"),
    "page_table rank": (bad(page_table=ints(0, 1, 2, 3)), "page_table", "rank"),
    "page_table batch": (bad(page_table=torch.zeros(3, 20, dtype=torch.int32)), "page_table", "shape"),
    "page_table columns": (bad(page_table=torch.zeros(20, 4, dtype=torch.int32).T), "page_table", "contiguity"),
    "page_table device": (bad(page_table=torch.zeros(4, 20, dtype=torch.int32, device="meta")), "page_table", "device"),
    "k packed": (bad(k=torch.zeros(9, 2, 64, dtype=BF16)), "k", "rank"),
    "v pages": (bad(v=torch.zeros(3, 4, 2, 64, dtype=BF16)), "v", "shape"),
    "k fp8 alone": (bad(k=torch.zeros(3, 4, 2, 64).to(E4M3)), "v", "dtype"),
    "v fp8 alone": (bad(v=torch.zeros(3, 4, 2, 64).to(E4M3)), "v", "dtype"),
    "q fp8": (bad(q=torch.zeros(12, 4, 64).to(E4M3)), "q", "dtype"),
    "descales of bf16": (bad(k_descale=torch.ones(2)), "k_descale", "unsupported"),
    "num_splits": (bad(num_splits=257), "num_splits", "value"),
    "num_splits negative": (bad(num_splits=-1), "num_splits", "value"),
    "num_splits kind": (bad(num_splits=2.5), "num_splits", "value"),
    "max_seqlen_k": (bad(max_seqlen_k=ints(3, 4)), "max_seqlen_k", "value"),
    "seqused_k": (bad(seqused_k=ints(1, 2)), "seqused_k", "shape"),
    "splits of packed keys": (packed() | {"num_splits": 2}, "num_splits", "unsupported"),
    "descales of packed keys": (packed() | {"k_descale": torch.ones(2)}, "cu_seqlens_k", "unsupported"),
}


@pytest.mark.parametrize(("given", "argument", "reason"), CASES.values(), ids=CASES)
def test_refusals(backend: FakeBackend, given, argument, reason):
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_varlen(**given)
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    assert not backend.driver.launches and not plans.plans.by_call


def test_a_table_too_wide_is_refused(backend: FakeBackend):
    given, _ = step()
    given["k"], given["v"] = (x[:, :1].expand(-1, 2**26, -1, -1) for x in (given["k"], given["v"]))
    with pytest.raises(ArgumentError, match="together they must be") as error:
        runtime.flash_attn_varlen(**given)
    assert error.value.reason == "too_large"
