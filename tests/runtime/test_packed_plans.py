"""A plan that was changed for other totals launches exactly what a new plan launches, and refuses what it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import runtime
from runtime.api import attention
from runtime.call import plan
from runtime.errors import ArgumentError, NoKernelError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16
from tests.support.kvcache import Cache
from tests.support.varlen import ints, packed

ADDRESSES = ("o_partial", "lse_partial", "q_out", "o", "lse")


@pytest.fixture(autouse=True)
def one_plan_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every call with other totals changes the plan."""
    monkeypatch.setattr(plans, "MAX_SIZES", 1)


def launched(backend: FakeBackend, call) -> list[dict[str, Any]]:
    """What a call launches, without addresses that differ from call to call."""
    before = len(backend.driver.launches)
    call()
    found = []
    for made in backend.driver.launches[before:]:
        numbers = {name: value for name, value in made["params"].items() if name not in ADDRESSES}
        found.append({**made, "params": numbers})
    return found


def split(draw: random.Random, total: int, batch: int) -> tuple[int, ...]:
    ends = sorted(draw.randint(0, total) for _ in range(batch - 1))
    return tuple(b - a for a, b in zip([0, *ends], [*ends, total], strict=True))


def options(draw: random.Random) -> dict[str, Any]:
    hints = {name: draw.choice([None, 1, 40, 300]) for name in ("max_seqlen_q", "max_seqlen_k")}
    return hints | {"return_lse": draw.random() < 0.5, "causal": draw.random() < 0.5}


@pytest.mark.usefixtures("registry")
def test_dense_keys_and_packed_ones(backend: FakeBackend):
    draw, changed = random.Random(1), 0
    for _ in range(120):
        batch = draw.choice([1, 3])
        given = packed(*(split(draw, draw.choice([0, 1, 2, 7, 90, 400]), batch) for _ in "qk"))
        given |= options(draw)
        if draw.random() < 0.3:
            given["out"] = torch.empty_like(given["q"])
        if draw.random() < 0.3:
            given["seqused_k"] = torch.tensor([9] * batch, dtype=torch.int32)
        kept = {id(one) for one in plans.plans.by_call.values()}
        once = launched(backend, lambda given=given: runtime.flash_attn_varlen(**given))
        changed += len(kept & {id(one) for one in plans.plans.by_call.values()}) == len(kept) > 0
        plans.drop()
        again = launched(backend, lambda given=given: runtime.flash_attn_varlen(**given))
        assert once == again
        if draw.random() < 0.9:  # what the next call finds has served another before
            continue
        plans.drop()
    assert changed > 40


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_packed_queries_over_a_cache(backend: FakeBackend, num_splits: int):
    draw = random.Random(2)
    cache = Cache((9, 1, 70, 5), max_pages=20)
    for _ in range(40):
        total = draw.choice([1, 2, 4, 9, 130])
        ends = ints(0, *torch.tensor(split(draw, total, 4)).cumsum(0).tolist())
        q = torch.randn(total, 4, 64).to(BF16)
        given = {"q": q, "k": cache.k, "v": cache.v, "cu_seqlens_q": ends, "page_table": cache.table,
                 "seqused_k": cache.lengths, "num_splits": num_splits, **options(draw)}  # fmt: skip
        once = launched(backend, lambda given=given: runtime.flash_attn_varlen(**given))
        plans.drop()
        assert launched(backend, lambda given=given: runtime.flash_attn_varlen(**given)) == once


@pytest.mark.usefixtures("registry")
def test_no_kernel_is_asked_for_and_no_kind_checked_again(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch):
    runtime.flash_attn_varlen(**packed((40, 2), (9, 9)))
    monkeypatch.setattr(plan.tensors, "check", None)
    monkeypatch.setattr(plan, "prepare", None)
    for n in range(3, 20):
        runtime.flash_attn_varlen(**packed((40, n), (9, n)), max_seqlen_q=40)
    assert len(plans.plans.by_call) == 1


def wrong(given: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    q, k = given["q"], given["k"]
    rows = torch.empty(q.shape[1], q.shape[0] + 9, q.shape[2], dtype=BF16).transpose(0, 1)
    return {
        "v": {"v": given["v"][:-1]},
        "out": {"out": torch.empty_like(q)[:-1]},
        "max_seqlen_q": {"max_seqlen_q": -1},
        "max_seqlen_k": {"max_seqlen_k": torch.tensor(3.5)},
        "q": {"q": torch.empty(1).bfloat16().expand(2**30, *q.shape[1:])},
        "k": {"k": k.to(torch.float16)},
        "cu_seqlens_q": {"cu_seqlens_q": given["cu_seqlens_q"][:-1]},
        "alias": {"out": rows[: q.shape[0]].as_strided(q.shape, (64, 64, 1))},
    }  # fmt: skip


@pytest.mark.usefixtures("registry")
def test_what_a_new_plan_refuses_a_changed_one_refuses(backend: FakeBackend):
    first, second = packed((40, 3), (9, 4)), packed((40, 5), (9, 6))
    for what, change in wrong(second).items():
        plans.drop()
        with pytest.raises(ArgumentError) as of_new:
            runtime.flash_attn_varlen(**second | change)
        runtime.flash_attn_varlen(**first)
        with pytest.raises(ArgumentError) as of_changed:
            runtime.flash_attn_varlen(**second | change)
        assert (of_changed.value.argument, of_changed.value.reason) == (of_new.value.argument, of_new.value.reason), (
            what
        )
        launches = len(backend.driver.launches)
        runtime.flash_attn_varlen(**second)
        assert backend.driver.launches[launches]["params"]["seqlen_q"] == 45


@pytest.mark.usefixtures("registry")
def test_a_change_that_fails_leaves_nothing_behind(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch):
    first, second = packed((40, 3), (9, 4)), packed((40, 5), (9, 6))
    runtime.flash_attn_varlen(**first)

    def fails(*_: Any) -> None:
        raise NoKernelError("none", reason="row")

    with monkeypatch.context() as patch:
        patch.setattr(attention.forward, "chain", fails)
        with pytest.raises(NoKernelError):
            runtime.flash_attn_varlen(**second)
    assert not plans.plans.by_call and not plans.plans.families
    for given, total in ((first, 43), (second, 45)):
        runtime.flash_attn_varlen(**given)
        assert backend.driver.launches[-1]["params"]["seqlen_q"] == total
