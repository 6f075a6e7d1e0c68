"""The list of one release's artifacts for one architecture, and its bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property

from registry.contract.abi import Abi
from registry.contract.arch import check_arch
from registry.contract.artifact import Artifact
from registry.contract.canonical import canonical_json, check_fields, sha256_hex
from registry.contract.dispatch import DispatchRow
from registry.contract.errors import ContractError

FORMAT = 2  # of the index; a client refuses an index of another format
INDEX_FIELDS: dict[str, type] = {
    "format": int, "arch": str, "release": str, "artifacts": list, "rows": list, "abis": list,
}  # fmt: skip


@dataclass(frozen=True)
class Index:
    """The immutable list of one release's artifacts for one architecture, with dispatch rows and ABIs.

    Addressed by the SHA-256 of `to_bytes()`. No timestamps: equal inputs give equal digests.
    """

    arch: str
    release: str
    artifacts: tuple[Artifact, ...]
    rows: tuple[DispatchRow, ...]
    abis: tuple[Abi, ...]
    by_variant: dict[str, Artifact] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_arch(self.arch)
        object.__setattr__(self, "by_variant", {a.variant: a for a in self.artifacts})
        if len(self.by_variant) != len(self.artifacts):
            raise ContractError("index: a variant is listed twice")
        if len({(abi.op, abi.version) for abi in self.abis}) != len(self.abis):
            raise ContractError("index: an ABI of one op and version is listed twice")
        digests = {abi.digest for abi in self.abis}
        for a in self.artifacts:
            if a.arch != self.arch:
                raise ContractError(f"index: {a.variant} is for {a.arch}, the index for {self.arch}")
            if a.abi not in digests:
                raise ContractError(f"index: {a.variant} names an ABI that the index does not list")

    def abi(self, digest: str) -> Abi:
        return next(a for a in self.abis if a.digest == digest)

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "format": FORMAT,
                "arch": self.arch,
                "release": self.release,
                "artifacts": [a.to_json() for a in sorted(self.artifacts, key=lambda a: a.variant)],
                "rows": [r.to_json() for r in self.rows],
                "abis": [a.to_json() for a in sorted(self.abis, key=lambda a: (a.op, a.version))],
            }
        )

    @cached_property
    def digest(self) -> str:
        return sha256_hex(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Index:
        """Parse and validate. Raises ContractError, and nothing else, for any bytes that are no index."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ContractError(f"index: not JSON: {error}") from None
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise ContractError(f"index: format {value.get('format')!r:.50}, this client reads {FORMAT}; update it")
        check_fields(value, "index", INDEX_FIELDS)
        return cls(
            value["arch"],
            value["release"],
            tuple(Artifact.from_json(a) for a in value["artifacts"]),
            tuple(DispatchRow.from_json(r) for r in value["rows"]),
            tuple(Abi.from_json(a) for a in value["abis"]),
        )
