"""From a tuning result to the dispatch table: which tile serves which class of calls, with the evidence beside it.

A tile replaces what the table would choose only with a gain of 2 % or more with SM120's occupancy emulated, as the
geometric mean over the class's cases, and only if it was measured in fresh processes that agreed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from builder.build import Table, plan
from builder.errors import ResultsError
from builder.toolchain import Toolchain
from builder.worker import Pool, Task
from kernels.fwd import table as fwd
from kernels.tables import Tile, Tiles
from registry.contract import Variant, sha256_hex
from registry.store import Store

FORMAT = 1  # of the result file, as benchmarks.tune writes it
DTYPE = "bf16"
GAIN = 1.02
RUNS = 3  # fresh processes that must have measured a tile before it may enter the table
MODES = ("sm120", "free")


class Choice(NamedTuple):
    """How a call is served."""

    tile: str
    pack: bool

    def __str__(self) -> str:
        return self.tile + (" packed" if self.pack else "")


@dataclass(frozen=True)
class Case:
    """One measured call. facts: as dispatch rows see it. incumbent: what served it when it was measured."""

    name: str
    facts: Mapping[str, Any]
    incumbent: Choice


@dataclass(frozen=True)
class Option:
    """A tile as measured. gains: mode → case name → time of the case's incumbent over its own."""

    choice: Choice
    ptx_sha256: str
    gains: Mapping[str, Mapping[str, float]]
    runs: int
    excluded: str | None

    def gain(self, mode: str, cases: Iterable[Case]) -> float:
        return math.exp(statistics.fmean(math.log(self.gains[mode][case.name]) for case in cases))


@dataclass(frozen=True)
class Tuned:
    """All that was measured for one class of calls of one pair of head dims."""

    dims: tuple[int, int]
    call_class: str
    cases: tuple[Case, ...]
    incumbents: Mapping[Choice, str]  # → ptx_sha256
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        return f"{self.dims[0]}/{self.dims[1]} {self.call_class}"

    def hashes(self) -> dict[str, str]:
        """Variant key → PTX hash of all that may decide."""
        found = {c: ptx for c, ptx in self.incumbents.items()}
        found |= {o.choice: o.ptx_sha256 for o in self.options if eligible(o)}
        return {Tile(self.dims, "", c.tile, c.pack).variant(DTYPE).key: ptx for c, ptx in found.items()}


def eligible(option: Option) -> bool:
    return option.excluded is None and option.runs >= RUNS


def command(options: argparse.Namespace, table: Table, progress: Any) -> int:
    """Decide, say why, and write kernels/fwd/tiles.json if it changes."""
    origin, found = read(options.results)
    tiles = Tiles.read(fwd.TILES)
    check_table(tiles, found)
    check_ptx(found, table, options.registry, options.jobs, progress)
    changed, lines = decide(tiles, found, origin)
    print("\n".join(lines))
    text = changed.to_text()
    same = text == fwd.TILES.read_text()
    if not (same or options.dry_run):
        fwd.TILES.write_text(text)
    print(f"{fwd.TILES}: {'unchanged' if same else 'would change' if options.dry_run else 'written'}")
    return 0


# ---- reading ----


def read(path: Path) -> tuple[dict[str, str], list[Tuned]]:
    """({gpu, date}, what was measured) of a result file; ResultsError for any other file."""
    try:
        value = json.loads(path.read_bytes())
        if value["tuning"] != FORMAT or value["op"] != "fwd":
            raise ValueError(f"tuning {value['tuning']!r} of {value['op']!r}, this release reads {FORMAT} of 'fwd'")
        origin = {name: _text(value[name]) for name in ("gpu", "date")}
        found = [_tuned(entry) for entry in value["classes"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path}: no result of benchmarks.tune: {type(error).__name__}: {error}") from None
    if not found:
        raise ResultsError(f"{path}: nothing was measured")
    return origin, found


def _tuned(value: Mapping[str, Any]) -> Tuned:
    cases = tuple(Case(_text(c["case"]), dict(c["facts"]), _choice(c["incumbent"])) for c in value["cases"])
    if not cases:
        raise ValueError(f"class {value['class']!r} has no cases")
    names = {case.name for case in cases}
    incumbents = {_choice(c["incumbent"]): _text(c["incumbent"]["ptx_sha256"]) for c in value["cases"]}
    options = tuple(_option(o, names) for o in value["options"])
    return Tuned((value["head_dim"], value["head_dim_v"]), _text(value["class"]), cases, incumbents, options)


def _choice(value: Mapping[str, Any]) -> Choice:
    if type(value["pack"]) is not bool:
        raise TypeError(f"pack is {value['pack']!r}")
    return Choice(_text(value["tile"]), value["pack"])


def _option(value: Mapping[str, Any], names: set[str]) -> Option:
    gains = {mode: {name: float(gain) for name, gain in value["gains"][mode].items()} for mode in MODES}
    for mode, by_case in gains.items():
        if by_case.keys() != names or not all(0 < gain < math.inf for gain in by_case.values()):
            raise ValueError(f"gains of {value['tile']} in mode {mode} are not one positive number a case")
    excluded = None if value["excluded"] is None else _text(value["excluded"])
    return Option(_choice(value), _text(value["ptx_sha256"]), gains, int(value["runs"]), excluded)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return value


# ---- what must hold before anything is decided ----


def check_table(tiles: Tiles, found: Sequence[Tuned]) -> None:
    """ResultsError if the result is about head dims or classes that the table has not, or about another table."""
    served = {tile.dims for tile in tiles.tiles}
    for tuned in found:
        if tuned.dims not in served:
            known = ", ".join(f"{d}/{dv}" for d, dv in sorted(served))
            raise ResultsError(f"{tuned.name}: the table's head dims are {known}", reason="dims")
        if tuned.call_class not in tiles.classes:
            raise ResultsError(f"{tuned.name}: the table's classes are {', '.join(tiles.classes)}")
        for case in tuned.cases:
            now = serving(tiles, tuned.dims, case.facts)
            if now != case.incumbent:
                raise ResultsError(
                    f"{tuned.name}: {case.name} was measured against {case.incumbent}, the table now says {now}: "
                    "tune again",
                    reason="stale",
                )


def serving(tiles: Tiles, dims: tuple[int, int], facts: Mapping[str, Any]) -> Choice:
    """What the table chooses for a call of exactly these head dims."""
    rows = (t for t in tiles.tiles if t.dims == dims and all(c.holds(facts) for c in tiles.classes[t.call_class]))
    first = next(rows)
    return Choice(first.tile, first.pack)


def check_ptx(found: Sequence[Tuned], table: Table, registry: Path | None, jobs: int, progress: Any) -> None:
    """ResultsError unless the builder would now make exactly the PTX that was measured."""
    measured: dict[str, str] = {}
    for tuned in found:
        for key, ptx in tuned.hashes().items():
            if measured.setdefault(key, ptx) != ptx:
                raise ResultsError(f"{key}: two PTX hashes in one result")
    for key, now in ptx_hashes(measured, table, registry, jobs, progress).items():
        if now != measured[key]:
            raise ResultsError(
                f"{key}: PTX {measured[key]:.12} was measured, the builder now makes {now:.12}: tune again",
                reason="stale",
            )


def ptx_hashes(keys: Iterable[str], table: Table, registry: Path | None, jobs: int, progress: Any) -> dict[str, str]:
    """Variant key → SHA-256 of its PTX: from the registry where it is up to date, else generated now."""
    variants = tuple(Variant.parse(key) for key in sorted(keys))
    found: dict[str, str] = {}
    if registry is not None:
        with Store(registry, readonly=True) as store:
            for job in plan(replace(table, variants=variants), (), Toolchain.current(), store):
                if (stored := store.get_ptx(job.ptx_fingerprint)) is not None:
                    found[job.key] = stored.ptx_sha256
    todo = [Task(v.key, (), table.generator) for v in variants if v.key not in found]
    if todo:
        with Pool(min(jobs, len(todo))) as pool:
            for done, answer in enumerate(pool.run(todo), 1):
                if answer.ptx is None:
                    raise ResultsError(f"{answer.key}: cannot be built now: {answer.error}", reason="stale")
                found[answer.key] = sha256_hex(answer.ptx.encode())
                progress(done, len(todo), answer.key)
    return found


# ---- deciding ----


def decide(tiles: Tiles, found: Sequence[Tuned], origin: Mapping[str, str]) -> tuple[Tiles, list[str]]:
    """(the new table, a line for every class). Later classes first: what they get may serve earlier ones too."""
    order = list(tiles.classes)
    lines = []
    for tuned in sorted(found, key=lambda t: (t.dims, -order.index(t.call_class))):
        tiles, line = _decide_one(tiles, tuned, origin)
        lines.append(f"{tuned.name}: {line}")
    return tiles, lines


def _decide_one(tiles: Tiles, tuned: Tuned, origin: Mapping[str, str]) -> tuple[Tiles, str]:
    current = {case.name: serving(tiles, tuned.dims, case.facts) for case in tuned.cases}
    shown = " and ".join(sorted({str(choice) for choice in current.values()}))
    found = sorted(_eligible(tuned), key=lambda o: -o.gain("sm120", tuned.cases))
    if not found:
        return tiles, f"{shown} stays: nothing was measured well enough{_excluded(tuned)}"
    best = found[0]
    gains = {mode: _over(best, tuned, current, mode) for mode in MODES}
    lead = gains["sm120"]
    if lead is not None and lead < GAIN:
        rival = next((o for o in found if o.choice not in current.values()), None)
        if rival is None:
            return tiles, f"{shown} stays: no other was measured well enough{_excluded(tuned)}"
        gains = {mode: _over(rival, tuned, current, mode) for mode in MODES}
        line = f"{shown} stays: {rival.choice} is at {_percent(gains['sm120'])}, {_percent(GAIN)} is needed"
        return _confirmed(tiles, tuned, rival, gains, origin), line
    row = Tile(tuned.dims, tuned.call_class, best.choice.tile, best.choice.pack, _evidence(best, shown, gains, origin))
    others = tuple(t for t in tiles.tiles if (t.dims, t.call_class) != (tuned.dims, tuned.call_class))
    changed = replace(tiles, tiles=tuple(sorted((*others, row), key=tiles.rank)))
    if problem := changed.problem():
        raise ResultsError(f"{tuned.name}: {problem}")
    why = "which was not measured here" if lead is None else f"{_percent(lead)} (free {_percent(gains['free'])})"
    return changed, f"{best.choice} replaces {shown}: {why}"


def _eligible(tuned: Tuned) -> list[Option]:
    """The options that may enter the table. What served all cases is one of them, whatever its repetitions say."""
    found = [o for o in tuned.options if eligible(o)]
    if len(tuned.incumbents) == 1:
        ((choice, ptx),) = tuned.incumbents.items()
        found = [o for o in found if o.choice != choice]
        level = {mode: dict.fromkeys((case.name for case in tuned.cases), 1.0) for mode in MODES}
        found.append(Option(choice, ptx, level, RUNS, None))
    return found


def _over(best: Option, tuned: Tuned, current: Mapping[str, Choice], mode: str) -> float | None:
    """Gain of `best` over what the table chooses by now; None if that was not measured in some case."""
    measured = {o.choice: o.gains[mode] for o in tuned.options if o.excluded is None}
    logs = []
    for case in tuned.cases:
        choice = current[case.name]
        level = 1.0 if choice == case.incumbent else measured.get(choice, {}).get(case.name)
        if level is None:
            return None
        logs.append(math.log(best.gains[mode][case.name] / level))
    return math.exp(statistics.fmean(logs))


def _confirmed(
    tiles: Tiles, tuned: Tuned, rival: Option, gains: Mapping[str, float | None], origin: Mapping[str, str]
) -> Tiles:
    """The class's own tile stays; its evidence now is how it stood against the best of the others."""
    mine = next((t for t in tiles.tiles if (t.dims, t.call_class) == (tuned.dims, tuned.call_class)), None)
    if mine is None:
        return tiles
    leads = {mode: None if gain is None else 1 / gain for mode, gain in gains.items()}
    ptx = tuned.incumbents[Choice(mine.tile, mine.pack)]
    own = replace(mine, evidence=_evidence(replace(rival, ptx_sha256=ptx), str(rival.choice), leads, origin))
    return replace(tiles, tiles=tuple(own if t is mine else t for t in tiles.tiles))


def _evidence(
    chosen: Option, over: str, gains: Mapping[str, float | None], origin: Mapping[str, str]
) -> dict[str, Any]:
    rounded = {mode: None if gain is None else round(gain, 3) for mode, gain in gains.items()}
    return {**rounded, "over": over, "ptx_sha256": chosen.ptx_sha256, **origin}


def _excluded(tuned: Tuned) -> str:
    return "".join(f"; {o.choice}: {o.excluded}" for o in tuned.options if o.excluded)


def _percent(gain: float | None) -> str:
    return "?" if gain is None else f"{(gain - 1) * 100:+.1f} %"
