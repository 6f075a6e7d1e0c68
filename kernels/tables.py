"""Tuned tables of tiles, as their `tiles.json` has them: classes of calls, first match first, and for each pair of head
dims the tiles of the classes that have one of their own, cheapest dims first. No cutlass import.

A file of an op whose cache may be of e4m3 has that twice over: for caches of the query's dtype, and of e4m3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import validity
from registry import ops
from registry.contract.dispatch import Condition, DispatchRow
from registry.contract.errors import ContractError
from registry.contract.storage import DTYPES
from registry.contract.variant import Variant
from registry.ops.attention import DTYPE, E4M3, HEAD_DIMS, KV_DTYPE

ALL_HEAD_DIMS = 256  # of a kernel that serves every head_dim
# What no class may ask: rows ask it of each call.
ASKED = frozenset(fact.name for fact in (DTYPE, KV_DTYPE, *HEAD_DIMS))


@dataclass(frozen=True)
class Tile:
    """What serves the calls of a class with head dims up to `dims`. evidence: the measurement behind it, if any."""

    dims: tuple[int, int]
    call_class: str
    tile: str  # e.g. 'm64-n32-w4-s1-q14', as `registry.ops` describes it
    pack: bool
    evidence: dict[str, Any] | None = None
    op: str = "fwd"

    @property
    def e4m3(self) -> bool:
        return self.tile.endswith(E4M3)

    def variant(self, dtype: str) -> Variant:
        return Variant.parse(f"{self.op}-{dtype}-d{self.dims[0]}-dv{self.dims[1]}-{self.tile}")

    def conditions(self, dtype: str) -> tuple[Condition, ...]:
        """What a call must have for this tile's variant, its class apart."""
        of_cache = KV_DTYPE in ops.get(self.op).facts
        cache = (Condition("kv_dtype", "==", "e4m3" if self.e4m3 else dtype),) if of_cache else ()
        dims = (Condition("head_dim", "<=", self.dims[0]), Condition("head_dim_v", "<=", self.dims[1]))
        return (Condition("dtype", "==", dtype), *cache, *dims)


@dataclass(frozen=True)
class Tiles:
    """An op's table. classes: name -> conditions, in the order in which they are tried."""

    classes: dict[str, tuple[Condition, ...]]
    tiles: tuple[Tile, ...]
    op: str = "fwd"

    @classmethod
    def read(cls, path: Path) -> Tiles:
        """ContractError, which names the file and what is wrong in it, if it is no such table."""
        try:
            value = json.loads(path.read_bytes())
            op = value["op"]
            askable = {fact.name for fact in ops.get(op).facts} - ASKED
            classes = {c["name"]: tuple(_condition(askable, *when) for when in c["when"]) for c in value["classes"]}
            if len(classes) != len(value["classes"]):
                raise ValueError("a class is named twice")
            tiles = tuple(
                Tile((t["head_dim"], t["head_dim_v"]), t["class"], t["tile"], t["pack"], t["evidence"], op)
                for t in value["tiles"]
            )
        except (OSError, ValueError, KeyError, TypeError, ContractError) as error:
            raise ContractError(f"{path}: {type(error).__name__}: {error}") from None
        table = cls(classes, tiles, op)
        if problem := table.problem():
            raise ContractError(f"{path}: {problem}")
        return table

    def problem(self) -> str | None:
        """What keeps this from being a table; None if nothing does."""
        if not self.tiles:
            return "no tiles"
        for tile in self.tiles:
            if reason := self._tile_problem(tile):
                return f"{tile.dims[0]}/{tile.dims[1]} {tile.call_class} {tile.tile}: {reason}"
        at = [self.rank(tile) for tile in self.tiles]
        if at != sorted(set(at)):
            return "tiles are not one a class, by head_dim + head_dim_v, then head_dim, then class"
        served = {(tile.dims, tile.e4m3) for tile in self.tiles if not self.classes[tile.call_class]}
        if unserved := {(tile.dims, tile.e4m3) for tile in self.tiles} - served:
            return f"head dims {sorted(unserved)[0][0]} lack a tile of the class without conditions"
        return None

    def _tile_problem(self, tile: Tile) -> str | None:
        when = self.classes.get(tile.call_class)
        if when is None:
            return f"no class of that name, there are {', '.join(self.classes)}"
        if type(tile.pack) is not bool:
            return f"pack {tile.pack!r} is neither true nor false"
        if tile.pack and not any(scalar.name == "pack" for scalar in ops.get(self.op).scalars):
            return f"pack: query heads of {self.op} do not share tiles"
        if tile.pack and not groups(when):
            return "pack needs a class with the condition group >= 2"
        try:
            return validity.invalid(tile.variant(DTYPES[0]))
        except ContractError as error:
            return str(error)

    def rank(self, tile: Tile) -> tuple[int, int, bool, int]:
        """Where a tile stands among the others: cheap head dims first, then in the order of the classes."""
        return sum(tile.dims), tile.dims[0], tile.e4m3, list(self.classes).index(tile.call_class)

    def to_text(self) -> str:
        """The file's one text for this table: a class or tile a line."""
        classes = [{"name": n, "when": [[c.fact, c.op, c.value] for c in w]} for n, w in self.classes.items()]
        tiles = [
            {"head_dim": t.dims[0], "head_dim_v": t.dims[1], "class": t.call_class, "tile": t.tile, "pack": t.pack,
             "evidence": t.evidence}
            for t in sorted(self.tiles, key=self.rank)
        ]  # fmt: skip
        lines = {name: ",\n".join(map(json.dumps, rows)) for name, rows in (("classes", classes), ("tiles", tiles))}
        return f'{{"op": "{self.op}",\n' + ",\n".join(f'"{name}": [\n{text}\n]' for name, text in lines.items()) + "}\n"

    def rows(self) -> list[DispatchRow]:
        """The rows that stand for it, in order."""
        return [
            DispatchRow(
                self.op, (*tile.conditions(dtype), *self.classes[tile.call_class]), tile.variant(dtype).key, tile.pack
            )
            for tile in self.tiles
            for dtype in DTYPES
        ]


def _condition(askable: set[str], fact: str, op: str, value: int) -> Condition:
    if fact not in askable:
        raise ValueError(f"condition on {fact!r}, which is none of {', '.join(sorted(askable))}")
    if type(value) is not int or op == "in":
        raise ValueError(f"condition {[fact, op, value]} is no comparison with a whole number")
    return Condition(fact, op, value)


def groups(when: tuple[Condition, ...]) -> bool:
    """Whether all calls of a class have several query heads a key/value head: only those can be packed."""
    return any(c.fact == "group" and c.op in (">=", "==") and c.value >= 2 for c in when)


def all_head_dims(op: str, dtype: str, tile: str, *when: Condition) -> DispatchRow:
    """The row of a kernel that serves every head_dim. tile: with its features."""
    most = ALL_HEAD_DIMS
    dims = (Condition("head_dim", "<=", most), Condition("head_dim_v", "<=", most))
    key = f"{op}-{dtype}-d{most}-dv{most}-{tile}"
    return DispatchRow(op, (Condition("dtype", "==", dtype), *when, *dims), key)
