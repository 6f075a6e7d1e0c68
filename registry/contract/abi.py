"""An op's kernel parameters: types, layout, digest, and what some of their values mean."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from registry.contract.canonical import canonical_json, check_fields, sha256_hex
from registry.contract.errors import ContractError
from registry.contract.record import Record, derived

PARAM_FORMATS = {"ptr": "Q", "i32": "i", "i64": "q", "f32": "f"}
WINDOW_OPEN = 2**30  # window_left / window_right of a side that is open; real bounds are below it


class Param(Record):
    """One kernel parameter. type: 'ptr' (8 bytes), 'i32', 'i64' or 'f32'."""

    name: str
    type: str

    def __post_init__(self) -> None:
        if self.type not in PARAM_FORMATS:
            raise ContractError(f"param {self.name!r}: type {self.type!r} is none of {', '.join(PARAM_FORMATS)}")

    @property
    def size(self) -> int:
        return struct.calcsize(PARAM_FORMATS[self.type])


class Abi(Record):
    """An op's ordered kernel parameters; the same for all variants of the op.

    layout: (offset, size) in bytes of each parameter: C order, natural alignment, as cuKernelGetParamInfo reports.
    nbytes: of a buffer that holds all parameters. digest: SHA-256 over names, types, order and version: offsets alone
    would not see two swapped parameters.
    """

    op: str
    version: int
    params: tuple[Param, ...]
    layout: tuple[tuple[int, int], ...] = derived()
    nbytes: int = derived()
    digest: str = derived()

    def __post_init__(self) -> None:
        names = [p.name for p in self.params]
        if len(set(names)) != len(names):
            raise ContractError(f"abi of {self.op}: a parameter name occurs twice")
        places, offset = [], 0
        for p in self.params:
            offset = -(-offset // p.size) * p.size
            places.append((offset, p.size))
            offset += p.size
        digest = sha256_hex(canonical_json(self.to_json()))
        self._derive(layout=tuple(places), nbytes=offset, digest=digest)

    def pack(self, values: Mapping[str, int | float]) -> bytearray:
        """The parameter buffer. `values` must name every parameter and no other."""
        if values.keys() != {p.name for p in self.params}:
            wrong = sorted(values.keys() ^ {p.name for p in self.params})
            raise ContractError(f"abi of {self.op} v{self.version}: parameters {wrong} are missing or unknown")
        buffer = bytearray(self.nbytes)
        for p, (offset, _) in zip(self.params, self.layout, strict=True):
            try:
                struct.pack_into("<" + PARAM_FORMATS[p.type], buffer, offset, values[p.name])
            except (struct.error, OverflowError) as error:
                raise ContractError(f"abi of {self.op}: {p.name}={values[p.name]!r} is no {p.type}: {error}") from None
        return buffer

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "version": self.version, "params": [[p.name, p.type] for p in self.params]}

    @classmethod
    def from_json(cls, value: Any) -> Abi:
        check_fields(value, "abi", {"op": str, "version": int, "params": list})
        params = []
        for pair in value["params"]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
                raise ContractError(f"abi: parameter {pair!r:.100} is not [name, type]")
            params.append(Param(*pair))
        return cls(value["op"], value["version"], tuple(params))
