"""Canonical JSON is lossless, and only a digest is one."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.contract import ContractError, canonical_json, check_digest
from tests.registry.contract.json_values import JSON


@given(JSON)
def test_canonical_json_is_ascii_without_spaces_and_lossless(value):
    data = canonical_json(value)
    assert data.isascii()
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1, {"d": 2, "c": 3}]}) == b'{"a":[1,{"c":3,"d":2}],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


@given(st.text(max_size=70) | st.from_regex("[0-9a-fA-F]{63,65}\n?"))
def test_only_64_lower_case_hex_digits_are_a_digest(text):
    if re.fullmatch("[0-9a-f]{64}", text, re.ASCII):
        assert check_digest(text) == text
    else:
        with pytest.raises(ContractError):
            check_digest(text)
