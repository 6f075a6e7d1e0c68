"""A clone whose table has more variants than ours, to see how long `.ci/run` will take at that size.

    git clone . /tmp/timed && python -m tests.synthetic_table 350 /tmp/timed && time /tmp/timed/.ci/run

The clone's tables of tiles get neighbours of their tiles, of kinds of loops that there are, each in a class that serves
no call. They are compiled, at some 3 s of CPU a variant, and those that the builder refuses are left out. Then the
clone's ledger of CPU execution says that all of them passed, which is not true: nothing executes them here. What it
says of their PTX is true, so `.ci/run` there does what it does here: it compiles and executes the tenth that the commit
picks. The clone is for timing only; nothing is committed in it, and nothing must be.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from builder.build import Build, Table
from kernels import dispatch
from kernels.parts import TABLE, part
from kernels.tables import Tile, Tiles
from kernels.validity import invalid
from registry import ops
from registry.contract import DTYPES, Condition, Variant
from registry.store import Store

ROOT = Path(__file__).parents[1]
OPS = ("fwd", "fwd_paged", "bwd")  # those with tables of tiles
ARCH = "sm_120"
NO_CALL = (Condition("batch", ">=", 2**31 - 1),)
STEPS = ("grow", "record")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.synthetic_table", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("variants", type=int, help="how many the clone's table is to have")
    parser.add_argument("folder", type=Path, help="a fresh clone of this repository, which is changed")
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    if reason := unfit(folder):
        parser.error(f"folder {options.folder}: {reason}")
    registry = folder / "build" / "synthetic.db"
    registry.parent.mkdir(exist_ok=True)
    for step in STEPS:  # each in a process that has the clone's sources, and the table as the step before left it
        command = f"from tests.synthetic_table import {step}; {step}({options.variants}, {str(registry)!r})"
        env = {**os.environ, "PYTHONPATH": str(folder)}
        if code := subprocess.run([sys.executable, "-c", command], cwd=folder, env=env, check=False).returncode:
            return code
    print(f"{folder} is for timing only: its ledger says of variants that they passed, which nothing has executed")
    return 0


def unfit(folder: Path) -> str | None:
    """Why a folder is no clone that may be changed; None if it is one."""
    if folder == ROOT:
        return "is this checkout itself; name a clone of it"
    command = ["git", "-C", str(folder), "status", "--porcelain"]
    if not (folder / ".git").is_dir() or not (folder / "tests" / Path(__file__).name).is_file():
        return "is no clone of this repository; make one with `git clone`"
    if subprocess.run(command, capture_output=True, text=True, check=True).stdout:
        return "has changes of its own; make a fresh clone"
    return None


# ---- the table ----


def grow(variants: int, registry: str) -> None:
    """Bring this checkout's table to a number of variants. SystemExit where there are not so many neighbours."""
    tables = {op: Tiles.read(part(op, TABLE).TILES) for op in OPS}
    added: list[Tile] = []
    waiting = candidates(tables)
    while (missing := variants - len(dispatch.variants()) - len(DTYPES) * len(added)) > 0:
        tried = list(islice(waiting, -(-missing // len(DTYPES))))
        if not tried:
            sys.exit(f"variants {variants}: no more than {variants - missing} can be made of this table's tiles")
        refused = compiled(tried, Path(registry))
        added += [tile for tile in tried if not refused & {tile.variant(dtype).key for dtype in DTYPES}]
        print(f"{len(added)} tiles added, {len(refused)} variants refused by the builder", flush=True)
    for op, table in tables.items():
        part(op, TABLE).TILES.write_text(enlarged(table, [tile for tile in added if tile.op == op]).to_text())
    print(f"{len(dispatch.variants())} variants, {len(dispatch.rows())} dispatch rows")


def candidates(tables: dict[str, Tiles]) -> Iterator[Tile]:
    """Tiles that could be added: of each op as many as fit its share of today's tiles, while it has any."""
    waiting = {op: neighbours(table) for op, table in tables.items()}
    taken = dict.fromkeys(tables, 0)
    while waiting:
        op = min(waiting, key=lambda op: taken[op] / len(tables[op].tiles))
        taken[op] += 1
        if tile := next(waiting[op], None):
            yield tile
        else:
            del waiting[op]


def neighbours(table: Tiles) -> Iterator[Tile]:
    """Tiles that differ from one of the table's in one letter, by a value that the letter has elsewhere in it; then
    those that differ from these so, and so on. Head dims come by turns. What needs more registers than any of the
    table's own is left out: the compiler would spill, and the builder refuse it."""
    kind = kinds(table.op)
    known = {tile.variant(DTYPES[0]) for tile in table.tiles}
    loops = {kind(variant) for variant in known}
    values = {part.letter: {variant.size(part.letter) for variant in known} for part in ops.get(table.op).letters}
    own = [registers(variant) for variant in known]
    most = {what: max(needed[what] for needed in own) for what in own[0]}
    nearest = list(table.tiles)
    while nearest:
        by_dims: dict[tuple[int, int], list[Tile]] = defaultdict(list)
        for tile in nearest:
            for variant in _beside(tile.variant(DTYPES[0]), values):
                if variant in known or invalid(variant) is not None or kind(variant) not in loops:
                    continue
                if all(needed <= most[what] for what, needed in registers(variant).items()):
                    known.add(variant)
                    text = variant.key.split("-", 4)[4]
                    by_dims[tile.dims].append(replace(tile, tile=text, pack=False, evidence=None))
        nearest = [tile for turn in zip_longest(*by_dims.values()) for tile in turn if tile]
        yield from nearest


def registers(v: Variant) -> dict[str, int]:
    """Of a thread, about: the forward's for O and scores, and with Q besides; the backward's for dK and dV."""
    m, n, threads = v.size("m"), v.size("n"), 32 * v.size("w")
    if v.op == "bwd":
        return {"accumulators": n * (v.head_dim + v.head_dim_v) // threads}
    accumulators = m * (v.head_dim_v + n) // threads
    return {"accumulators": accumulators, "all": accumulators + m * 8 * v.size("q") // threads}


def kinds(op: str) -> Callable[[Variant], Hashable]:
    """What tells an op's kinds of loops apart. More of them would be more skeletons, which have tests of their own."""
    from tests.kernels import backward_cases, cases

    return backward_cases.loops if op == "bwd" else cases.loops


def _beside(variant: Variant, values: dict[str, set[int]]) -> Iterator[Variant]:
    """values: of each letter, in the order of keys."""
    for letter, sizes in values.items():
        for size in sorted(sizes - {variant.size(letter)}):
            named = {other: size if other == letter else variant.size(other) for other in values}
            yield variant.replace(tile=tuple((other, n) for other, n in named.items() if n))  # 0 is not written


def enlarged(table: Tiles, added: Iterable[Tile]) -> Tiles:
    """The table with tiles in classes that serve no call, tried before the class without conditions."""
    count: Counter[tuple[tuple[int, int], bool]] = Counter()
    placed, new = [], {}
    for tile in added:
        count[tile.dims, tile.e4m3] += 1
        name = f"timing_{len(table.classes) + count[tile.dims, tile.e4m3]}"  # a new one in a larger table too
        placed.append(replace(tile, call_class=name))
        new[name] = NO_CALL
    bounded = {name: when for name, when in table.classes.items() if when}
    rest = {name: when for name, when in table.classes.items() if not when}
    made = replace(table, classes=bounded | new | rest)
    made = replace(made, tiles=tuple(sorted((*table.tiles, *placed), key=made.rank)))
    assert made.problem() is None, made.problem()
    return made


def compiled(tiles: Iterable[Tile], registry: Path) -> set[str]:
    """Compile the variants of tiles; the keys of those that the builder refuses."""
    variants = tuple(sorted(tile.variant(dtype) for tile in tiles for dtype in DTYPES))
    with Store(registry) as store:
        table = replace(Table.ours(), variants=variants, rows=())
        result = Build(table, [ARCH], store).run(jobs=os.cpu_count() or 1, allow_partial=True)
    return set(result.failed)


# ---- the ledger ----


class Collected:
    """A pytest plugin. pairs: (variant's key, test module) of the tests that would compile or execute a variant."""

    def __init__(self) -> None:
        self.pairs: set[tuple[str, str]] = set()

    def pytest_collection_finish(self, session: Any) -> None:
        from tests.kernels.conftest import variant_key

        with_kernel = [item for item in session.items if "variant_of" in getattr(item, "fixturenames", ())]
        self.pairs = {(key, item.module.__name__) for item in with_kernel if (key := variant_key(item))}


def record(variants: int, registry: str) -> None:
    """Write a record for each variant and module that has none, with the PTX that the builder made of it."""
    import pytest

    from tests.kernels import executed

    collected = Collected()
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "tests/kernels"]
    if code := pytest.main(options, plugins=[collected]):
        sys.exit(f"tests/kernels cannot be collected: {code}")
    with Store(Path(registry), readonly=True) as store:
        made = {artifact.variant: artifact.ptx_sha256 for artifact in store.artifacts().values()}
    ledger, fingerprints = executed.Ledger.read(), executed.fingerprints()
    found = [
        executed.Record(key, fingerprints[key], ptx, module, executed.suite(module))
        for key, module in sorted(collected.pairs)
        if (ptx := made.get(key) or ledger.ptx(key, fingerprints[key]))
    ]
    ledger.write(found)
    print(f"{len(found)} records for {len(fingerprints)} variants, {variants} asked for")


if __name__ == "__main__":
    sys.exit(main())
