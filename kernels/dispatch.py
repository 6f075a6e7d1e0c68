"""The dispatch table: which variants exist and which call gets which. Pure data, read from JSON. No cutlass import.

The builder compiles `variants()`, the index carries `rows()`, the runtime evaluates what the index carries.
`fwd_tiles.json` is what tuning writes (`python -m builder accept`): classes of calls, first match first, and for each
pair of head dims the tiles of the classes that have one of their own, cheapest dims first. `paged_tiles.json` is the
same for the paged forward, twice over: for caches of the query's dtype, and of e4m3; `bwd_tiles.json` for the backward.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.validity import bwd_invalid, fwd_invalid, paged_invalid
from registry.contract.dispatch import Condition, DispatchRow
from registry.contract.errors import ContractError
from registry.contract.variant import ALL_DTYPES, DTYPES, Variant
from registry.ops.attention import E4M3
from registry.ops.workspaces import ROWS

FWD_TILES = Path(__file__).with_name("fwd_tiles.json")
PAGED_TILES = Path(__file__).with_name("paged_tiles.json")
BWD_TILES = Path(__file__).with_name("bwd_tiles.json")
INVALID = {"fwd": fwd_invalid, "fwd_paged": paged_invalid, "bwd": bwd_invalid}
LETTERS = {  # how a tile of each op is written
    "fwd": r"m\d+-n\d+-w\d+-s\d+(-q[1-9]\d*)?(-a1)?",
    "fwd_paged": rf"m\d+-n\d+-w\d+-s\d+(-q[1-9]\d*)?(-{E4M3})?",
    "bwd": r"m\d+-n\d+-w\d+-s\d+(-o2)?(-c[2-9])?(-x[2-9])?(-r[1-9]\d*)?(-t1)?(-u1)?",
}
# What conditions of a class may be about: call facts that are numbers, head dims apart (docs/design.md).
FACTS = (
    *("batch", "heads_q", "heads_kv", "group", "seqlen_q", "seqlen_k", "total_q", "packed_rows"),
    *("causal", "varlen", "window"),
)


@dataclass(frozen=True)
class Tile:
    """What serves the calls of a class with head dims up to `dims`. evidence: the measurement behind it, if any."""

    dims: tuple[int, int]
    call_class: str
    tile: str  # e.g. 'm64-n32-w4-s1-q14'; `kernels.validity` explains the letters
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
        cache = (Condition("kv_dtype", "==", "e4m3" if self.e4m3 else dtype),) if self.op == "fwd_paged" else ()
        dims = (Condition("head_dim", "<=", self.dims[0]), Condition("head_dim_v", "<=", self.dims[1]))
        return (Condition("dtype", "==", dtype), *cache, *dims)


@dataclass(frozen=True)
class Tiles:
    """A forward's table. classes: name -> conditions, in the order in which they are tried."""

    classes: dict[str, tuple[Condition, ...]]
    tiles: tuple[Tile, ...]
    op: str = "fwd"

    @classmethod
    def read(cls, path: Path = FWD_TILES) -> Tiles:
        """ContractError, which names the file and what is wrong in it, if it is no such table."""
        try:
            value = json.loads(path.read_bytes())
            classes = {c["name"]: tuple(_condition(*when) for when in c["when"]) for c in value["classes"]}
            if len(classes) != len(value["classes"]):
                raise ValueError("a class is named twice")
            op = value.get("op", "fwd")
            if op not in INVALID:
                raise ValueError(f"op {op!r} is none of {', '.join(INVALID)}")
            tiles = tuple(
                Tile((t["head_dim"], t["head_dim_v"]), t["class"], t["tile"], t["pack"], t["evidence"], op)
                for t in value["tiles"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
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
        at = [self.place(tile) for tile in self.tiles]
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
        if tile.pack and self.op == "bwd":
            return "pack is the forward's: query heads of the backward take turns"
        if tile.pack and not groups(when):
            return "pack needs a class with the condition group >= 2"
        if not re.fullmatch(LETTERS[self.op], tile.tile):
            return "a tile is like 'm128-n32-w4-s1' or 'm64-n32-w4-s1-q14-a1'"
        try:
            return INVALID[self.op](tile.variant(DTYPES[0]))
        except ContractError as error:
            return str(error)

    def place(self, tile: Tile) -> tuple[int, int, bool, int]:
        """Where it stands among the others: cheap head dims first, then in the order of the classes."""
        return sum(tile.dims), tile.dims[0], tile.e4m3, list(self.classes).index(tile.call_class)

    def to_text(self) -> str:
        """The file's one text for this table: a class or tile a line."""
        classes = [{"name": n, "when": [[c.fact, c.op, c.value] for c in w]} for n, w in self.classes.items()]
        tiles = [
            {"head_dim": t.dims[0], "head_dim_v": t.dims[1], "class": t.call_class, "tile": t.tile, "pack": t.pack,
             "evidence": t.evidence}
            for t in sorted(self.tiles, key=self.place)
        ]  # fmt: skip
        lines = {name: ",\n".join(map(json.dumps, rows)) for name, rows in (("classes", classes), ("tiles", tiles))}
        op = f'"op": "{self.op}",\n' if self.op != "fwd" else ""
        return "{" + op + ",\n".join(f'"{name}": [\n{text}\n]' for name, text in lines.items()) + "}\n"


def _condition(fact: str, op: str, value: int) -> Condition:
    if fact not in FACTS:
        raise ValueError(f"condition on {fact!r}, which is none of {', '.join(sorted(FACTS))}")
    if type(value) is not int or op == "in":
        raise ValueError(f"condition {[fact, op, value]} is no comparison with a whole number")
    return Condition(fact, op, value)


def groups(when: tuple[Condition, ...]) -> bool:
    """Whether all calls of a class have several query heads a key/value head: only those can be packed."""
    return any(c.fact == "group" and c.op in (">=", "==") and c.value >= 2 for c in when)


def rows(path: Path = FWD_TILES, paged_path: Path = PAGED_TILES, bwd_path: Path = BWD_TILES) -> tuple[DispatchRow, ...]:
    """All dispatch rows, in order: the first of an op whose conditions hold serves the call."""
    tables = [row for p in (path, paged_path, bwd_path) for row in _tile_rows(Tiles.read(p))]
    return (*tables, *_combine_rows(), *_append_rows(), *_around_bwd_rows())


def _tile_rows(table: Tiles) -> list[DispatchRow]:
    return [
        DispatchRow(
            table.op, (*tile.conditions(dtype), *table.classes[tile.call_class]), tile.variant(dtype).key, tile.pack
        )
        for tile in table.tiles
        for dtype in DTYPES
    ]


def _combine_rows() -> list[DispatchRow]:
    """One kernel for each dtype of the output: a warp takes whatever head_dim_v there is."""
    return [
        DispatchRow(
            "fwd_combine",
            (Condition("dtype", "==", dtype), Condition("head_dim_v", "<=", 256)),
            f"fwd_combine-{dtype}-d256-dv256-m4",
        )
        for dtype in ALL_DTYPES
    ]


def _append_rows() -> list[DispatchRow]:
    found = []
    for dtype in DTYPES:
        for cache, feature in ((dtype, ""), ("e4m3", f"-{E4M3}")):
            equal = (Condition("dtype", "==", dtype), Condition("kv_dtype", "==", cache))
            dims = (Condition("head_dim", "<=", 256), Condition("head_dim_v", "<=", 256))
            found.append(DispatchRow("kv_append", (*equal, *dims), f"kv_append-{dtype}-d256-dv256-m4{feature}"))
    return found


def _around_bwd_rows() -> list[DispatchRow]:
    """What goes before and behind the backward: a kernel for each dtype, whatever head dims there are."""
    dims = (Condition("head_dim", "<=", 256), Condition("head_dim_v", "<=", 256))
    return [
        DispatchRow(op, (Condition("dtype", "==", dtype), *dims), f"{op}-{dtype}-d256-dv256-m{m}")
        for op, m in (("bwd_preprocess", ROWS), ("bwd_postprocess", ROWS), ("bwd_sum", 8))
        for dtype in DTYPES
    ]


def variants(path: Path = FWD_TILES, paged_path: Path = PAGED_TILES, bwd_path: Path = BWD_TILES) -> tuple[Variant, ...]:
    """Every variant that a row names, once, sorted by key."""
    return tuple(Variant.parse(key) for key in sorted({row.variant for row in rows(path, paged_path, bwd_path)}))
