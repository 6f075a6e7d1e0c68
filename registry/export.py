"""Copies of a registry: a release as one file or as a mirror's folder, and a backup of everything.

Each reads the registry as it was at one moment, while builders and gc go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlite_utils.db import Database

from registry.connection import sqlite3
from registry.contract import canonical_json
from registry.errors import StoreError
from registry.files import replaced, sync, translated, write
from registry.gc import frames_of, signed_channels
from registry.schema import MIGRATIONS, PAGE_SIZE
from registry.store import Store

# Each after what it names, and root just before timestamp: a root may replace the key that signs the other.
TUF_ORDER = ("targets/", ".targets.json", ".snapshot.json", ".root.json", "timestamp.json")


@dataclass(frozen=True)
class Release:
    """What clients may ask for: index digests, those of their parts, the frames that they name,
    {channel: {arch: digest}}, TUF's paths."""

    indexes: tuple[str, ...]
    parts: tuple[str, ...]
    frames: tuple[str, ...]
    channels: dict[str, dict[str, str]]
    tuf: tuple[str, ...]


@dataclass
class Written:
    """What an export did. bytes: of all that it wrote. unchanged: files that were there already."""

    indexes: int
    blobs: int
    tuf: int
    channels: int
    files: int = 0
    unchanged: int = 0
    bytes: int = 0


def select(store: Store, channels: Collection[str] = (), archs: Collection[str] = ()) -> Release:
    """What to export. channels: only the indexes that they name now; archs: only those. All there are by default.

    Call it within `store.snapshot()`. Raises StoreError ('not_found') for a channel that is not there.
    """
    named, signed = store.channels(), signed_channels(store)
    if missing := [name for name in channels if name not in named and name not in signed]:
        there = ", ".join(sorted(named.keys() | signed.keys())) or "none"
        raise StoreError(f"channel: no {missing[0]!r} in {store.path} (there are: {there})", reason="not_found")
    wanted = {digest for name in channels for digest in named.get(name, {}).values()}
    wanted |= {digest for name in channels if name in signed for digest in signed[name][0].values()}
    indexes = tuple(digest for digest, arch in store.indexes().items()
                    if (not archs or arch in archs) and (not channels or digest in wanted))  # fmt: skip
    frames: set[str] = set()
    for digest in indexes:
        frames |= frames_of(store, digest)
    pointers = {name: {arch: digest for arch, digest in found.items() if digest in indexes}
                for name, found in named.items() if not channels or name in channels}  # fmt: skip
    return Release(
        indexes,
        tuple(sorted(frames & store.parts())),
        tuple(sorted(frames & store.blob_sizes().keys())),
        {name: found for name, found in pointers.items() if found},
        tuple(sorted(store.tuf_paths(), key=_tuf_rank)),
    )


def _tuf_rank(path: str) -> tuple[int, str]:
    return next((n for n, part in enumerate(TUF_ORDER) if path.startswith(part) or path.endswith(part)), -1), path


def to_folder(store: Store, folder: Path, channels: Collection[str] = (), archs: Collection[str] = ()) -> Written:
    """Bring a mirror's folder up to date with the registry; the paths are a server's.

    Each file is written whole and only if it is not there yet, what it names before it. Nothing is removed. Another
    export to the same folder waits.
    """
    root = folder / "v1"
    with translated(folder), _locked(root) as temporary, store.snapshot():
        release = select(store, channels, archs)
        done = _written(release)
        sizes = store.blob_sizes()
        stage = _Stage(done, temporary)
        stage.immutable(root / "blobs" / "sha256", {name: sizes[name] for name in release.frames}, store.get_frame)
        for digests in (release.parts, release.indexes):
            bodies = {digest: store.get_index(digest) or b"" for digest in digests}
            stage.immutable(root / "indexes" / "sha256", {d: len(body) for d, body in bodies.items()}, bodies.get)
        stage.mutable(root / "tuf", ((path, store.tuf(path) or b"") for path in release.tuf))
        named = release.channels.items()
        stage.mutable(root / "channels", ((n, canonical_json({"name": n, "indexes": indexes})) for n, indexes in named))
    return done


class _Stage:
    """Files of one kind, which are on disk, name and all, before the next kind begins."""

    def __init__(self, done: Written, temporary: Path):
        self._done, self._temporary = done, temporary

    def immutable(self, folder: Path, sizes: dict[str, int], read: Callable[[str], bytes | None]) -> None:
        """{name: bytes}: a file that is there with its size is the same, for files appear whole."""
        folder.mkdir(parents=True, exist_ok=True)
        there = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        for name, size in sizes.items():
            self._put(folder / name, None if there.get(name) == size else read(name) or b"")
        sync(folder)

    def mutable(self, folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
        """(path below `folder`, bytes): written if it holds others."""
        folder.mkdir(parents=True, exist_ok=True)
        previous = folder
        for path, data in files:
            target = folder / path
            if target.parent != previous:
                sync(previous)
                target.parent.mkdir(exist_ok=True)
                previous = target.parent
            same = target.is_file() and target.read_bytes() == data
            self._put(target, None if same else data)
        sync(previous)

    def _put(self, path: Path, data: bytes | None) -> None:
        if data is None:
            self._done.unchanged += 1
            return
        write(path, data, self._temporary)
        self._done.files += 1
        self._done.bytes += len(data)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[Path]:
    """A temporary folder in a mirror that nobody else writes meanwhile, emptied of what a killed export left."""
    temporary = root / ".partial"
    temporary.mkdir(parents=True, exist_ok=True)
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for entry in os.scandir(temporary):
            os.unlink(entry.path)
        yield temporary
    finally:
        os.close(fd)


def to_file(store: Store, path: Path, channels: Collection[str] = (), archs: Collection[str] = ()) -> Written:
    """Write a release as one registry file, without PTX and not in WAL mode: it can be read where nothing can be
    written, copied into an image, and imported elsewhere. It takes the place of `path` when it is whole."""
    _refuse_own(store, path)
    with replaced(path) as temporary, store.snapshot():
        release = select(store, channels, archs)
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            db = Database(connection, execute_plugins=False)
            db.execute(f"PRAGMA page_size = {PAGE_SIZE}")
            db.execute("PRAGMA journal_mode = MEMORY")  # a file that is not finished is thrown away
            db.execute("PRAGMA synchronous = OFF")  # and a finished one is synced as a whole
            db.execute("BEGIN IMMEDIATE")
            MIGRATIONS.apply(db)
            store.copy_into(connection, release.frames, (*release.parts, *release.indexes))
            rows = [(n, arch, digest) for n, found in release.channels.items() for arch, digest in found.items()]
            connection.executemany("INSERT INTO channels (name, arch, digest) VALUES (?, ?, ?)", rows)
            metadata = ((p, store.tuf(p)) for p in release.tuf)
            connection.executemany("INSERT INTO tuf (path, body) VALUES (?, ?)", metadata)
            db.execute("COMMIT")
        done = _written(release)
        done.files, done.bytes = 1, temporary.stat().st_size
    return done


def backup(store: Store, path: Path) -> int:
    """Write a compact copy of everything, verified, not in WAL mode; returns its bytes. It takes the place of `path`
    when it is whole. Raises StoreError ('corrupt') if the copy, and so the registry, is not sound."""
    _refuse_own(store, path)
    with replaced(path) as temporary:
        store.vacuum_into(temporary)
        with Store(temporary, readonly=True) as copy:
            if problems := copy.verify():
                message = f"{store.path}: {problems[0]} ({len(problems)} problems): {path} was left as it is"
                raise StoreError(message, reason="corrupt")
        return temporary.stat().st_size


def _refuse_own(store: Store, path: Path) -> None:
    if path.exists() and path.samefile(store.path):
        raise StoreError(f"{path}: is the registry itself; name another file", reason="argument")
    if path.is_dir():
        raise StoreError(f"{path}: is a folder; name a file", reason="argument")
    for suffix in ("-wal", "-journal"):
        if Path(f"{path}{suffix}").exists():
            raise StoreError(f"{path}{suffix} exists: {path} is in use; name another file", reason="busy")


def _written(release: Release) -> Written:
    return Written(len(release.indexes), len(release.frames), len(release.tuf), len(release.channels))
