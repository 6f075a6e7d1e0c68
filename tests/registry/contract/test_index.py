"""Artifacts and indexes: they round-trip, and no bytes make the parser raise anything unexpected."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import rows
from registry.contract import PARTED, Artifact, ContractError, Index, canonical_json, sha256_hex
from tests.registry.contract.json_values import JSON
from tests.registry.samples import KEYS, artifact, index
from tests.support.abis import FWD


def _index() -> Index:
    return index([artifact(key)[0] for key in KEYS[:3]])


def test_index_round_trips_and_its_digest_ignores_the_order_of_artifacts():
    one = _index()
    again = Index.from_bytes(one.to_bytes())
    assert again == Index(
        one.arch, one.release, tuple(sorted(one.artifacts, key=lambda a: a.variant)), one.rows, one.abis
    )
    shuffled = Index(one.arch, one.release, one.artifacts[::-1], one.rows, one.abis)
    assert again.digest == one.digest == shuffled.digest == sha256_hex(one.to_bytes())
    assert again.by_variant[KEYS[1]] == one.by_variant[KEYS[1]]
    assert again.abi(FWD.digest) == FWD


def test_index_digest_changes_with_the_order_of_rows():
    one = _index()
    swapped = Index(one.arch, one.release, one.artifacts, one.rows[::-1], one.abis)
    assert swapped.digest != one.digest


def test_index_refuses_contradictions():
    good = artifact(KEYS[0])[0]
    with pytest.raises(ContractError, match="twice"):
        index([good, good])
    with pytest.raises(ContractError, match="sm_90"):
        index([artifact(KEYS[0], "sm_90")[0]])
    with pytest.raises(ContractError, match="ABI"):
        Index("sm_120", "0.1.0", (good,), rows(), ())


@pytest.mark.parametrize(
    "changes",
    [
        {"cubin_sha256": "AB" * 32},
        {"frame_sha256": "../../etc/passwd"},
        {"frame_size": 0},
        {"cubin_size": -1},
        {"threads": True},
        {"arch": "sm_120a"},
        {"variant": "fwd-bf16-d64"},
        {"smem": "65536"},
        {"hot_loop": (("HMMA", 1.5),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_malformed_artifacts_are_refused(changes):
    with pytest.raises(ContractError):
        Artifact.from_json(artifact(KEYS[0], **changes)[0].to_json())


def test_a_newer_index_format_says_update():
    value = json.loads(_index().to_bytes())
    with pytest.raises(ContractError, match="update"):
        Index.from_bytes(canonical_json({**value, "format": PARTED + 1}))


@given(st.binary(max_size=200) | JSON.map(canonical_json))
def test_arbitrary_bytes_are_no_index(data):
    with pytest.raises(ContractError):
        Index.from_bytes(data)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"format":' + b"1" * 5000 + b"}", b"\xff", b'{"format":NaN}'], ids=range(4)
)
def test_hostile_json_is_no_index(data):
    with pytest.raises(ContractError):
        Index.from_bytes(data)


def _paths(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


_BASE = json.loads(_index().to_bytes())


_PLACES = [place for place in _paths(_BASE) if place]


@settings(max_examples=300)
@given(st.sampled_from(_PLACES), JSON, st.sampled_from(["replace", "delete"]))
def test_a_changed_index_is_refused_or_reads_as_what_it_says(place, value, action):
    changed = json.loads(json.dumps(_BASE))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if action == "replace":
        inner[place[-1]] = value
    else:
        del inner[place[-1]]
    try:
        parsed = Index.from_bytes(canonical_json(changed))
    except ContractError:
        return
    assert Index.from_bytes(parsed.to_bytes()) == parsed


@given(st.integers(0, len(_index().to_bytes()) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_the_digest(position, mask):
    data = bytearray(_index().to_bytes())
    data[position] ^= mask
    try:
        parsed = Index.from_bytes(bytes(data))
    except ContractError:
        return
    assert parsed.digest != _index().digest
