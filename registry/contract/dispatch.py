"""Which variant serves a call: rows of conditions on call facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.contract.canonical import check_fields
from registry.contract.errors import ContractError
from registry.contract.record import Record
from registry.contract.storage import RELATIONS
from registry.contract.variant import Variant


class Condition(Record):
    """`fact op value`: op is '==', '<=', '>=' or 'in' (value then is a tuple)."""

    fact: str
    op: str
    value: Any

    def __post_init__(self) -> None:
        if self.op not in RELATIONS:
            raise ContractError(f"condition: {self.op!r} is none of {', '.join(RELATIONS)}; update the client")

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether the fact meets the condition. A fact that the caller does not state is a ContractError."""
        if self.fact not in facts:
            raise ContractError(f"condition on {self.fact!r}, a fact this client does not know; update the client")
        try:
            return bool(RELATIONS[self.op](self.value, facts[self.fact]))
        except TypeError:  # such as 'bf16' <= 64
            raise ContractError(f"condition {self}: cannot be compared with {facts[self.fact]!r:.100}") from None

    def __str__(self) -> str:
        return f"{self.fact} {self.op} {list(self.value) if isinstance(self.value, tuple) else self.value}"


class DispatchRow(Record):
    """When all conditions hold, `variant` (a key) serves the call. Rows are ordered: the first that holds wins.

    pack: the query heads of a key/value head share tiles ("packed GQA").
    """

    op: str
    when: tuple[Condition, ...]
    variant: str
    pack: bool = False

    def to_json(self) -> dict[str, Any]:
        when = [[c.fact, c.op, list(c.value) if isinstance(c.value, tuple) else c.value] for c in self.when]
        return {"op": self.op, "when": when, "variant": self.variant, "pack": self.pack}

    @classmethod
    def from_json(cls, value: Any) -> DispatchRow:
        check_fields(value, "dispatch row", {"op": str, "when": list, "variant": str, "pack": bool})
        when = []
        for c in value["when"]:
            if not isinstance(c, list) or len(c) != 3 or not isinstance(c[0], str) or not isinstance(c[1], str):
                raise ContractError(f"dispatch row: condition {c!r:.100} is not [fact, op, value]")
            values = c[2] if isinstance(c[2], list) else [c[2]]
            if not all(isinstance(v, (str, int)) for v in values) or isinstance(c[2], list) != (c[1] == "in"):
                raise ContractError(f"dispatch row: condition {c!r:.100} has a value of the wrong type")
            if c[1] in ("<=", ">=") and not isinstance(c[2], int):
                raise ContractError(f"dispatch row: condition {c!r:.100} compares with no number")
            when.append(Condition(c[0], c[1], tuple(c[2]) if isinstance(c[2], list) else c[2]))
        Variant.parse(value["variant"])
        return cls(value["op"], tuple(when), value["variant"], value["pack"])
