"""Numbers of any type: the same result, the same refusal and the same plan, whatever was called before."""

from __future__ import annotations

import inspect
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime import fa4
from runtime.errors import ArgumentError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import inputs
from tests.support.kvcache import Cache, queries
from tests.support.varlen import ints, packed


class Two(IntEnum):
    TWO = 2


HALVES = [Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]),
          torch.tensor(0.5), torch.tensor([0.5]), 0.5 + 0j]  # fmt: skip
TWOS = [
    Fraction(2),
    Decimal(2),
    np.int64(2),
    np.uint8(2),
    np.array(2),
    torch.tensor(2),
    torch.tensor([2]),
    2.0,
    Two.TWO,
]
ONES = [1, 1.0, Fraction(1), np.True_, np.int8(1), np.array(1), torch.tensor(1), torch.tensor(True)]
NO_NUMBERS = ["2", [2], np.array([2, 2]), torch.tensor([2, 2]), torch.tensor(2.0, requires_grad=True), 2j, object(),
              float("nan"), np.float64("nan"), Decimal("sNaN"), torch.empty(0)]  # fmt: skip


def dense(**options: Any) -> Any:
    return runtime.flash_attn(*inputs(), **options)


def scores(**options: Any) -> Any:
    """By the path of calls with tensors beside q, k and v."""
    return runtime.flash_attn(*inputs(), alibi_slopes=torch.ones(4), **options)


def varlen(**options: Any) -> Any:
    return runtime.flash_attn_varlen(**packed(), **options)


def split(**options: Any) -> Any:
    return runtime.flash_attn_varlen(*inputs(seqlen_k=70), **options)


def cached(**options: Any) -> Any:
    cache = Cache()
    return runtime.flash_attn_with_kvcache(queries(), cache.k, cache.v, cache_seqlens=cache.lengths,
                                           block_table=cache.table, **options)  # fmt: skip


def combined(**options: Any) -> Any:
    torch.manual_seed(2)
    return runtime.flash_attn_combine(torch.randn(3, 5, 4, 64), torch.randn(3, 5, 4), **options)


CALLS = [
    (dense, "softmax_scale", 0.5, HALVES), (dense, "softcap", 0.5, HALVES), (scores, "softmax_scale", 0.5, HALVES),
    (varlen, "softmax_scale", 0.5, HALVES), (varlen, "softcap", 2, TWOS), (cached, "softmax_scale", 0.5, HALVES),
    (dense, "softmax_scale", 2, TWOS), (split, "num_splits", 2, TWOS), (cached, "num_splits", 2, TWOS),
    (varlen, "max_seqlen_q", 2, TWOS), (varlen, "max_seqlen_k", 2, TWOS), (dense, "causal", True, ONES),
    (dense, "return_lse", True, ONES), (varlen, "pack_gqa", True, ONES), (scores, "causal", True, ONES),
    (cached, "rotary_interleaved", True, ONES), (combined, "return_lse", True, ONES),
]  # fmt: skip
IDS = [f"{call.__name__} {name} {value}" for call, name, value, _ in CALLS]


def same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize(("call", "name", "value", "alike"), CALLS, ids=IDS)
def test_what_equals_a_number_counts_as_it(backend: FakeBackend, call, name, value, alike):
    want = call(**{name: value})
    for given in alike:
        plans.drop()
        for _ in range(2):
            assert same(call(**{name: given}), want), given
        assert len(plans.plans.by_call) == 1, given
        (plan,) = plans.plans.by_call.values()
        assert same(call(**{name: value}), want) and [*plans.plans.by_call.values()] == [plan], given


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize(("call", "name", "value", "alike"), CALLS, ids=IDS)
def test_what_is_no_number_is_refused_first_and_warm(backend: FakeBackend, call, name, value, alike):
    for given in NO_NUMBERS:
        plans.drop()
        for warm in (False, True):
            with pytest.raises(ArgumentError) as error:
                call(**{name: given})
            assert error.value.argument == name and error.value.reason in ("type", "value"), (given, warm)
            assert len(plans.plans.by_call) == warm
            call(**{name: value})


NUMBERS = frozenset((
    *("dropout_p", "softmax_scale", "causal", "softcap", "deterministic", "return_attn_probs", "num_splits"),
    *("pack_gqa", "return_lse", "max_seqlen", "max_seqlen_q", "max_seqlen_k", "disable_scheduler_metadata"),
    *("return_softmax_lse", "rotary_interleaved", "zero_unused"),
))  # fmt: skip
STARTS = ints(0, 3, 9)
ROWS = {"q": torch.zeros(9, 4, 64).bfloat16(), "k": torch.zeros(9, 2, 64).bfloat16(),
        "v": torch.zeros(9, 2, 64).bfloat16(), "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}  # fmt: skip
WIDE = torch.zeros(9, 3, 4, 64).bfloat16()
WHOLE = dict(zip("qkv", inputs(), strict=True))
FUNCTIONS: list[tuple[Any, dict[str, Any]]] = [
    (runtime.flash_attn, WHOLE), (runtime.flash_attn_varlen, ROWS), (runtime.flash_attn_varlen, WHOLE),
    (runtime.flash_attn_func, WHOLE), (runtime.flash_attn_varlen_func, ROWS), (runtime.flash_attn_varlen_func, WHOLE),
    (runtime.flash_attn_qkvpacked_func, {"qkv": WIDE[None]}),
    (runtime.flash_attn_kvpacked_func, {"q": WIDE[None, :, 0], "kv": WIDE[None, :, :2]}),
    (runtime.flash_attn_varlen_qkvpacked_func, {"qkv": WIDE, "cu_seqlens": STARTS, "max_seqlen": 6}),
    (runtime.flash_attn_varlen_kvpacked_func, {
        "q": WIDE[:, 0], "kv": WIDE[:, :2], "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 6,
        "max_seqlen_k": 6}),
    (runtime.flash_attn_with_kvcache, {
        "q": WHOLE["q"], "k_cache": WHOLE["k"], "v_cache": WHOLE["v"], "cache_seqlens": ints(3, 4)}),
    (fa4.flash_attn_func, WHOLE), (fa4.flash_attn_varlen_func, ROWS), (fa4.flash_attn_varlen_func, WHOLE),
]  # fmt: skip


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize(
    ("function", "given"), FUNCTIONS, ids=lambda x: getattr(x, "__name__", " ".join(x) if isinstance(x, dict) else None)
)
def test_every_function_names_what_is_no_number(backend: FakeBackend, function, given):
    function(**given)
    for name in NUMBERS & inspect.signature(function).parameters.keys():
        for value in NO_NUMBERS:
            with pytest.raises(ArgumentError) as error:
                function(**given | {name: value})
            assert error.value.argument == name, value


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("function", [runtime.flash_attn_func, fa4.flash_attn_func], ids=["fa2", "fa4"])
def test_windows_of_any_integers(backend: FakeBackend, function):
    """For flash_attn as for the drop-ins: the plan of the plain numbers."""
    for two in TWOS:
        for window in ((two, 0), [two, 0], (two, torch.tensor(0))):
            function(*inputs(), window_size=window)
            runtime.flash_attn(*inputs(), window=window)
            for made in backend.driver.launches[-2:]:
                assert (made["params"]["window_left"], made["params"]["window_right"]) == (2, 0), window
    assert len(plans.plans.by_call) == 1
    for window in ((2.5, 0), (torch.tensor([2, 2]), 0), (np.array([2, 2]), 0), ("2", 0), torch.tensor(2)):
        with pytest.raises(ArgumentError) as error:
            function(*inputs(), window_size=window)
        assert error.value.argument == "window_size"


@pytest.mark.usefixtures("registry")
def test_open_sides_of_any_integers(backend: FakeBackend):
    for one in (np.int64(-1), torch.tensor(-1), -1.0):
        runtime.flash_attn_func(*inputs(), window_size=(one, one))
        fa4.flash_attn_func(*inputs(), window_size=(one, one))
    runtime.flash_attn_func(*inputs())
    assert (
        len({(made["params"]["window_left"], made["params"]["window_right"]) for made in backend.driver.launches}) == 1
    )
    assert len(plans.plans.by_call) == 1


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("function", [runtime.flash_attn_varlen, runtime.flash_attn_varlen_func,
                                      fa4.flash_attn_varlen_func], ids=["ours", "fa2", "fa4"])  # fmt: skip
def test_a_hint_on_a_device_is_not_read(backend: FakeBackend, function):
    """Upstream reads it, which synchronises. One on meta stands for it: whoever read it would fail."""
    given = packed()
    hint = torch.empty((), dtype=torch.int32, device="meta")
    for _ in range(2):
        function(**given, max_seqlen_q=hint, max_seqlen_k=hint)
    function(**given)
    assert len(plans.plans.by_call) == 1
    function(**given, max_seqlen_q=torch.tensor(70), max_seqlen_k=torch.tensor(9, dtype=torch.int64))
    function(**given, max_seqlen_q=70, max_seqlen_k=9)
    assert len(plans.plans.by_call) == 2
    hint = ints(70)[0]
    function(**given, max_seqlen_q=hint, max_seqlen_k=9)
    assert len(plans.plans.by_call) == 2
    hint.fill_(1)  # another number, of the same object
    function(**given, max_seqlen_q=hint, max_seqlen_k=9)
    assert len(plans.plans.by_call) == 3
