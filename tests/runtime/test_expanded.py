"""K and V whose heads are one, as `expand` makes them, run as MQA: one head is read, and shared by all query heads."""

from __future__ import annotations

import pytest
import torch

import runtime
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, inputs
from tests.support.backward import assert_close, grads, leaves
from tests.support.kvcache import E4M3, Cache, queries
from tests.support.varlen import ints, packed


def expanded(*tensors, heads=4):
    """The same head that many times, at no cost in memory."""
    return [x[..., :1, :].expand(*x.shape[:-2], heads, x.shape[-1]) for x in tensors]


def both(function, *tensors, **options):
    """(out, lse) of expanded tensors and of contiguous copies of them."""
    return [function(*given, **options) for given in (tensors, [x.contiguous() for x in tensors])]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1), "softcap": 0.8}, {"sink": torch.rand(4)},
                                     {"alibi_slopes": torch.rand(2, 4)}], ids=" ".join)  # fmt: skip
def test_dense(backend: FakeBackend, options):
    q, k, v = inputs(head_dim_v=40)
    for _ in range(2):
        ours, copied = both(lambda k, v: runtime.flash_attn(q, k, v, return_lse=True, **options), *expanded(k, v))
        for a, b in zip(ours, copied, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        as_mqa, as_mha = (made["params"] for made in backend.driver.launches[-2:])
        assert (as_mqa["heads_kv"], as_mqa["pack"], as_mqa["k_stride_h"], as_mqa["v_stride_h"]) == (1, 4, 0, 0)
        assert (as_mha["heads_kv"], as_mha["pack"]) == (4, 1)
        assert backend.driver.launches[-2]["grid"] < backend.driver.launches[-1]["grid"]


@pytest.mark.usefixtures("registry")
def test_one_of_the_two_is_not_enough(backend: FakeBackend):
    q, k, v = inputs(heads_kv=4)
    for given in ((*expanded(k), v), (k, *expanded(v))):
        ours, copied = both(lambda k, v: runtime.flash_attn(q, k, v), *given)
        assert torch.equal(ours, copied)
        assert [made["params"]["heads_kv"] for made in backend.driver.launches[-2:]] == [4, 4]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("used", [{}, {"seqused_k": ints(4, 1, 9, 0)}, {"leftpad_k": ints(1, 0, 3, 0)}], ids=" ".join)
def test_packed_sequences(backend: FakeBackend, used):
    made = packed()
    k, v = expanded(made.pop("k"), made.pop("v"), heads=2)
    q = made.pop("q")
    ours, copied = both(lambda k, v: runtime.flash_attn_varlen(q, k, v, return_lse=True, **made, **used), k, v)
    for a, b in zip(ours, copied, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert [made["params"]["heads_kv"] for made in backend.driver.launches] == [1, 2]


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize("resident", [(1, 1), (132, 1)], ids=str)
def test_gradients_are_those_of_a_contiguous_copy(backend: FakeBackend, resident):
    """Each head has its own, in a tensor of k's shape, though all heads are one in memory."""
    backend.driver.resident = resident
    q, k, v = inputs(heads_q=8, heads_kv=4, seqlen_q=70, seqlen_k=90)
    dout = torch.randn(q.shape).to(BF16)
    found = []
    for copy in (False, True):
        given = [x.contiguous() if copy else x.detach() for x in (q, *expanded(k, v))]
        for x in given:
            x.requires_grad_()
        found.append(torch.autograd.grad(runtime.flash_attn(*given, causal=True), given, dout))
    assert [grad.shape for grad in found[0]] == [q.shape, k.shape, v.shape]
    assert_close(*found)
    heads = found[0][1].unbind(2)
    assert not any(torch.equal(heads[0], other) for other in heads[1:])
    assert {made["params"]["heads_kv"] for made in backend.driver.launched("bwd")} == {4}
    assert [made["params"]["heads_kv"] for made in backend.driver.launched("fwd")] == [1, 4]


@pytest.mark.usefixtures("backward_registry")
def test_gradients_of_what_was_expanded_are_summed(backend: FakeBackend):
    q, k, v = inputs(heads_kv=1)
    given, plain = leaves(q, k, v), leaves(q, k, v)
    runtime.flash_attn(given[0], *expanded(*given[1:])).float().square().sum().backward()
    runtime.flash_attn(*plain).float().square().sum().backward()
    assert_close(grads(given), grads(plain))


# -- over a cache -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_pages(backend: FakeBackend, num_splits, dtype):
    cache, q = Cache((5, 0, 70), max_pages=20, dtype=dtype), queries(seqlen_q=2)
    ours, copied = both(
        lambda k, v: runtime.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=cache.lengths, block_table=cache.table, num_splits=num_splits, causal=True,
            return_softmax_lse=True,
        ),
        *expanded(cache.k, cache.v),
    )  # fmt: skip
    for a, b in zip(ours, copied, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    as_mqa, as_mha = (made["params"] for made in backend.driver.launched("fwd_paged"))
    assert (as_mqa["heads_kv"], as_mqa["pack"], as_mqa["k_stride_h"], as_mqa["v_stride_h"]) == (1, 4, 0, 0)
    assert (as_mha["heads_kv"], as_mha["pack"]) == (4, 1)


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("given", ["k_descale", "v_descale"])
def test_heads_with_factors_of_their_own_are_not_one(backend: FakeBackend, given):
    cache, q = Cache((5, 0, 70), max_pages=20, dtype=E4M3), queries()
    factors = {given: torch.tensor([0.5, 1.0, 2.0, 4.0])}
    ours, copied = both(
        lambda k, v: runtime.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=cache.lengths, block_table=cache.table, softmax_scale=0.1, **factors
        ),
        *expanded(cache.k, cache.v),
    )
    assert torch.equal(ours, copied)
    assert {made["params"]["heads_kv"] for made in backend.driver.launched("fwd_paged")} == {4}
