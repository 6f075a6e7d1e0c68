"""Variants and their keys: each is the other's exact inverse."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.dispatch import variants
from registry.contract import DTYPES, ContractError, Variant

_tiles = st.lists(
    st.tuples(st.sampled_from(string.ascii_lowercase), st.integers(0, 99_999)), max_size=6, unique_by=lambda t: t[0]
)


_features = st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,6}[a-z_]", fullmatch=True), max_size=4, unique=True)


_variants = st.builds(
    lambda op, dtype, d, dv, tile, features: Variant(op, dtype, d, dv, tuple(tile), tuple(sorted(features))),
    st.from_regex(r"[a-z]{1,5}(_[a-z]{1,5}){0,2}", fullmatch=True),
    st.sampled_from(DTYPES),
    st.integers(1, 9999),
    st.integers(1, 9999),
    _tiles,
    _features,
)


def test_every_variant_of_the_table_round_trips():
    keys = [variant.key for variant in variants()]
    assert len(keys) == len(set(keys)) > 0
    for variant in variants():
        assert Variant.parse(variant.key) == variant


@given(_variants)
def test_drawn_variants_round_trip(variant):
    assert Variant.parse(variant.key) == variant


@given(_variants, _variants)
def test_different_variants_have_different_keys(a, b):
    assert (a == b) == (a.key == b.key)


@given(st.text(max_size=60) | st.from_regex(r"[a-z]{1,3}-(bf16|fp16|q)-d\d{1,5}-dv\d{1,5}(-[a-z]\w{0,4}){0,4}"))
def test_parse_accepts_only_what_key_writes(text):
    try:
        variant = Variant.parse(text)
    except ContractError:
        return
    assert variant.key == text


@pytest.mark.parametrize(
    "key",
    [
        "",
        "fwd-bf16-d64",
        "fwd-bf16-d064-dv64",
        "fwd-bf16-d64-dv64-m0128",
        "fwd-bf16-d64-dv64-m64-m64",
        "fwd-bf16-d64-dv64-paged-bitmask",
        "fwd-bf16-d64-dv64-paged-paged",
        "fwd-fp8-d64-dv64",
        "fwd-bf16-d64-dv64\n",
        "fwd-bf16-d６4-dv64",
        "../fwd-bf16-d64-dv64",
        None,
        7,
    ],
)
def test_malformed_keys_are_refused(key):
    with pytest.raises(ContractError):
        Variant.parse(key)
