"""An index as a client reads it: each part is fetched, parsed, and so checked, when it is first needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from registry.contract.abi import Abi
from registry.contract.arch import ARCH
from registry.contract.artifact import ARTIFACT_FIELDS, Artifact
from registry.contract.canonical import DIGEST, check_bytes
from registry.contract.errors import ContractError, CubineryError, IntegrityError
from registry.contract.grid import GRID_RULES, Grid
from registry.contract.storage import FORMAT, INDEX_FIELDS, MAX_CONTENT, PARTED, PARTED_FIELDS, RELATIONS

if TYPE_CHECKING:
    from registry.contract.dispatch import DispatchRow
    from registry.contract.index import Index


_T = TypeVar("_T")


class Served(NamedTuple):
    """What a dispatch row picks. pack: whether the query heads of a key/value head share tiles."""

    variant: str
    pack: bool


class OpenIndex:
    """The index whose bytes hash to `digest`, which is trusted. Publishers parse an index whole; a client reads and
    parses what a call needs, and `whole` all of it. read: a part's bytes, by its digest.

    Raises IntegrityError ('sha256') for other bytes, and ContractError, at once or when the part is needed, for bytes
    that are no index.
    """

    def __init__(self, data: bytes, digest: str, read: Callable[[str], bytes] | None = None):
        if hashlib.sha256(data).hexdigest() != digest:
            check_bytes(data, digest, "index")  # says so
        self._data, self._read = data, read
        self._parsed: dict[str, Artifact] = {}
        self._artifacts: dict[str, Any] = {}  # by variant, of what was read
        self._rows: dict[str, list[Any]] = {}  # by the part's digest, '' of an index that is one document
        self._of_op: dict[tuple[str, str], list[Any]] = {}  # by that and op
        self._row_objects: dict[tuple[str, str], list[DispatchRow]] = {}
        self._unread: dict[str, None] = {}  # digests of parts
        try:
            value = json.loads(data)
            in_parts = value["format"] == PARTED
            fields = PARTED_FIELDS if in_parts else INDEX_FIELDS
            sound = {name: type(part) for name, part in value.items()} == fields
            sound = sound and value["format"] in (FORMAT, PARTED) and ARCH.fullmatch(value["arch"]) is not None
            if in_parts:
                self._parts: list[dict[str, Any]] = value["parts"]
                self._unread = dict.fromkeys(map(_digest_of, self._parts))
                sound = sound and len(self._unread) == len(self._parts)
            elif sound:
                self._parts = [{"sha256": ""}]
                self._keep("", value)
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            sound = False
        if not sound:
            raise self._refusal()
        self.arch: str = value["arch"]
        self.release: str = value["release"]
        self._abis: list[Any] = value["abis"]

    def serving(self, op: str, facts: Mapping[str, Any]) -> Served | None:
        """What the first dispatch row whose conditions all hold picks, None if none holds. This is `Condition.holds` on
        raw JSON: objects of all rows would take a first call longer than all else of it."""
        try:
            for row in self._rows_of(op, facts):
                for fact, relation, value in row["when"]:
                    if not RELATIONS[relation](value, facts[fact]):
                        break
                else:
                    if type(row["variant"]) is not str or type(row["pack"]) is not bool:
                        raise TypeError
                    return Served(row["variant"], row["pack"])
        except CubineryError:
            raise
        except (TypeError, ValueError, KeyError):
            raise self._refusal(lambda: self._hold(op, facts)) from None
        return None

    def _hold(self, op: str, facts: Mapping[str, Any]) -> None:
        for row in self.rows(op, facts):
            for condition in row.when:
                condition.holds(facts)

    def rows(self, op: str, facts: Mapping[str, Any]) -> list[DispatchRow]:
        """An op's dispatch rows, in order, but for parts of them of which none serves a call with these facts; others
        may be unknown."""
        from registry.contract.dispatch import DispatchRow

        found: list[DispatchRow] = []
        try:
            for digest in self._parts_of(op, facts):
                if (digest, op) not in self._row_objects:
                    self._row_objects[digest, op] = [DispatchRow.from_json(row) for row in self._of(op, digest)]
                found += self._row_objects[digest, op]
        except (TypeError, ValueError, KeyError) as error:
            raise (error if isinstance(error, CubineryError) else self._refusal()) from None
        return found

    def _rows_of(self, op: str, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The same as they are in JSON."""
        for digest in self._parts_of(op, facts):
            yield from self._of(op, digest)

    def _parts_of(self, op: str, facts: Mapping[str, Any]) -> Iterator[str]:
        for part in self._parts:
            if not part["sha256"] or (part["op"] == op and _may_serve(part, facts)):
                yield part["sha256"]

    def _of(self, op: str, digest: str) -> list[dict[str, Any]]:
        """An op's rows in a document. A relation that this client does not know is refused in any of them: a row behind
        the one that serves this call serves others."""
        if (digest, op) in self._of_op:
            return self._of_op[digest, op]
        if digest not in self._rows:
            self._take(digest)
        try:
            found = [row for row in self._rows[digest] if row["op"] == op]
            known = all(relation in RELATIONS for row in found for _, relation, _ in row["when"])
        except (TypeError, ValueError, KeyError):
            known = False
        if not known:
            raise self._refusal()
        self._of_op[digest, op] = found
        return found

    def _take(self, digest: str) -> None:
        """Read a part, and what it holds."""
        if self._read is None:
            raise ContractError(f"index: is in parts, and part {digest[:12]}… is not there")
        data = self._read(digest)
        check_bytes(data, digest, "index part")
        try:
            self._keep(digest, json.loads(data))
        except (ValueError, RecursionError, TypeError, KeyError):
            raise self._refusal() from None

    def _keep(self, digest: str, value: dict[str, Any]) -> None:
        """Rows and artifacts of a document. Raises what malformed JSON does."""
        rows, artifacts = value["rows"], value["artifacts"]
        by_variant = {raw["variant"]: raw for raw in artifacts}
        if len(by_variant) != len(artifacts):
            raise ValueError
        self._artifacts |= by_variant
        self._rows[digest] = rows
        self._unread.pop(digest, None)

    def artifact(self, variant: str) -> Artifact | None:
        """A variant's artifact, None if it is not listed. The part that names it has been read by `serving`; for
        another variant all may have to be."""
        if variant not in self._parsed:
            for digest in tuple(self._unread):  # other threads may read them meanwhile
                if variant in self._artifacts:
                    break
                self._take(digest)
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
            sound = (
                sound and tile_m > 0 and raw["grid"].keys() == {"rule", "tile_m"} and raw["grid"]["rule"] in GRID_RULES
            )
            sound = sound and all(DIGEST.fullmatch(raw[name]) for name in ("frame_sha256", "cubin_sha256", "abi"))
        if not sound:
            raise self._refusal(lambda: Artifact.from_json(raw))
        grid, hot_loop = _made(Grid, raw["grid"]), tuple(sorted(raw["hot_loop"].items()))
        return _made(Artifact, raw | {"grid": grid, "hot_loop": hot_loop})

    def abi(self, digest: str) -> Abi:
        """The ABI of an artifact."""
        for abi in map(Abi.from_json, self._abis):
            if abi.digest == digest:
                return abi
        raise ContractError(f"index: lists no ABI {digest[:12]}…")

    @cached_property
    def whole(self) -> Index:
        from registry.contract.index import Index  # here: a call needs no publisher's parser

        return Index.from_bytes(self._data, self._read)

    def _refusal(self, parse: Callable[[], object] | None = None) -> ContractError:
        """What the strict parser says of what cannot be read."""
        try:
            if parse is not None:
                parse()
            else:
                _ = self.whole
        except IntegrityError:
            raise
        except ContractError as error:
            return error
        return ContractError("index: cannot be read by this client; update it")


def _made(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """A record of fields that were checked: its own checks, one by one, take a first call twice as long."""
    record = object.__new__(kind)
    vars(record).update(values)
    return record


def _digest_of(part: dict[str, Any]) -> str:
    """Of an entry of the list of parts. Raises what malformed JSON does."""
    if part.keys() != {"op", "when", "head_dims", "sha256"} or not DIGEST.fullmatch(part["sha256"]):
        raise ValueError
    digest: str = part["sha256"]
    return digest


def _may_serve(part: dict[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a part may serve a call of which only `facts` are known."""
    for fact, relation, value in part["when"]:
        if fact in facts and not RELATIONS[relation](value, facts[fact]):
            return False
    head_dim, head_dim_v = facts.get("head_dim", 0), facts.get("head_dim_v", 0)
    pairs = part["head_dims"]
    return not pairs or any(head_dim <= most and head_dim_v <= most_v for most, most_v in pairs)
