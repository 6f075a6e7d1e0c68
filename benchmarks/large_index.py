"""An index of tens of thousands of artifacts: those of a registry among made-up ones, as a table of that size has them.

A made-up pair of head dims has as many tiles, dispatch rows and classes of calls as a real one, in its rank. Its
artifacts name the frames of the real ones, which the registry has. Calls of a real pair are served as before.
"""

from __future__ import annotations

import random
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.cubins import BenchmarkError
from benchmarks.derived import CHANNEL, add_channel, read_index
from registry.contract import Artifact, Condition, DispatchRow, Index, Variant, sha256_hex

Dims = tuple[int, int]
HEAD_DIMS = range(4, 257, 4)


@dataclass
class Part:
    """What an op has for one pair of head dims."""

    artifacts: list[Artifact] = field(default_factory=list)
    rows: list[DispatchRow] = field(default_factory=list)  # in their order


def enlarge(registry: Path, arch: str, count: int) -> Index:
    """Point the channel of a registry file of one's own at an index of `count` artifacts, and return that."""
    index = grown(read_index(registry, arch), count)
    with closing(sqlite3.connect(registry)) as database, database:
        add_channel(database, CHANNEL, index)
    return index


def grown(index: Index, count: int) -> Index:
    """The index with made-up artifacts besides, `count` in all. BenchmarkError where it cannot have so many."""
    artifacts, rows = list(index.artifacts), list(index.rows)
    if count < len(artifacts):
        raise BenchmarkError(f"count {count}: the index has {len(artifacts)} artifacts already")
    for part in _made_up(index):
        if len(artifacts) == count:
            break
        chosen = part.artifacts[: count - len(artifacts)]
        keys = {artifact.variant for artifact in chosen}
        artifacts += chosen
        rows += [row for row in part.rows if row.variant in keys]
    if len(artifacts) < count:
        raise BenchmarkError(f"count {count}: an index made of this one has at most {len(artifacts)} artifacts")
    artifacts.sort(key=lambda artifact: artifact.variant)
    ops = list(dict.fromkeys(row.op for row in index.rows))
    ranked = sorted(rows, key=lambda row: (ops.index(row.op), _rank(row.variant)))
    return Index(index.arch, index.release, tuple(artifacts), tuple(ranked), index.abis)


def _made_up(index: Index) -> Iterator[Part]:
    """For each new pair, what one of the op's real pairs has, these by turns; of ops with tiles of several pairs."""
    parts = _parts(index)
    of_ops = [list(pairs.values()) for pairs in parts.values() if len(pairs) > 1]
    taken = {dims for pairs in parts.values() for dims in pairs}
    new = [dims for dims in product(HEAD_DIMS, HEAD_DIMS) if dims not in taken]
    random.Random(0).shuffle(new)  # so that they lie before and behind the real ones, however many are taken
    for number, dims in enumerate(new):
        for real in of_ops:
            yield _with_dims(real[number % len(real)], dims)


def _parts(index: Index) -> dict[str, dict[Dims, Part]]:
    """By op and head dims."""
    found: dict[str, dict[Dims, Part]] = defaultdict(lambda: defaultdict(Part))
    for artifact in index.artifacts:
        _part(found, artifact.variant).artifacts.append(artifact)
    for row in index.rows:
        _part(found, row.variant).rows.append(row)
    return found


def _part(parts: dict[str, dict[Dims, Part]], key: str) -> Part:
    variant = Variant.parse(key)
    return parts[variant.op][variant.head_dim, variant.head_dim_v]


def _with_dims(part: Part, dims: Dims) -> Part:
    facts = dict(zip(("head_dim", "head_dim_v"), dims, strict=True))
    rows = []
    for row in part.rows:
        when = tuple(Condition(c.fact, c.op, facts.get(c.fact, c.value)) for c in row.when)
        rows.append(row.replace(variant=_renamed(row.variant, dims), when=when))
    return Part([_made(artifact, _renamed(artifact.variant, dims)) for artifact in part.artifacts], rows)


def _made(artifact: Artifact, key: str) -> Artifact:
    symbol = artifact.symbol.replace(artifact.variant.replace("-", "_"), key.replace("-", "_"))
    return artifact.replace(variant=key, symbol=symbol, ptx_sha256=sha256_hex(key.encode()))


def _renamed(key: str, dims: Dims) -> str:
    return Variant.parse(key).replace(head_dim=dims[0], head_dim_v=dims[1]).key


def _rank(key: str) -> tuple[int, int]:
    """Where tables of tiles have a pair of head dims: the cheap ones first."""
    variant = Variant.parse(key)
    return variant.head_dim + variant.head_dim_v, variant.head_dim
