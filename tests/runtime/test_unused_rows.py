"""Rows of outputs that no sequence owns: zeros where autograd records or on request, else untouched, at no cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import runtime
from runtime.errors import ArgumentError
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16
from tests.support.kvcache import Cache
from tests.support.varlen import ints, packed

LENGTHS = (3, 0, 70, 5)


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's allocator hands out memory full of NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Seen(TorchDispatchMode):
    """Names of the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def cases():
    """Arguments, and which rows (of tokens) belong to a sequence: a mask of the output without heads and head_dim."""
    made = packed(LENGTHS)
    yield "seqused", made | {"seqused_q": ints(2, 0, 70, 1)}, owned(78, [(0, 2), (3, 73), (73, 74)])
    tail = packed(LENGTHS)
    tail["q"] = torch.cat((tail["q"], torch.randn(9, 4, 64).to(BF16)))
    tail["cu_seqlens_q"] = tail["cu_seqlens_q"] + 4  # four rows before the first sequence, five behind the last
    yield "gaps", tail, owned(87, [(4, 82)])
    q, k, v = (torch.randn(2, n, heads, 64).to(BF16) for n, heads in ((6, 4), (7, 2), (7, 2)))
    dense = torch.zeros(2, 6, dtype=torch.bool)
    dense[0, :4] = True
    yield "dense", {"q": q, "k": k, "v": v, "seqused_q": ints(4, 0)}, dense


def owned(n, spans):
    mask = torch.zeros(n, dtype=torch.bool)
    for first, last in spans:
        mask[first:last] = True
    return mask


CASES = [pytest.param(given, mask, id=name) for name, given, mask in cases()]


def rows_of(mask, out, lse):
    """Rows of out and LSE that belong to a sequence, and those that do not."""
    by_row = lse.transpose(-1, -2)
    return (out[mask], by_row[mask]), (out[~mask], by_row[~mask])


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("given", "mask"), CASES)
def test_on_request(backend: FakeBackend, given, mask):
    for flag in (True, 1):
        for _ in range(2):  # cold and warm
            plain = rows_of(mask, *runtime.flash_attn_varlen(**given, return_lse=True))
            zeroed = rows_of(mask, *runtime.flash_attn_varlen(**given, return_lse=True, zero_unused=flag))
            assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(plain[0], zeroed[0], strict=True))
            assert all(t.isnan().all() and t.numel() for t in plain[1])
            assert not any(t.any() for t in zeroed[1])
    assert not rows_of(mask, runtime.flash_attn_varlen(**given, zero_unused=True), zeroed_lse(mask))[1][0].any()


def zeroed_lse(mask):
    return torch.zeros(*mask.shape[:-1], 4, mask.shape[-1])


@pytest.fixture
def operators(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch):
    """A function: what a warm call asks of torch, one launch included, in order."""
    mode = Seen()
    monkeypatch.setattr(backend.driver, "launch", lambda *_: mode.names.append("launch") or (backend.driver.success,))
    torch.use_deterministic_algorithms(False)  # as calls run; with it torch itself fills

    def of(**given):
        runtime.flash_attn_varlen(**given)
        mode.names.clear()
        with mode:
            runtime.flash_attn_varlen(**given)
        return list(mode.names)

    return of


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("given", "mask"), CASES)
def test_without_it_nothing_is_filled(operators, given, mask):
    first, second, last = operators(**given, return_lse=True)
    assert "empty" in first and "empty" in second and last == "launch"
    names = operators(**given, return_lse=True, zero_unused=True)
    assert sum("zeros" in name for name in names) >= 2 and names.count("launch") == 1


@pytest.mark.usefixtures("registry")
def test_nothing_is_filled_where_every_row_has_an_owner(operators):
    q, k, v = (torch.randn(2, 5, heads, 64).to(BF16) for heads in (4, 2, 2))
    for used in ({}, {"seqused_k": ints(3, 4)}, {"leftpad_k": ints(3, 4)}):
        assert operators(q=q, k=k, v=v, **used, zero_unused=True) == ["empty_like", "launch"]


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize(("given", "mask"), CASES)
@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_a_weight_gradient_behind_the_output_is_finite(backend: FakeBackend, given, mask, wanted):
    """Which every row of the output goes into, whatever gradient comes back for it."""
    weight = torch.randn(4 * 64, 8).to(BF16).requires_grad_()
    for _ in range(2):
        leaf = given[wanted].clone().requires_grad_()
        out, lse = runtime.flash_attn_varlen(**given | {wanted: leaf}, return_lse=True)
        assert not any(t.any() for t in rows_of(mask, out, lse)[1])
        grads = torch.autograd.grad((out.flatten(-2) @ weight).square().sum() + lse[lse.isfinite()].sum(),
                                    (weight, leaf))  # fmt: skip
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
    with torch.no_grad():  # where nothing records, they are left as they are
        assert runtime.flash_attn_varlen(**given | {wanted: leaf})[~mask].isnan().all()


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize(("given", "mask"), CASES)
def test_gradients_of_such_rows_are_zeros(backend: FakeBackend, given, mask):
    leaves = {name: given[name].clone().requires_grad_() for name in ("q", "k", "v")}
    out = runtime.flash_attn_varlen(**given | leaves)
    out.backward(torch.where(mask[..., None, None], 1.0, torch.nan).expand(out.shape).to(BF16))
    assert not leaves["q"].grad[~mask].any() and all(leaf.grad.isfinite().all() for leaf in leaves.values())


# -- over a cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(cache_registry: Path) -> Cache:
    return Cache((5, 9, 70), max_pages=20)


def test_splits_write_every_row_and_so_there_are_none(backend: FakeBackend, cache: Cache):
    """Partial outputs are combined in all rows of q, which would put NaN over the zeros."""
    q = torch.randn(9, 4, 64).to(BF16)
    given = {"q": q, "k": cache.k, "v": cache.v, "cu_seqlens_q": ints(1, 2, 3, 6), "seqused_k": cache.lengths,
             "page_table": cache.table, "return_lse": True}  # fmt: skip
    mask = owned(9, [(1, 6)])
    for num_splits in (0, 1):
        out, lse = runtime.flash_attn_varlen(**given, num_splits=num_splits, zero_unused=True)
        (kept, _), unused = rows_of(mask, out, lse)
        assert kept.isfinite().all() and not any(t.any() for t in unused)
    split, _ = runtime.flash_attn_varlen(**given, num_splits=3)
    torch.testing.assert_close(split[mask], kept, atol=2e-2, rtol=2e-2)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="with zero_unused") as error:
            runtime.flash_attn_varlen(**given, num_splits=3, zero_unused=True)
        assert (error.value.argument, error.value.reason) == ("num_splits", "unsupported")


def test_pages_and_partly_used_queries(backend: FakeBackend, cache: Cache):
    q = torch.randn(3, 4, 4, 64).to(BF16)
    given = {"q": q, "k": cache.k, "v": cache.v, "seqused_q": ints(4, 0, 2), "seqused_k": cache.lengths,
             "page_table": cache.table, "return_lse": True}  # fmt: skip
    mask = torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
    _, unused = rows_of(mask, *runtime.flash_attn_varlen(**given))
    assert all(t.isnan().all() for t in unused)
    (kept, _), unused = rows_of(mask, *runtime.flash_attn_varlen(**given, zero_unused=True))
    assert kept.isfinite().all() and not any(t.any() for t in unused)


@pytest.mark.usefixtures("registry")
def test_zero_unused_must_be_a_flag(backend: FakeBackend):
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_varlen(**packed(), zero_unused="yes")
        assert (error.value.argument, error.value.reason) == ("zero_unused", "type")
        runtime.flash_attn_varlen(**packed(), zero_unused=True)
