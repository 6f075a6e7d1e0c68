"""ABIs: layouts match C, digests see every change."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.contract import PARAM_FORMATS, Abi, ContractError, Param, canonical_json
from tests.support.abis import FWD

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
