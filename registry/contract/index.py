"""The list of one release's artifacts for one architecture, and the documents that it is stored as."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

from registry.contract.abi import Abi
from registry.contract.arch import check_arch
from registry.contract.artifact import Artifact
from registry.contract.canonical import canonical_json, check_bytes, check_fields, sha256_hex
from registry.contract.dispatch import DispatchRow
from registry.contract.errors import ContractError
from registry.contract.parts import check_entry, parts_of, read_part
from registry.contract.record import Record, derived
from registry.contract.storage import FORMAT, INDEX_FIELDS, PARTED, PARTED_FIELDS

MAX_WHOLE = 400  # artifacts of an index that is one document, which clients of before parts read too
Read = Callable[[str], bytes | None]  # of a part, by its digest; None: it is not there


class Index(Record):
    """The immutable list of one release's artifacts for one architecture, with dispatch rows and ABIs.

    Addressed by the SHA-256 of `to_bytes()`. No timestamps: one release of this code makes equal digests of equal
    inputs; what another release cut otherwise keeps its own documents.
    """

    arch: str
    release: str
    artifacts: tuple[Artifact, ...]
    rows: tuple[DispatchRow, ...]
    abis: tuple[Abi, ...]
    by_variant: dict[str, Artifact] = derived()

    def __post_init__(self) -> None:
        check_arch(self.arch)
        self._derive(by_variant={a.variant: a for a in self.artifacts})
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

    @cached_property
    def documents(self) -> dict[str, bytes]:
        """What the index is stored as, by SHA-256: its parts, if it has any, and at last `to_bytes()`."""
        value, found = self.to_json(), {}
        if len(self.artifacts) > MAX_WHOLE:
            parts = list(parts_of(self.rows, {a["variant"]: self.by_variant[a["variant"]] for a in value["artifacts"]}))
            found = {entry["sha256"]: body for entry, body in parts}
            del value["artifacts"], value["rows"]
            value |= {"format": PARTED, "parts": [entry for entry, _ in parts]}
        head = canonical_json(value)
        return found | {sha256_hex(head): head}

    def to_json(self) -> dict[str, Any]:
        """All of it as one document."""
        return {
            "format": FORMAT,
            "arch": self.arch,
            "release": self.release,
            "artifacts": [a.to_json() for a in sorted(self.artifacts, key=lambda a: a.variant)],
            "rows": [r.to_json() for r in self.rows],
            "abis": [a.to_json() for a in sorted(self.abis, key=lambda a: (a.op, a.version))],
        }

    def to_bytes(self) -> bytes:
        """The document whose SHA-256 is the index's digest."""
        return self.documents[self.digest]

    @cached_property
    def digest(self) -> str:
        return next(reversed(self.documents))

    @classmethod
    def from_bytes(cls, data: bytes, read: Read | None = None) -> Index:
        """Parse and validate. read: for an index in parts.

        Raises ContractError for bytes that are no index, IntegrityError ('sha256') for a part with other bytes, and
        nothing else but what `read` raises.
        """
        value = _json(data, "index")
        if isinstance(value, dict) and value.get("format") not in (FORMAT, PARTED):
            reads = f"this client reads {FORMAT} and {PARTED}; update it"
            raise ContractError(f"index: format {value.get('format')!r:.50}, {reads}")
        in_parts = isinstance(value, dict) and value["format"] == PARTED
        check_fields(value, "index", PARTED_FIELDS if in_parts else INDEX_FIELDS)
        documents: dict[str, bytes] = {}
        if in_parts:
            documents = {entry["sha256"]: verified_part(entry["sha256"], read) for entry in _entries(value)}
            rows, artifacts = _of_parts(value["parts"], documents)
        else:
            rows = [DispatchRow.from_json(r) for r in value["rows"]]
            artifacts = [Artifact.from_json(a) for a in value["artifacts"]]
        abis = tuple(Abi.from_json(a) for a in value["abis"])
        index = cls(value["arch"], value["release"], tuple(artifacts), tuple(rows), abis)
        again = value | {"abis": index.to_json()["abis"]} if in_parts else index.to_json()
        if canonical_json(again) == data:
            index._derive(documents=documents | {sha256_hex(data): data})  # however its writer cut it
        return index


def part_digests(data: bytes) -> list[str]:
    """The digests of the parts that an index's document names, none if it is whole. Raises ContractError."""
    value = _json(data, "index")
    if not isinstance(value, dict) or value.get("format") != PARTED:
        return []
    check_fields(value, "index", PARTED_FIELDS)
    return [entry["sha256"] for entry in _entries(value)]


def _entries(value: dict[str, Any]) -> list[dict[str, Any]]:
    found = [check_entry(entry) for entry in value["parts"]]
    if len({entry["sha256"] for entry in found}) != len(found):
        raise ContractError("index: a part is listed twice")
    return found


def verified_part(digest: str, read: Read | None) -> bytes:
    """A part's bytes, which hash to `digest`. Raises ContractError, IntegrityError ('sha256')."""
    data = read(digest) if read is not None else None
    if data is None:
        raise ContractError(f"index: is in parts, and part {digest[:12]}… is not there")
    check_bytes(data, digest, "index part")
    return data


def _of_parts(entries: list[Any], documents: dict[str, bytes]) -> tuple[list[DispatchRow], list[Artifact]]:
    """Of all parts; artifacts that several of them name once."""
    rows: list[DispatchRow] = []
    artifacts: dict[str, Artifact] = {}
    for entry in entries:
        some, named = read_part(entry, documents[entry["sha256"]])
        rows += some
        for artifact in named:
            if artifacts.setdefault(artifact.variant, artifact) != artifact:
                raise ContractError(f"index: {artifact.variant} is listed twice, in different forms")
    return rows, sorted(artifacts.values(), key=lambda a: a.variant)


def _json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{what}: not JSON: {error}") from None
