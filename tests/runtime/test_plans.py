"""Kept plans: what grows reuses them, what alternates leaves them alone, what fails leaves none behind."""

from __future__ import annotations

import pytest
import torch

import runtime
from runtime.api import attention
from runtime.call import launch, plan
from runtime.errors import ArgumentError
from runtime.load import plans, session
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, check, inputs, reference
from tests.support.backward import assert_close, attention64, grads, leaves
from tests.support.kvcache import NOWHERE
from tests.support.varlen import ints, packed

MAX_SIZES = 8  # in these tests


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_SIZES", MAX_SIZES)


class Counted:
    """How often launches are made, kernels asked for and plans aimed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.launches = self.kernels = self.aimed = 0
        make, kernel, aim = launch.Launch, session.Session.kernel, plan._aim

        def counted(name, function):
            def call(*arguments, **options):
                setattr(self, name, getattr(self, name) + 1)
                return function(*arguments, **options)

            return call

        monkeypatch.setattr(launch, "Launch", counted("launches", make))
        monkeypatch.setattr(session.Session, "kernel", counted("kernels", kernel))
        monkeypatch.setattr(plan, "_aim", counted("aimed", aim))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def consistent() -> None:
    """Each plan is kept under its key and in its family, and nothing else is."""
    kept = plans.plans
    assert all(made.key == key for key, made in kept.by_call.items())
    members = [made for family in kept.families.values() for made in family]
    assert sorted(map(id, members)) == sorted(map(id, kept.by_call.values()))
    assert all(made.family == family for family, every in kept.families.items() for made in every)
    assert all(0 < len(family) <= MAX_SIZES for family in kept.families.values())


GROWING = {
    "contiguous": lambda whole, n: whole[:, :n].contiguous(),
    "slices": lambda whole, n: whole[:, :n],
    "heads first": lambda whole, n: whole[:, :n].transpose(1, 2).contiguous().transpose(1, 2),
    "slices of heads first": lambda whole, n: whole.transpose(1, 2).contiguous().transpose(1, 2)[:, :n],
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("grown", GROWING.values(), ids=GROWING)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (12, None)}, {"sink": torch.rand(4)}], ids=" ".join)
def test_a_growing_cache_reuses_plans(backend: FakeBackend, counted: Counted, grown, options):
    """A decode step a token, as a loop over a dense cache has them; the layout may be any."""
    torch.manual_seed(8)
    whole_k, whole_v = (torch.randn(2, 40, 2, 64).to(BF16) for _ in range(2))
    q, _, _ = inputs(seqlen_q=1)
    for n in range(1, 41):
        check(q, grown(whole_k, n), grown(whole_v, n), **options)
        assert backend.driver.launches[-1]["params"]["seqlen_k"] == n
    assert counted.launches <= MAX_SIZES and counted.kernels <= counted.launches
    assert counted.aimed == 40 and len(plans.plans.by_call) == MAX_SIZES
    consistent()


@pytest.mark.usefixtures("backward_registry")
def test_a_growing_backward_reuses_plans(backend: FakeBackend, counted: Counted):
    for n in range(1, 30):
        given = leaves(*inputs(seqlen_q=n, seqlen_k=n, batch=1))
        exact = leaves(*given, dtype=torch.float64)
        runtime.flash_attn(*given, causal=True).sum().backward()
        attention64(*exact, causal=True)[0].sum().backward()
        assert_close(grads(given), grads(exact))
    consistent()
    assert len(plans.plans.families) == 2 and len(plans.plans.by_call) == 2 * MAX_SIZES
    of_backward = len({made["variant"] for made in backend.driver.launches if made["variant"].startswith("bwd")})
    assert counted.launches <= MAX_SIZES * (1 + of_backward) and counted.kernels <= counted.launches


@pytest.mark.usefixtures("registry")
def test_growing_totals_reuse_plans(backend: FakeBackend, counted: Counted):
    for n in range(1, 30):
        given = packed((n, 2), (2 * n, 3))
        out = runtime.flash_attn_varlen(**given, max_seqlen_q=9)
        want, _ = reference(given["q"][None, :n], given["k"][None, : 2 * n], given["v"][None, : 2 * n])
        torch.testing.assert_close(out[None, :n].double(), want, atol=2e-2, rtol=2e-2)
    assert counted.launches <= MAX_SIZES and len(plans.plans.families) == 1
    consistent()


@pytest.mark.parametrize("count", [2, MAX_SIZES])
@pytest.mark.usefixtures("registry")
def test_a_few_lengths_that_alternate_never_change_a_plan(backend: FakeBackend, counted: Counted, monkeypatch, count):
    calls = [inputs(seqlen_q=1, seqlen_k=3 + 7 * i, seed=i) for i in range(count)]
    wanted = [check(*call) for call in calls]
    kept = {key: id(made) for key, made in plans.plans.by_call.items()}
    assert counted.aimed == count
    monkeypatch.setattr(attention, "prepare", None)
    for _ in range(5):
        for call, want in zip(calls, wanted, strict=True):
            assert torch.equal(check(*call), want)
    assert {key: id(made) for key, made in plans.plans.by_call.items()} == kept and counted.aimed == count


@pytest.mark.usefixtures("registry")
def test_the_plan_that_was_made_longest_ago_is_taken_over(backend: FakeBackend, counted: Counted):
    calls = [inputs(seqlen_q=1, seqlen_k=3 + i, seed=i) for i in range(MAX_SIZES + 2)]
    first, second, *_ = [check(*call) for call in calls[:MAX_SIZES]]
    oldest, next_one, *others = plans.plans.by_call.values()
    check(*calls[-2])
    assert list(plans.plans.by_call.values()) == [next_one, *others, oldest]
    check(*calls[-1])
    assert list(plans.plans.by_call.values()) == [*others, oldest, next_one]
    assert torch.equal(check(*calls[1]), second) and torch.equal(check(*calls[0]), first)
    assert counted.launches == MAX_SIZES and counted.aimed == MAX_SIZES + 4
    consistent()


@pytest.mark.usefixtures("registry")
def test_what_is_no_length_has_plans_of_its_own(backend: FakeBackend):
    """Other heads, head dims, batches, dtypes and options are other families, however few plans those have."""
    for change in ({}, {"heads_kv": 4}, {"head_dim_v": 40}, {"batch": 3}, {"dtype": torch.float16}):
        check(*inputs(**change))
        check(*inputs(**change), causal=True)
    check(*inputs(), out=torch.empty(2, 5, 4, 64, dtype=BF16))
    q, k, v = inputs()
    check(q, *(x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v)))
    assert [len(family) for family in plans.plans.families.values()] == [1] * 12
    check(*inputs(seqlen_q=7, seqlen_k=0))
    assert sum(len(family) for family in plans.plans.families.values()) == 13 and len(plans.plans.families) == 12
    consistent()


@pytest.mark.usefixtures("registry")
def test_a_failing_change_leaves_no_half_changed_plan(backend: FakeBackend, monkeypatch):
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    small, large = inputs(seqlen_q=5), inputs(seqlen_q=500)
    want = check(*small)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "MAX_BLOCKS", backend.driver.launches[-1]["grid"][0])
        before = len(backend.driver.launches)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="blocks of fwd"):
                runtime.flash_attn(*large)
            consistent()
        assert len(backend.driver.launches) == before
        assert torch.equal(check(*small), want)
    check(*large)
    assert torch.equal(check(*small), want)
    consistent()


@pytest.mark.parametrize("failing", ["kv_append", "fwd_paged", "fwd_combine"])
@pytest.mark.usefixtures("cache_registry")
def test_a_chain_that_fails_in_the_middle_is_forgotten(backend: FakeBackend, monkeypatch, failing):
    """Its first launches are changed then, and the later ones are not."""
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    torch.manual_seed(1)
    k, v, new = (torch.randn(6, 4, 2, 64).to(BF16) for _ in range(3))
    table = torch.tensor([[0, 1, NOWHERE], [4, 2, NOWHERE]], dtype=torch.int32)
    q, lengths = torch.randn(2, 1, 4, 64).to(BF16), ints(5, 2)

    def call(width):
        out = runtime.flash_attn_with_kvcache(q, k, v, new[:2, :1], new[2:4, :1], cache_seqlens=lengths,
                                              block_table=table[:, :width], num_splits=2)  # fmt: skip
        consistent()
        return out

    want = call(2)
    serve = launch.Launch.serve

    def fails(self, *arguments):
        serve(self, *arguments)
        if self.kernel.abi.op == failing:
            raise ArgumentError("q", "no room", reason="too_large")

    for _ in range(2):
        before = len(backend.driver.launches)
        with monkeypatch.context() as patch, pytest.raises(ArgumentError, match="no room"):
            patch.setattr(launch.Launch, "serve", fails)
            call(3)
        assert not plans.plans.by_call and len(backend.driver.launches) == before
        assert torch.equal(call(2), want)
    assert torch.equal(call(3), want) and torch.equal(call(2), want)
    assert {made["params"]["seqlen_k"] for made in backend.driver.launched("fwd_paged")} == {8, 12}


def test_where_all_plans_are_taken_a_family_changes_its_own(backend: FakeBackend, registry, counted, monkeypatch):
    """And takes none from another one."""
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    other = inputs(head_dim=96)
    check(*other)
    for seqlen_k in (3, 4, 5, 6, 7):
        check(*inputs(seqlen_q=1, seqlen_k=seqlen_k))
    assert len(plans.plans.by_call) == 3 and counted.launches == 3
    aimed = counted.aimed
    check(*other)
    assert counted.aimed == aimed


def test_an_interrupt_between_two_lines_breaks_no_family(backend: FakeBackend, registry, monkeypatch):
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    check(*inputs(seqlen_k=3))
    (kept,) = plans.plans.by_call.values()
    del plans.plans.by_call[kept.key]  # as if Ctrl-C had come inside forget
    for seqlen_k in (4, 5):
        check(*inputs(seqlen_k=seqlen_k))
    plans.plans.families.clear()  # and inside keep
    for seqlen_k in (5, 6):
        check(*inputs(seqlen_k=seqlen_k))
