"""Conditions and dispatch rows."""

import json

import pytest

from kernels.dispatch import rows
from registry.contract import Condition, ContractError, DispatchRow, Variant, canonical_json
from tests.registry.samples import KEYS
from tests.support.abis import ABIS


def test_every_dispatch_row_round_trips_and_names_a_variant_of_its_op():
    for row in rows():
        assert DispatchRow.from_json(json.loads(canonical_json(row.to_json()))) == row
        assert Variant.parse(row.variant).op == row.op
        assert row.op in ABIS


def test_conditions():
    facts = {"dtype": "bf16", "head_dim": 64}
    assert Condition("head_dim", "in", (64, 128)).holds(facts)
    assert not Condition("head_dim", "<=", 63).holds(facts)
    assert Condition("head_dim", ">=", 64).holds(facts)
    assert str(Condition("dtype", "==", "bf16")) == "dtype == bf16"
    for condition in (Condition("paged", "==", 1), Condition("dtype", "<=", 64)):
        with pytest.raises(ContractError, match=condition.fact):
            condition.holds(facts)
    with pytest.raises(ContractError, match="update"):
        Condition("head_dim", "~", 64)


def test_a_dispatch_row_says_whether_heads_are_packed():
    row = DispatchRow("fwd", (Condition("group", ">=", 2),), KEYS[0], pack=True)
    assert row.to_json()["pack"] is True and DispatchRow.from_json(row.to_json()) == row
    for value in (1, None, "yes"):
        with pytest.raises(ContractError, match="pack"):
            DispatchRow.from_json({**row.to_json(), "pack": value})
    with pytest.raises(ContractError, match="pack"):
        DispatchRow.from_json({name: value for name, value in row.to_json().items() if name != "pack"})
