"""Taking in a release from a file or a mirror's folder that anybody may have written.

Nothing of it is stored unless signatures under a given root, or a given digest, lead to it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import urllib.parse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from registry.contract import ContractError, Index, check_digest, sha256_hex
from registry.errors import ReleaseError, StoreError
from registry.store import Store, check_frame
from registry.untrusted import HAS_TUF, connect, read_file

if TYPE_CHECKING:
    from registry.releases.client import Known

MAX_INDEX = 64 << 20  # bytes
MAX_ROOT = 512_000
BATCH = 64  # frames of one transaction
BUSY_S, FILE_S = 10.0, 600.0  # of waiting for a bundle's writer, of all questions to it together


class Bundle(Protocol):
    """Where a release is taken from. Each gives None for what is not there, StoreError for more than `cap` bytes."""

    def tuf(self, path: str, cap: int) -> bytes | None: ...
    def index(self, digest: str) -> bytes | None: ...
    def frame(self, digest: str, cap: int) -> bytes | None: ...


@dataclass
class Imported:
    """What an import did. indexes: {digest: architecture}. channels: {name: {arch: digest}} as they point now.

    blobs: how many were stored, of those not there before. tuf: how many files of metadata.
    """

    indexes: dict[str, str]
    channels: dict[str, dict[str, str]]
    blobs: int = 0
    tuf: int = 0


def by_signatures(store: Store, bundle: Bundle, root: bytes, channels: Collection[str] = ()) -> Imported:
    """Take in what the signed channels of a bundle name, its metadata, and point the same channels of `store` there.

    root: the trusted root metadata. channels: only these; all that are signed by default. Signatures, hashes and the
    targets' expiry must hold, and no version may be lower than the store has; a bundle claims no freshness.
    Raises ReleaseError, StoreError, ContractError; what was stored till then is whole and named by no channel.
    """
    from registry.releases.client import Client, Known, check_root  # here: it imports tuf

    first = check_root(root).version
    before, files = store.tuf("timestamp.json"), {f"{first}.root.json": root}

    def fetch(path: str, cap: int) -> bytes | None:
        data = bundle.tuf(path, cap)
        if data is not None:
            files[path] = data
        return data

    known = Known() if before is None else _known(store, root)
    with Client(fetch, root, known, fresh=False) as client:
        client.refresh()
        names = sorted(channels) if channels else client.channels()
        named = {name: client.channel(name).indexes for name in names}
        files["timestamp.json"] = client.known.timestamp or b""
    done = _take(store, bundle, {digest for indexes in named.values() for digest in indexes.values()})
    for name, indexes in named.items():
        if wrong := [arch for arch, digest in indexes.items() if done.indexes[digest] != arch]:
            message = f"channel {name}: the index that it names for {wrong[0]} is for another architecture"
            raise ReleaseError(message, reason="metadata")
    store.put_tuf(files, expected={"timestamp.json": before})
    done.tuf, done.channels = len(files), named
    _point(store, named)
    return done


def by_digests(store: Store, bundle: Bundle, digests: Collection[str], channel: str | None = None) -> Imported:
    """Take in the indexes with these digests and what they name; point `channel`, if given, at them.

    No signed metadata is taken in. Raises StoreError, ContractError.
    """
    done = _take(store, bundle, {check_digest(digest) for digest in digests})
    if len(set(done.indexes.values())) < len(done.indexes):
        raise StoreError("index: several of the digests are for one architecture; give one each", reason="argument")
    if channel is not None:
        done.channels = {channel: {arch: digest for digest, arch in done.indexes.items()}}
        _point(store, done.channels)
    return done


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """A registry file or a mirror's folder. Raises StoreError ('missing', 'not_a_registry', 'newer')."""
    if path.is_dir():
        yield _Folder(path)
        return
    if not path.is_file():
        raise StoreError(f"{path}: no such file or folder", reason="missing")
    try:
        uri = f"file://{urllib.parse.quote(str(path.absolute()))}?mode=ro"
        with contextlib.closing(connect(uri, str(path), MAX_INDEX + (1 << 16), BUSY_S, FILE_S)) as db:
            yield _File(db, path)
    except sqlite3.Error as error:
        reason = "too_long" if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_TOOBIG else "not_a_registry"
        raise StoreError(f"{path}: cannot be read as a registry: {error}", reason=reason) from error


class _Folder:
    def __init__(self, path: Path):
        self._root = path / "v1"

    def tuf(self, path: str, cap: int) -> bytes | None:
        return read_file(self._root / "tuf" / path, cap)

    def index(self, digest: str) -> bytes | None:
        return read_file(self._root / "indexes" / "sha256" / digest, MAX_INDEX)

    def frame(self, digest: str, cap: int) -> bytes | None:
        return read_file(self._root / "blobs" / "sha256" / digest, cap)


class _File:
    def __init__(self, db: sqlite3.Connection, path: Path):
        self._db, self._path = db, path
        self._has_tuf = db.execute(HAS_TUF).fetchone() is not None

    def tuf(self, path: str, cap: int) -> bytes | None:
        return self._read("SELECT CAST(body AS BLOB) FROM tuf WHERE path = ?", path, cap) if self._has_tuf else None

    def index(self, digest: str) -> bytes | None:
        return self._read("SELECT CAST(body AS BLOB) FROM indexes WHERE digest = ?", digest, MAX_INDEX)

    def frame(self, digest: str, cap: int) -> bytes | None:
        return self._read("SELECT CAST(frame AS BLOB) FROM blobs WHERE sha256 = ?", digest, cap)

    def _read(self, query: str, key: str, cap: int) -> bytes | None:
        row = self._db.execute(query, (key,)).fetchone()
        if row is None or not isinstance(row[0], bytes):
            return None
        if len(row[0]) > cap:
            message = f"{self._path}: {key:.100} is longer than the {cap} bytes that it may have"
            raise StoreError(message, reason="too_long")
        return row[0]


def _known(store: Store, root: bytes) -> Known:
    """What the store's own metadata holds under this root: no version of a bundle may be lower."""
    from registry.releases.client import Client

    with Client(lambda path, cap: store.tuf(path), root, fresh=False) as client:
        try:
            client.refresh()
        except ReleaseError as error:
            if error.reason != "expired":
                message = f"{store.path}: its own release does not hold under this root: {error}"
                raise ReleaseError(message, reason=error.reason) from None
        return client.known


def _take(store: Store, bundle: Bundle, digests: Collection[str]) -> Imported:
    """Verify and store indexes and all that they name: blobs first, so that an index is never without them."""
    done = Imported({}, {})
    for digest in sorted(digests):
        body = bundle.index(digest)
        if body is None:
            raise StoreError(f"the bundle has no index {digest}", reason="not_found")
        if sha256_hex(body) != digest:
            raise StoreError(f"the bundle's index {digest} has another hash", reason="integrity")
        index = Index.from_bytes(body, partial(_part, bundle))
        if index.to_bytes() != body:
            raise ContractError(f"index {digest}: not in its canonical form")
        done.blobs += _take_blobs(store, bundle, index)
        store.put_index(index, None)
        done.indexes[digest] = index.arch
    return done


def _part(bundle: Bundle, digest: str) -> bytes:
    part = bundle.index(digest)
    if part is None:
        raise StoreError(f"the bundle has no part {digest} of an index", reason="not_found")
    if sha256_hex(part) != digest:
        raise StoreError(f"the bundle's part {digest} of an index has another hash", reason="integrity")
    return part


def _take_blobs(store: Store, bundle: Bundle, index: Index) -> int:
    there = store.blob_sizes()
    missing = {a.frame_sha256: a for a in index.artifacts if a.frame_sha256 not in there}
    waiting: list[bytes] = []
    for n, (digest, artifact) in enumerate(missing.items(), 1):
        frame = bundle.frame(digest, artifact.frame_size)
        if frame is None:
            raise StoreError(f"the bundle has no blob {digest} of {artifact.variant}", reason="not_found")
        check_frame(artifact, frame)
        waiting.append(frame)
        if len(waiting) == BATCH or n == len(missing):
            store.put_blobs(waiting)
            waiting.clear()
    return len(missing)


def _point(store: Store, channels: Mapping[str, Mapping[str, str]]) -> None:
    for name, indexes in channels.items():
        for digest in indexes.values():
            if (index := store.index(digest)) is not None:
                store.put_index(index, name)


def read_root(path: Path) -> bytes:
    """The root metadata in a file that the operator names. StoreError if it cannot be read."""
    data = read_file(path, MAX_ROOT)
    if data is None:
        raise StoreError(f"--root: {path}: no such file", reason="missing")
    return data
