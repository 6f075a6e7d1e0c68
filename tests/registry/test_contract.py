"""registry.contract: names round-trip, layouts match C, and no bytes make the parser raise anything unexpected."""

from __future__ import annotations

import json
import re
import string
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.abi import ABIS, FWD
from kernels.dispatch import rows, variants
from registry.contract import (
    DTYPES,
    FORMAT,
    PARAM_FORMATS,
    Abi,
    Artifact,
    Condition,
    ContractError,
    DispatchRow,
    Grid,
    Index,
    Param,
    Variant,
    canonical_json,
    check_arch,
    check_digest,
    division,
    sha256_hex,
)
from tests.registry.samples import KEYS, artifact, index

# -- variants -------------------------------------------------------------------------------------------------------

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


# -- ABI ------------------------------------------------------------------------------------------------------------

_values = {
    "ptr": st.integers(0, 2**64 - 1),
    "i32": st.integers(-(2**31), 2**31 - 1),
    "i64": st.integers(-(2**63), 2**63 - 1),
    "f32": st.floats(width=32, allow_nan=False),
}
_typed_values = st.sampled_from(sorted(PARAM_FORMATS)).flatmap(lambda t: st.tuples(st.just(t), _values[t]))


@given(st.lists(_typed_values, max_size=40))
def test_layout_and_pack_agree_with_the_c_compiler(typed):
    abi = Abi("op", 1, tuple(Param(f"p{i}", kind) for i, (kind, _) in enumerate(typed)))
    native = "@" + "".join(PARAM_FORMATS[kind] for kind, _ in typed)
    values = [value for _, value in typed]
    assert abi.nbytes == struct.calcsize(native)
    assert abi.pack({f"p{i}": v for i, v in enumerate(values)}) == struct.pack(native, *values)
    for i, (offset, size) in enumerate(abi.layout):
        assert offset + size == struct.calcsize(native[: i + 2])
    assert Abi.from_json(json.loads(canonical_json(abi.to_json()))) == abi


def test_the_forward_abi_packs_each_parameter_where_its_layout_says():
    values = {p.name: float(i) if p.type == "f32" else i for i, p in enumerate(FWD.params, start=1)}
    buffer = FWD.pack(values)
    for p, (offset, _) in zip(FWD.params, FWD.layout, strict=True):
        assert struct.unpack_from("<" + PARAM_FORMATS[p.type], buffer, offset)[0] == values[p.name]


def test_pack_refuses_missing_unknown_and_oversized_values():
    abi = Abi("op", 1, (Param("q", "ptr"), Param("n", "i32")))
    for values in ({"q": 1}, {"q": 1, "n": 2, "x": 3}, {"q": -1, "n": 0}, {"q": 0, "n": 2**31}, {"q": 0, "n": 1.5}):
        with pytest.raises(ContractError, match="op"):
            abi.pack(values)


def test_abi_digest_sees_swapped_parameters_and_versions():
    q, k = Param("q", "ptr"), Param("k", "ptr")
    digests = {a.digest for a in (Abi("f", 1, (q, k)), Abi("f", 1, (k, q)), Abi("f", 2, (q, k)), Abi("g", 1, (q, k)))}
    assert len(digests) == 4


def test_malformed_parameters_are_refused():
    with pytest.raises(ContractError, match="u8"):
        Param("q", "u8")
    with pytest.raises(ContractError, match="twice"):
        Abi("op", 1, (Param("q", "ptr"), Param("q", "i32")))


# -- canonical JSON -------------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(_json)
def test_canonical_json_is_ascii_without_spaces_and_lossless(value):
    data = canonical_json(value)
    assert data.isascii()
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1, {"d": 2, "c": 3}]}) == b'{"a":[1,{"c":3,"d":2}],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


# -- index ----------------------------------------------------------------------------------------------------------


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
        Index.from_bytes(canonical_json({**value, "format": FORMAT + 1}))


@given(st.binary(max_size=200) | _json.map(canonical_json))
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
@given(st.sampled_from(_PLACES), _json, st.sampled_from(["replace", "delete"]))
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


# -- rows, grids, digests -------------------------------------------------------------------------------------------


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


@given(st.integers(0, 10**6), st.integers(1, 256), st.integers(1, 64), st.integers(1, 9), st.integers(0, 64))
def test_grid_covers_every_query_row_once(seqlen_q, tile_m, heads_kv, group, batch):
    facts = {"seqlen_q": seqlen_q, "heads_q": heads_kv * group, "batch": batch}
    for pack in (1, group):
        blocks = Grid("tiles_heads_batch", tile_m).blocks(facts, pack)
        tiles, rest = divmod(blocks, heads_kv * group // pack * batch) if batch else (0, 0)
        assert rest == 0
        assert batch == 0 or (tiles - 1) * tile_m < seqlen_q * pack <= tiles * tile_m


@given(st.lists(st.integers(0, 700), min_size=1, max_size=20), st.sampled_from([16, 64, 128]), st.integers(1, 9))
def test_grid_has_tiles_of_its_own_for_each_packed_entry(lengths, tile_m, pack):
    """Entry b, from token c on, owns the tiles from c·pack // tile_m + b on; the grid's order says nothing else."""
    facts = {"varlen": 1, "total_q": sum(lengths), "seqlen_q": 1, "heads_q": 3 * pack, "batch": len(lengths)}
    tiles, rest = divmod(Grid("tiles_heads_batch", tile_m).blocks(facts, pack), 3)
    assert rest == 0
    free = start = 0
    for b, length in enumerate(lengths):
        first = start * pack // tile_m + b
        assert first >= free
        free = first + -(-length * pack // tile_m)
        start += length
    assert free <= tiles or start == tiles == 0


@pytest.mark.parametrize(("batch", "total_q"), [(0, 0), (0, 500), (3, 0)])
def test_a_packed_array_without_entries_or_tokens_needs_no_blocks(batch, total_q):
    facts = {"varlen": 1, "total_q": total_q, "seqlen_q": 1, "heads_q": 4, "batch": batch}
    assert Grid("tiles_heads_batch", 64).blocks(facts, 2) == 0


@given(st.integers(1, 4096), st.integers(0, 2**31 - 1))
def test_division_by_multiplication(divisor, n):
    magic, shift = division(divisor)
    for dividend in (n, n - n % divisor, max(n - n % divisor - 1, 0), 2**31 - 1):
        assert dividend * magic >> shift == dividend // divisor and dividend * magic < 2**63
    assert division(1) == (2**31, 31)


def test_a_dispatch_row_says_whether_heads_are_packed():
    row = DispatchRow("fwd", (Condition("group", ">=", 2),), KEYS[0], pack=True)
    assert row.to_json()["pack"] is True and DispatchRow.from_json(row.to_json()) == row
    for value in (1, None, "yes"):
        with pytest.raises(ContractError, match="pack"):
            DispatchRow.from_json({**row.to_json(), "pack": value})
    with pytest.raises(ContractError, match="pack"):
        DispatchRow.from_json({name: value for name, value in row.to_json().items() if name != "pack"})


def test_grids_of_another_time_are_refused():
    with pytest.raises(ContractError, match="update"):
        Grid("persistent", 128)
    with pytest.raises(ContractError, match="tile_m"):
        Grid("tiles_heads_batch", 0)


@given(st.text(max_size=70) | st.from_regex("[0-9a-fA-F]{63,65}\n?"))
def test_only_64_lower_case_hex_digits_are_a_digest(text):
    if re.fullmatch("[0-9a-f]{64}", text, re.ASCII):
        assert check_digest(text) == text
    else:
        with pytest.raises(ContractError):
            check_digest(text)


@pytest.mark.parametrize("arch", ["sm_120a", "sm_120f", "sm_9", "SM_120", "sm_120\n", "sm_1200", "", None, 120])
def test_other_architecture_names_are_refused(arch):
    with pytest.raises(ContractError):
        check_arch(arch)
