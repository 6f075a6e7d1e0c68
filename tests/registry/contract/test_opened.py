"""An index read on demand gives what the whole one gives, and refuses what it refuses, in its words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import ops
from registry.contract import (
    Condition,
    ContractError,
    DispatchRow,
    Index,
    IntegrityError,
    OpenIndex,
    Served,
    sha256_hex,
)
from tests.registry.contract.json_values import JSON
from tests.registry.contract.opened_samples import ABI, INDEX, change, facts, first, paths

DATA = INDEX.to_bytes()


def opened(data: bytes) -> OpenIndex:
    return OpenIndex(data, sha256_hex(data))


WHOLE, OPEN = Index.from_bytes(DATA), opened(DATA)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(ops.OPS), facts())
def test_serves_what_the_rows_serve(op: str, call: dict[str, Any]):
    row = first(WHOLE, op, call)
    assert OPEN.serving(op, call) == (row and Served(row.variant, row.pack))


def test_parts_are_those_of_the_whole():
    assert (OPEN.arch, OPEN.release, OPEN.whole) == (WHOLE.arch, WHOLE.release, WHOLE)
    assert [OPEN.artifact(a.variant) for a in WHOLE.artifacts] == list(WHOLE.artifacts)
    assert OPEN.artifact("fwd-bf16-d8-dv8-m1-n1-w1-s1") is None
    assert OPEN.abi(ABI.digest) == ABI
    for op in ops.OPS:
        assert OPEN.rows(op, {}) == [row for row in WHOLE.rows if row.op == op]
    with pytest.raises(ContractError, match="lists no ABI"):
        OPEN.abi("0" * 64)


def test_other_bytes_than_the_digest_names():
    with pytest.raises(IntegrityError) as error:
        OpenIndex(DATA + b" ", INDEX.digest)
    assert error.value.reason == "sha256"


SMALL = Index(
    "sm_120",
    "0",
    INDEX.artifacts[:2],
    (
        DispatchRow("fwd", (Condition("head_dim", "<=", 64), Condition("dtype", "in", ("bf16",))), "fwd-bf16-d8-dv8"),
        DispatchRow("fwd", (Condition("batch", "==", 3),), INDEX.artifacts[0].variant, pack=True),
    ),
    (ABI,),
)
VALUE = json.loads(SMALL.to_bytes())
CALL = {"head_dim": 32, "dtype": "fp16", "batch": 3}


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(paths(VALUE)), st.one_of(st.just(...), JSON))
def test_a_damaged_part_means_the_same_or_a_contract_error(path: list[Any], new: Any):
    """Whatever a publisher signed by mistake: no other exception, and never a part with values of the wrong type."""
    data = change(VALUE, path, new)
    try:
        index = opened(data)
        served = index.serving("fwd", CALL)
        found = index.artifact(served.variant) if served else None
    except ContractError:
        with pytest.raises(ContractError):
            first(Index.from_bytes(data), "fwd", CALL)
        return
    if found is not None:
        assert {name: type(part) for name, part in found.to_json().items()} == {
            name: type(part) for name, part in SMALL.artifacts[0].to_json().items()
        }


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100_000, b'{"format":99}', change(VALUE, ["rows"], 1)])
def test_what_is_no_index_is_refused_in_the_same_words(data: bytes):
    with pytest.raises(ContractError) as whole:
        Index.from_bytes(data)
    with pytest.raises(ContractError) as part:
        opened(data)
    assert str(part.value) == str(whole.value)


def test_a_variant_that_is_listed_twice_is_refused():
    with pytest.raises(ContractError, match="listed twice"):
        opened(change(VALUE, ["artifacts"], [VALUE["artifacts"][0]] * 2))


@pytest.mark.parametrize("arch", ["gfx942", "sm_12x", "sm_1_2_0", "sm_-120", "", "sm_120a"])
def test_an_architecture_that_is_none_is_refused(arch: str):
    data = change(VALUE | {"artifacts": []}, ["arch"], arch)
    with pytest.raises(ContractError) as error:
        opened(data)
    assert "arch" in str(error.value)


@pytest.mark.parametrize("name", ["frame_sha256", "cubin_sha256", "abi"])
def test_a_digest_that_would_name_a_file_elsewhere_is_refused(name: str):
    index = opened(change(VALUE, ["artifacts", 0, name], "../../../victim"))
    with pytest.raises(ContractError, match=name):
        index.artifact(SMALL.artifacts[0].variant)


def test_a_relation_that_this_client_does_not_know_is_refused_wherever_it_stands():
    index = opened(change(VALUE, ["rows", 1, "when", 0, 1], "!="))
    for _ in range(2):
        with pytest.raises(ContractError, match="'!=' is none of"):
            index.serving("fwd", CALL | {"dtype": "bf16"})  # the first row would serve it
        with pytest.raises(ContractError, match="'!=' is none of"):
            index.rows("fwd", {})
    assert index.serving("bwd", CALL) is None


def test_an_ops_rows_are_parsed_once(monkeypatch: pytest.MonkeyPatch):
    index = opened(DATA)
    rows = index.rows("fwd", {})
    monkeypatch.setattr(DispatchRow, "from_json", None)
    assert index.rows("fwd", {}) == rows
