"""What an attack on the call path found: arguments of odd kinds and sizes, and work that is done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from registry.contract import DispatchRow
from runtime.errors import ArgumentError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16
from tests.support.backward import leaves
from tests.support.kvcache import Cache, queries
from tests.support.varlen import ints, packed


@pytest.mark.usefixtures("backward_registry")
def test_a_new_shape_parses_no_rows_again(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch):
    """A call of several launches has some before the others are made."""

    def train(n: int) -> None:
        given = leaves(*(torch.randn(1, n, heads, 64).to(BF16) for heads in (4, 2, 2)))
        runtime.flash_attn(*given, causal=True).sum().backward()

    for n in (40, 41):
        train(n)
    monkeypatch.setattr(DispatchRow, "from_json", None)
    for n in range(42, 50):
        train(n)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("change", "argument", "reason"),
    [
        ({"softmax_scale": [1]}, "softmax_scale", "value"),
        ({"softcap": [1]}, "softcap", "value"),
        ({"causal": [1]}, "causal", "type"),
        ({"return_lse": {}}, "return_lse", "type"),
        ({"pack_gqa": []}, "pack_gqa", "type"),
        ({"window": [[1], 2]}, "window", "value"),
        ({"q": torch.tensor(1.0).bfloat16()}, "q", "rank"),
        ({"v": torch.tensor(1.0).bfloat16()}, "v", "rank"),
        ({"out": torch.tensor(1.0).bfloat16()}, "out", "rank"),
        ({"k": 3}, "k", "type"),
    ],
    ids=str,
)
def test_packed_calls_with_arguments_of_odd_kinds(backend: FakeBackend, change: dict[str, Any], argument, reason):
    given = packed((40, 3), (9, 4))
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_varlen(**given | change)
        assert (error.value.argument, error.value.reason) == (argument, reason)
        runtime.flash_attn_varlen(**given)  # now there is a plan to change


@pytest.mark.usefixtures("registry")
def test_a_view_still_to_be_negated_is_refused_for_new_totals_too(backend: FakeBackend, monkeypatch):
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    runtime.flash_attn_varlen(**packed((40, 3), (9, 4)))
    given = packed((40, 5), (9, 6))
    with pytest.raises(ArgumentError, match="is_neg"):
        runtime.flash_attn_varlen(**given | {"k": torch._neg_view(given["k"])})


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize("rows", [5, 200])
def test_gradients_of_packed_arrays_without_entries_are_zeros(backend: FakeBackend, rows: int):
    given = leaves(*(torch.randn(rows, heads, 64).to(BF16) for heads in (4, 2, 2)))
    out = runtime.flash_attn_varlen(*given, cu_seqlens_q=ints(0), cu_seqlens_k=ints(0))
    launches = len(backend.driver.launches)
    out.sum().backward()
    assert len(backend.driver.launches) == launches
    assert all(not leaf.grad.any() for leaf in given)


@pytest.mark.usefixtures("cache_registry")
def test_more_new_tokens_than_32_bits_count(backend: FakeBackend):
    cache = Cache()
    new = torch.zeros(3, 1, 2, 64, dtype=BF16).expand(3, 2**31 + 8, 2, 64)
    with pytest.raises(ArgumentError) as error:
        runtime.flash_attn_with_kvcache(queries(), cache.k, cache.v, new, new, cache_seqlens=cache.lengths,
                                        block_table=cache.table)  # fmt: skip
    assert error.value.reason == "too_large"


@pytest.mark.usefixtures("cache_registry")
def test_more_positions_than_32_bits_count(backend: FakeBackend):
    cache = Cache(room=1)
    new = torch.zeros(3, 1, 2, 64, dtype=BF16)
    table = torch.zeros(16, dtype=BF16).expand(2**31 + 8, 16)
    with pytest.raises(ArgumentError) as error:
        runtime.flash_attn_with_kvcache(queries(), cache.k, cache.v, new, new, rotary_cos=table, rotary_sin=table,
                                        cache_seqlens=cache.lengths, block_table=cache.table)  # fmt: skip
    assert (error.value.argument, error.value.reason) == ("rotary_cos", "too_large")


def test_a_tensor_that_an_op_does_not_take_is_named(registry: Path):
    from runtime.call import tensors

    with pytest.raises(ArgumentError) as error:
        tensors.expected("fwd_paged", ("q", "k", "v", "dout"))
    assert (error.value.argument, error.value.reason) == ("dout", "unsupported")
