"""An index in parts: what a client reads of a table of thousands is a list of parts, and the one that serves its call.

The index's document, whose digest is the index's, then lists parts: {"op", "when", "head_dims", "sha256"} each. A part
is a document of its own: {"rows", "artifacts"}, consecutive dispatch rows of one op and the artifacts that they name.
`when` holds for every call that one of the part's rows serves, and so does one of `head_dims`, the pairs of bounds that
the rows have; there are none if a row lacks such bounds. What no row names stands in parts without rows or op.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from registry.contract.artifact import Artifact
from registry.contract.canonical import canonical_json, check_digest, check_fields, sha256_hex
from registry.contract.dispatch import DispatchRow
from registry.contract.errors import ContractError

PART_ROWS = 100  # at most, of a part
ENTRY_FIELDS: dict[str, type] = {"op": str, "when": list, "head_dims": list, "sha256": str}
PART_FIELDS: dict[str, type] = {"rows": list, "artifacts": list}


def parts_of(rows: Sequence[DispatchRow], artifacts: Mapping[str, Artifact]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(entry of the list, the part's bytes) of each part. artifacts: by variant."""
    left = dict(artifacts)
    for op, of_op in groupby(rows, key=lambda row: row.op):
        for some in _pieces(list(of_op)):
            named = dict.fromkeys(row.variant for row in some)
            for variant in named:
                left.pop(variant, None)
            yield _part(op, some, [artifacts[variant] for variant in named if variant in artifacts])
    for rest in _pieces(list(left.values())):
        yield _part("", (), rest)


def _pieces(things: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(things), PART_ROWS):
        yield things[start : start + PART_ROWS]


def _part(op: str, rows: Sequence[DispatchRow], artifacts: Iterable[Artifact]) -> tuple[dict[str, Any], bytes]:
    by_variant = sorted(artifacts, key=lambda a: a.variant)
    body = canonical_json({"rows": [r.to_json() for r in rows], "artifacts": [a.to_json() for a in by_variant]})
    return {"op": op, **bounds(rows), "sha256": sha256_hex(body)}, body


def bounds(rows: Sequence[DispatchRow]) -> dict[str, Any]:
    """What an entry says of its part's rows."""
    pairs: dict[tuple[Any, Any], None] = {}
    for row in rows:
        most = {c.fact: c.value for c in row.when if c.op == "<="}
        pairs[most.get("head_dim"), most.get("head_dim_v")] = None
    known = [] if any(None in pair for pair in pairs) else [list(pair) for pair in pairs]
    return {"when": common_conditions(rows), "head_dims": known}


def common_conditions(rows: Sequence[DispatchRow]) -> list[list[Any]]:
    """Conditions that hold wherever one of the rows serves, as JSON: those that all have, at their widest."""
    found = []
    asked = [{(c.fact, c.op): c.value for c in row.when} for row in rows]
    for fact, op in asked[0] if asked else ():
        if all((fact, op) in one for one in asked):
            values = [one[fact, op] for one in asked]
            if op == "in":
                found.append([fact, op, list(dict.fromkeys(value for among in values for value in among))])
            elif op != "==":
                found.append([fact, op, max(values) if op == "<=" else min(values)])
            elif len(set(values)) == 1:
                found.append([fact, op, values[0]])
    return found


def check_entry(value: Any) -> dict[str, Any]:
    """An entry of the list, else ContractError."""
    check_fields(value, "index part", ENTRY_FIELDS)
    check_digest(value["sha256"], "index part")
    return dict(value)


def read_part(entry: Mapping[str, Any], data: bytes) -> tuple[list[DispatchRow], list[Artifact]]:
    """What a part holds, if it is what its entry says. Raises ContractError."""
    rows, artifacts = check_part(data)
    if any(row.op != entry["op"] for row in rows) or entry != {**entry, **bounds(rows)}:
        raise ContractError(f"index part {entry['sha256'][:12]}…: its rows are not those that the index states")
    return rows, artifacts


def check_part(data: bytes) -> tuple[list[DispatchRow], list[Artifact]]:
    """What a part holds. ContractError unless these are a part's bytes, in canonical form."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"index part: not JSON: {error}") from None
    check_fields(value, "index part", PART_FIELDS)
    rows = [DispatchRow.from_json(row) for row in value["rows"]]
    artifacts = [Artifact.from_json(a) for a in value["artifacts"]]
    if canonical_json({"rows": [r.to_json() for r in rows], "artifacts": [a.to_json() for a in artifacts]}) != data:
        raise ContractError("index part: not in its canonical form")
    return rows, artifacts


def is_part(data: bytes) -> bool:
    """Whether one of an index's documents, in canonical form, is a part: keys are sorted, and the index's first is
    'abis'."""
    return data.startswith(b'{"artifacts":')
