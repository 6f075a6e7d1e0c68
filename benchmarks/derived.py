"""Registry files made from another: the same cubins under indexes of one variant each.

So a test or a benchmark runs exactly the variant that it wants through the public API: the runtime under test is the
one that users have, and only the data that it reads differs.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from benchmarks.cubins import BenchmarkError
from registry import ops
from registry.contract import Artifact, DispatchRow, Index, Variant
from registry.store import Store

CHANNEL = "stable"


def read_index(registry: Path, arch: str, channel: str = CHANNEL) -> Index:
    """The index of a channel for `arch`. BenchmarkError if the file has none."""
    with Store(registry, readonly=True) as store:
        index = store.index(store.channel(channel).get(arch, ""))
    if index is None:
        raise BenchmarkError(f"{registry}: channel {channel!r} has no index for {arch}; build it with --arch {arch}")
    return index


def private_copy(registry: Path, target: Path) -> Path:
    """Copy a registry file, what stands in its -wal included, to `target`, which only this user can write.

    The runtime believes a file only in a folder that nobody else can write: let `target` be in one of your own.
    """
    source, copy = sqlite3.connect(f"file:{registry.resolve()}?mode=ro", uri=True), sqlite3.connect(target)
    try:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, readable from a folder that cannot be written too
    finally:
        source.close()
        copy.close()
    target.chmod(0o600)
    return target


def one_variant_each(registry: Path, target: Path, arch: str) -> dict[str, Artifact]:
    """Copy `registry` to `target` with a channel more per variant of its index, named by the variant's key.

    Such a channel's index holds that one artifact, with one dispatch row that serves every call of its op; and all of
    the ops that a call launches beside it (registry.ops.together), as in the registry. Returns the artifacts by key.
    """
    index = read_index(registry, arch)
    copy = sqlite3.connect(private_copy(registry, target))
    try:
        for artifact in index.artifacts:
            only = only_one(index, artifact)
            add_channel(copy, artifact.variant, only)
        copy.commit()
    finally:
        copy.close()
    return dict(index.by_variant)


def only_one(index: Index, artifact: Artifact) -> Index:
    """An index in which `artifact` serves every call of its op; the ops launched beside it stay as in `index`."""
    op = Variant.parse(artifact.variant).op
    beside = ops.together(op) - {op}
    rows = (DispatchRow(op, (), artifact.variant), *(row for row in index.rows if row.op in beside))
    artifacts = (artifact, *(a for a in index.artifacts if Variant.parse(a.variant).op in beside))
    return Index(index.arch, index.release, artifacts, rows, index.abis)


def add_channel(database: sqlite3.Connection, name: str, index: Index) -> None:
    """Store an index in a registry file of one's own and point a channel at it."""
    rows = [(digest, index.arch if digest == index.digest else "", body) for digest, body in index.documents.items()]
    database.executemany("INSERT OR IGNORE INTO indexes (digest, arch, body) VALUES (?, ?, ?)", rows)
    place = (name, index.arch, index.digest)
    database.execute("INSERT OR REPLACE INTO channels (name, arch, digest) VALUES (?, ?, ?)", place)
