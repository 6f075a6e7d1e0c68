"""An index as a client reads it: each part is parsed, and so checked, when it is first needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from registry.contract.abi import Abi
from registry.contract.arch import ARCH
from registry.contract.artifact import ARTIFACT_FIELDS, Artifact
from registry.contract.canonical import DIGEST
from registry.contract.dispatch import RELATIONS, DispatchRow
from registry.contract.errors import ContractError, IntegrityError
from registry.contract.grid import Grid
from registry.contract.index import FORMAT, INDEX_FIELDS, Index
from registry.contract.storage import MAX_CONTENT


class Served(NamedTuple):
    """What a dispatch row picks. pack: whether the query heads of a key/value head share tiles."""

    variant: str
    pack: bool


class OpenIndex:
    """The index whose bytes hash to `digest`, which is trusted. Publishers parse an index whole; a client parses what a
    call needs, and `whole` parses all of it.

    Raises IntegrityError ('sha256') for other bytes, and ContractError, at once or when the part is needed, for bytes
    that are no index.
    """

    def __init__(self, data: bytes, digest: str):
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise IntegrityError(f"index {digest[:12]}…: its bytes hash to {found[:12]}…", reason="sha256")
        self._data = data
        self._parsed: dict[str, Artifact] = {}
        self._rows_of: dict[str, tuple[DispatchRow, ...]] = {}
        self._raw_rows: dict[str, list[Any]] = {}
        try:
            value = json.loads(data)
            sound = {name: type(part) for name, part in value.items()} == INDEX_FIELDS and value["format"] == FORMAT
            self._artifacts: dict[str, Any] = {raw["variant"]: raw for raw in value["artifacts"]}
            sound = sound and len(self._artifacts) == len(value["artifacts"])
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            sound = False
        if not sound or not ARCH.fullmatch(value["arch"]):
            raise _refusal(Index.from_bytes, data)
        self.arch: str = value["arch"]
        self.release: str = value["release"]
        self._rows: list[Any] = value["rows"]
        self._abis: list[Any] = value["abis"]

    def serving(self, op: str, facts: Mapping[str, Any]) -> Served | None:
        """What the first dispatch row whose conditions all hold picks, None if none holds. This is `Condition.holds` on
        raw JSON: objects of all rows would take a first call longer than all else of it."""
        try:
            for row in self._of(op):
                for fact, relation, value in row["when"]:
                    if not RELATIONS[relation](value, facts[fact]):
                        break
                else:
                    if type(row["variant"]) is not str or type(row["pack"]) is not bool:
                        raise TypeError
                    return Served(row["variant"], row["pack"])
        except (TypeError, ValueError, KeyError):
            raise _refusal(self._hold, op, facts) from None
        return None

    def _hold(self, op: str, facts: Mapping[str, Any]) -> None:
        for row in self.rows(op):
            for condition in row.when:
                condition.holds(facts)

    def rows(self, op: str) -> tuple[DispatchRow, ...]:
        """An op's dispatch rows, in order."""
        if op not in self._rows_of:
            self._rows_of[op] = tuple(map(DispatchRow.from_json, self._of(op)))
        return self._rows_of[op]

    def _of(self, op: str) -> list[Any]:
        """An op's rows as they are in JSON. A relation that this client does not know is refused in any of them: a row
        behind the one that serves this call serves others."""
        if op not in self._raw_rows:
            try:
                found = [row for row in self._rows if row["op"] == op]
                known = all(relation in RELATIONS for row in found for _, relation, _ in row["when"])
            except (TypeError, ValueError, KeyError):
                known = False
            if not known:
                raise _refusal(Index.from_bytes, self._data)
            self._raw_rows[op] = found
        return self._raw_rows[op]

    def artifact(self, variant: str) -> Artifact | None:
        """A variant's artifact, None if it is not listed."""
        if variant not in self._parsed:
            raw = self._artifacts.get(variant)
            if raw is None:
                return None
            self._parsed[variant] = self._parse(raw)
        return self._parsed[variant]

    def _parse(self, raw: dict[str, Any]) -> Artifact:
        """Types, ranges and digests, which name files, are looked at; `Artifact.from_json` looks at all forms."""
        sound = {name: type(part) for name, part in raw.items()} == ARTIFACT_FIELDS and raw["arch"] == self.arch
        if sound:
            counts = [part for part in raw.values() if type(part) is int]
            tile_m, sizes = raw["grid"].get("tile_m"), (raw["frame_size"], raw["cubin_size"])
            sound = type(tile_m) is int and min(counts) >= 0 and max(counts) < 2**31 and max(sizes) <= MAX_CONTENT
            sound = sound and all(DIGEST.fullmatch(raw[name]) for name in ("frame_sha256", "cubin_sha256", "abi"))
        if not sound:
            raise _refusal(Artifact.from_json, raw)
        try:
            grid, hot_loop = Grid(**raw["grid"]), tuple(sorted(raw["hot_loop"].items()))
            return Artifact(**raw | {"grid": grid, "hot_loop": hot_loop})
        except TypeError:
            raise _refusal(Artifact.from_json, raw) from None

    def abi(self, digest: str) -> Abi:
        """The ABI of an artifact."""
        for abi in map(Abi.from_json, self._abis):
            if abi.digest == digest:
                return abi
        raise ContractError(f"index: lists no ABI {digest[:12]}…")

    @cached_property
    def whole(self) -> Index:
        return Index.from_bytes(self._data)


def _refusal(parse: Callable[..., object], *values: object) -> ContractError:
    """What the strict parser says of what cannot be read."""
    try:
        parse(*values)
    except ContractError as error:
        return error
    return ContractError("index: cannot be read by this client; update it")
