"""The registry file: PTX, artifacts, blobs, indexes and channels in one SQLite database.

Several processes may read and write at once. Every write is one immediate transaction with synchronous=FULL: when a
call returns, its rows and blobs are on disk together; when it raises or the process dies, none of them is.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from sqlite_utils.db import Database

from registry.connection import Connection, sqlite3
from registry.contract import (
    CHANNEL,
    MAX_CONTENT,
    SCHEMA,
    TUF_PATH,
    Artifact,
    Index,
    Variant,
    canonical_json,
    check_part,
    sha256_hex,
)
from registry.errors import ConflictError, StoreError
from registry.frames import compress, declared_size, decompress
from registry.schema import APPLICATION_ID, MIGRATIONS
from registry.verify import problems

PART = ""  # in place of an architecture: the row of `indexes` holds a part

__all__ = [
    "APPLICATION_ID",
    "CHANNEL",
    "MIGRATIONS",
    "SCHEMA",
    "ConflictError",
    "Move",
    "Store",
    "StoreError",
    "StoredPtx",
    "check_channel",
    "check_frame",
    "compress",
    "decompress",
    "default_path",
]


@dataclass(frozen=True)
class StoredPtx:
    """A variant's PTX text and what the builder noted beside it (symbol, threads, smem, grid)."""

    variant: str
    ptx: str
    ptx_sha256: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Move:
    """A channel was pointed at an index. moved: Unix seconds."""

    arch: str
    digest: str
    moved: float


def default_path() -> Path:
    """CUBINERY_REGISTRY if it names a file (no URL, no folder), else registry.db in the user's data folder."""
    named = os.environ.get("CUBINERY_REGISTRY", "")
    if named and "://" not in named and not named.endswith("/") and not os.path.isdir(named):
        return Path(named)
    try:
        folder = Path(platformdirs.user_data_dir("cubinery"))
    except RuntimeError:  # of newer releases; older ones leave the '~'
        folder = Path("~")
    if not folder.is_absolute():  # HOME is not set, and no passwd entry says where it is
        message = "no registry file is named, and this user has no home folder: name one with --registry or by "
        message += "CUBINERY_REGISTRY"
        raise StoreError(message, reason="argument")
    return folder / "registry.db"


def check_channel(name: object) -> str:
    """`name` if it may name a channel, else StoreError ('argument')."""
    if not isinstance(name, str) or not re.fullmatch(CHANNEL, name):
        message = f"channel: {name!r:.100} is not 1 to 64 of a-z 0-9 . _ - that start with a letter or digit"
        raise StoreError(message, reason="argument")
    return name


class Store(Connection):
    """One connection to a registry file, for the thread and process that opened it; a context manager.

    path: the file; a writer creates it (mode 0644) and its missing folders (0755). readonly: never writes to it and
    needs it to exist; it sees every transaction that has ended. busy_timeout_s: how long a call waits its turn.

    Raises StoreError, here and in every method, whose `reason` names the cause. ContractError for values that do not
    follow the contract.
    """

    # -- PTX ----------------------------------------------------------------------------------------------------------

    def put_ptx(self, fingerprint: str, variant_key: str, ptx: str, facts: Mapping[str, Any]) -> str:
        """Store a variant's PTX; returns its SHA-256. Repeating a call is fine.

        Raises ConflictError when the fingerprint already holds another variant, text or facts.
        """
        Variant.parse(variant_key)
        content = ptx.encode()
        frame, ptx_sha256 = compress(content), sha256_hex(content)
        row = {
            "fingerprint": _fingerprint(fingerprint),
            "variant": variant_key,
            "ptx_sha256": ptx_sha256,
            "frame_sha256": sha256_hex(frame),
            "facts": canonical_json(facts).decode(),
        }
        with self._write() as db:
            stored = self._row("SELECT variant, ptx_sha256, facts FROM ptx WHERE fingerprint = ?", fingerprint)
            if stored is None:
                _insert_blob(db, frame, content)
                db.table("ptx").insert({**row, "added": time.time()})
            else:
                # Not the frame: another zstd version may write other bytes for the same text.
                names = ("variant", "ptx_sha256", "facts")
                _refuse_change("PTX", fingerprint, dict(zip(names, stored, strict=True)), {n: row[n] for n in names})
                db.execute("UPDATE ptx SET added = ? WHERE fingerprint = ?", [time.time(), fingerprint])
        return ptx_sha256

    def get_ptx(self, fingerprint: str) -> StoredPtx | None:
        """The PTX stored under a fingerprint, or None."""
        row = self._row(
            "SELECT variant, frame, size, ptx_sha256, facts FROM ptx JOIN blobs ON sha256 = frame_sha256 "
            "WHERE fingerprint = ?",
            fingerprint,
        )
        if row is None:
            return None
        variant, frame, size, ptx_sha256, facts = row
        return StoredPtx(variant, self._content(frame, size, ptx_sha256).decode(), ptx_sha256, json.loads(facts))

    def ptx_text(self, ptx_sha256: str) -> str:
        """The PTX with this SHA-256. Raises StoreError ('not_found')."""
        row = self._row(
            "SELECT frame, size FROM ptx JOIN blobs ON sha256 = frame_sha256 WHERE ptx_sha256 = ? LIMIT 1", ptx_sha256
        )
        if row is None:
            raise StoreError(f"{self.path}: no PTX with SHA-256 {ptx_sha256!r:.100}", reason="not_found")
        return self._content(row[0], row[1], ptx_sha256).decode()

    # -- artifacts and blobs ------------------------------------------------------------------------------------------

    def put_artifact(self, fingerprint: str, artifact: Artifact, frame: bytes) -> None:
        """Store an artifact with its cubin's frame, both or neither. Repeating a call is fine.

        Raises StoreError ('integrity') unless `frame` is what the artifact says, ConflictError when the fingerprint
        already holds another artifact.
        """
        row = {
            "fingerprint": _fingerprint(fingerprint),
            "variant": artifact.variant,
            "arch": artifact.arch,
            "json": canonical_json(Artifact.from_json(artifact.to_json()).to_json()).decode(),
        }
        content = check_frame(artifact, frame)
        with self._write() as db:
            stored = self._row("SELECT json FROM artifacts WHERE fingerprint = ?", fingerprint)
            if stored is None:
                _insert_blob(db, frame, content)
                db.table("artifacts").insert({**row, "added": time.time()})
            else:
                _refuse_change("artifact", fingerprint, json.loads(stored[0]), json.loads(row["json"]))
                db.execute("UPDATE artifacts SET added = ? WHERE fingerprint = ?", [time.time(), fingerprint])

    def get_artifact(self, fingerprint: str) -> Artifact | None:
        """The artifact stored under a fingerprint, or None."""
        row = self._row("SELECT json FROM artifacts WHERE fingerprint = ?", fingerprint)
        return None if row is None else self._artifact(fingerprint, row[0])

    def artifacts(self) -> dict[str, Artifact]:
        """Every artifact by fingerprint, in order of variant and architecture."""
        rows = self._rows("SELECT fingerprint, json FROM artifacts ORDER BY variant, arch, fingerprint")
        return {fingerprint: self._artifact(fingerprint, text) for fingerprint, text in rows}

    def put_blobs(self, frames: Iterable[bytes]) -> list[str]:
        """Store zstd frames that no artifact names yet, in one transaction; returns their SHA-256. Repeating is fine.

        Raises StoreError ('integrity') for what is not one whole frame of at most MAX_CONTENT bytes, and then stores
        none of them.
        """
        checked = [(frame, _content_of(frame)) for frame in frames]
        with self._write() as db:
            for frame, content in checked:
                _insert_blob(db, frame, content)
        return [sha256_hex(frame) for frame, _ in checked]

    def set_wanted(self, arch: str, fingerprints: Collection[str]) -> None:
        """Note which PTX and artifacts the builder's sources stand for now, for an architecture: gc keeps those."""
        wanted = {_fingerprint(fingerprint) for fingerprint in fingerprints}
        with self._write() as db:
            db.execute("DELETE FROM wanted WHERE arch = ?", [arch])
            db.table("wanted").insert_all({"arch": arch, "fingerprint": f} for f in sorted(wanted))

    def get_frame(self, frame_sha256: str) -> bytes | None:
        """The zstd frame with this SHA-256, or None. Not hashed again: whoever uses it does that."""
        row = self._row("SELECT frame FROM blobs WHERE sha256 = ?", frame_sha256)
        return None if row is None else row[0]

    # -- indexes and channels -----------------------------------------------------------------------------------------

    def put_index(self, index: Index, channel: str | None) -> str:
        """Store an index and, if `channel` is given, point that name at it for its architecture; returns its digest.

        Raises StoreError ('not_found') when a blob that it names is absent: checked in the same transaction.
        """
        Index.from_bytes(index.to_bytes(), index.documents.get)  # what no client can read is never stored
        if channel is not None:
            check_channel(channel)
        with self._write() as db:
            self._require_blobs(index)
            for digest, body in index.documents.items():
                _insert_document(db, digest, index.arch if digest == index.digest else PART, body)
            if channel is not None:
                _point(db, channel, index.arch, index.digest)
        return index.digest

    def put_part(self, body: bytes) -> str:
        """Store a part of an index that is yet to come; returns its digest. Raises ContractError for anything else."""
        check_part(body)
        digest = sha256_hex(body)
        with self._write() as db:
            _insert_document(db, digest, PART, body)
        return digest

    def get_index(self, digest: str) -> bytes | None:
        """The bytes of an index's document, or of a part, as they were hashed; or None."""
        row = self._row("SELECT body FROM indexes WHERE digest = ?", digest)
        return None if row is None else row[0]

    def index(self, digest: str) -> Index | None:
        """An index with all its parts, or None. Raises what `read_index` does."""
        body = self.get_index(digest)
        return None if body is None else self.read_index(body)

    def read_index(self, body: bytes) -> Index:
        """The index with this document, whose parts are in the store. Raises ContractError, IntegrityError, and
        StoreError ('not_found') where a part is not."""

        def read(digest: str) -> bytes:
            part = self.get_index(digest)
            if part is None:
                raise StoreError(f"{self.path}: no part {digest} of an index; put it first", reason="not_found")
            return part

        return Index.from_bytes(body, read)

    def indexes(self) -> dict[str, str]:
        """Every index: digest -> architecture."""
        return dict(self._rows("SELECT digest, arch FROM indexes WHERE arch <> ? ORDER BY arch, digest", PART))

    def parts(self) -> set[str]:
        """The digest of every part of an index."""
        return {digest for (digest,) in self._rows("SELECT digest FROM indexes WHERE arch = ?", PART)}

    def channel(self, name: str) -> dict[str, str]:
        """One channel: architecture -> index digest. Empty when there is no such channel."""
        return dict(self._rows("SELECT arch, digest FROM channels WHERE name = ? ORDER BY arch", name))

    def channels(self) -> dict[str, dict[str, str]]:
        """Every channel: name -> architecture -> index digest."""
        found: dict[str, dict[str, str]] = {}
        for name, arch, digest in self._rows("SELECT name, arch, digest FROM channels ORDER BY name, arch"):
            found.setdefault(name, {})[arch] = digest
        return found

    def history(self, name: str) -> list[Move]:
        """Where a channel has pointed, newest first. Empty for a file of schema 1."""
        if not self._has("history"):
            return []
        rows = self._rows("SELECT arch, digest, moved FROM history WHERE name = ? ORDER BY id DESC", name)
        return [Move(*row) for row in rows]

    # -- TUF's files --------------------------------------------------------------------------------------------------

    def put_tuf(self, files: Mapping[str, bytes], *, expected: Mapping[str, bytes | None] | None = None) -> None:
        """Write files below v1/tuf/, all of them or none. Which may replace which is the caller's to know.

        expected: path -> the body that must be stored before (None: no such file); checked in the same transaction.
        Raises ConflictError if another is, StoreError ('argument') for a path that is no name or targets/name.
        """
        for path in files:
            if not re.fullmatch(TUF_PATH, path):
                raise StoreError(f"path: {path!r:.100} is neither NAME nor targets/NAME", reason="argument")
        with self._write() as db:
            for path, body in (expected or {}).items():
                if self.tuf(path) != body:
                    raise ConflictError(f"{self.path}: {path} was changed by somebody else meanwhile")
            rows = [{"path": path, "body": body} for path, body in files.items()]
            db.table("tuf").insert_all(rows, replace=True)

    def tuf(self, path: str) -> bytes | None:
        """A file below v1/tuf/, or None."""
        row = self._row("SELECT body FROM tuf WHERE path = ?", path) if self._has("tuf") else None
        return None if row is None else row[0]

    def tuf_paths(self) -> list[str]:
        """The paths of all files below v1/tuf/, sorted."""
        return [path for (path,) in self._rows("SELECT path FROM tuf ORDER BY path")] if self._has("tuf") else []

    # -- all of it ----------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Rows of each table, and 'bytes' of all frames together."""
        tables = ("blobs", "ptx", "artifacts", "indexes", "channels")
        columns = [f"(SELECT count(*) FROM {name})" for name in tables]
        columns[tables.index("indexes")] = f"(SELECT count(*) FROM indexes WHERE arch <> '{PART}')"
        row = self._row(f"SELECT {', '.join(columns)}, (SELECT coalesce(sum(length(frame)), 0) FROM blobs)")
        return dict(zip((*tables, "bytes"), row or (), strict=True))

    def ages(self, table: str) -> dict[str, float]:
        """When each row of 'artifacts', 'ptx' or 'indexes' was put last: primary key -> Unix seconds."""
        key = {"artifacts": "fingerprint", "ptx": "fingerprint", "indexes": "digest"}[table]
        return dict(self._rows(f"SELECT {key}, added FROM {table}"))

    def wanted(self) -> set[str]:
        """The fingerprints that `set_wanted` noted, of all architectures."""
        return {fingerprint for (fingerprint,) in self._rows("SELECT fingerprint FROM wanted")}

    def ptx_rows(self) -> list[tuple[str, str, str]]:
        """(fingerprint, SHA-256 of the text, SHA-256 of its frame) of every PTX."""
        return self._rows("SELECT fingerprint, ptx_sha256, frame_sha256 FROM ptx")

    def unnamed_blobs(self, named: Collection[str], since: float) -> dict[str, int]:
        """Blobs not in `named` that were put before `since` (Unix seconds): SHA-256 -> bytes of the frame."""
        found = {}
        for (sha256,) in self._rows("SELECT sha256 FROM blobs"):
            if sha256 not in named:
                # One by one: `added` stands behind the frame, and of most blobs neither is read.
                size, added = self._row("SELECT length(frame), added FROM blobs WHERE sha256 = ?", sha256)
                if added < since:
                    found[sha256] = size
        return found

    def blob_sizes(self) -> dict[str, int]:
        """Every blob: SHA-256 -> bytes of the frame."""
        return dict(self._rows("SELECT sha256, length(frame) FROM blobs"))

    def copy_into(self, other: Any, frames: Iterable[str], indexes: Iterable[str]) -> None:
        """Insert these blobs and indexes into the registry of another connection, one row in memory at a time."""
        for table, key, columns, keys in (
            ("blobs", "sha256", "sha256, frame, size, content_sha256", frames),
            ("indexes", "digest", "digest, arch, body", indexes),
        ):
            places = ", ".join("?" for _ in columns.split(","))
            rows = (self._row(f"SELECT {columns} FROM {table} WHERE {key} = ?", value) for value in keys)
            other.executemany(f"INSERT INTO {table} ({columns}) VALUES ({places})", rows)

    def vacuum_into(self, path: Path) -> None:
        """Write everything to a new file, compact and not in WAL mode; not synced."""
        with self._translated():
            self._db.execute("VACUUM INTO ?", [str(path)])

    def verify(self) -> list[str]:
        """Hash and cross-check everything that the file holds; one line a problem, empty when it is sound."""
        found: list[str] = []
        with self.snapshot():
            try:
                found.extend(problems(self._db.conn))
            except sqlite3.Error as error:  # pages too damaged to read on
                found.append(f"sqlite: {error}; the rest was not checked")
        return found

    def _artifact(self, fingerprint: str, text: str) -> Artifact:
        try:
            return Artifact.from_json(json.loads(text))
        except ValueError as error:
            raise StoreError(f"{self.path}: artifact {fingerprint}: {error}", reason="corrupt") from None

    def _content(self, frame: bytes, size: int, sha256: str) -> bytes:
        content = decompress(frame, size)
        if sha256_hex(content) != sha256:
            raise StoreError(f"{self.path}: the blob of {sha256} holds other content", reason="integrity")
        return content

    def _require_blobs(self, index: Index) -> None:
        sql = "SELECT length(frame), size, content_sha256 FROM blobs WHERE sha256 = ?"
        for a in index.artifacts:
            if self._row(sql, a.frame_sha256) != (a.frame_size, a.cubin_size, a.cubin_sha256):
                message = f"{self.path}: no blob {a.frame_sha256} as the index states it for {a.variant}; put it first"
                raise StoreError(message, reason="not_found")


def _fingerprint(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,200}", value):
        raise StoreError(f"fingerprint: {value!r:.100} is not 1 to 200 printable characters", reason="argument")
    return value


def _insert_blob(db: Database, frame: bytes, content: bytes) -> None:
    """Or, if it is there, make it as young as a new one: whoever put it relies on gc's leaving it for a day."""
    db.execute(
        "INSERT INTO blobs (sha256, frame, size, content_sha256, added) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (sha256) DO UPDATE SET added = excluded.added",
        [sha256_hex(frame), frame, len(content), sha256_hex(content), time.time()],
    )


def _insert_document(db: Database, digest: str, arch: str, body: bytes) -> None:
    db.execute(
        "INSERT INTO indexes (digest, arch, body, added) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET added = excluded.added",
        [digest, arch, body, time.time()],
    )


def _content_of(frame: bytes) -> bytes:
    size = declared_size(frame)
    if size > MAX_CONTENT:
        raise StoreError(f"a frame of {size} bytes of content; at most {MAX_CONTENT} are stored", reason="integrity")
    return decompress(frame, size)


def _point(db: Database, channel: str, arch: str, digest: str) -> None:
    """Point a channel at an index, and remember where it points from now on."""
    row = {"name": channel, "arch": arch, "digest": digest}
    if list(db.table("channels").rows_where("name = :name AND arch = :arch AND digest = :digest", row)):
        return
    db.table("channels").insert(row, replace=True)
    db.table("history").insert({**row, "moved": time.time()})


def check_frame(artifact: Artifact, frame: bytes) -> bytes:
    """The cubin in `frame`. StoreError ('integrity') unless both are what the artifact says."""
    if (len(frame), sha256_hex(frame)) != (artifact.frame_size, artifact.frame_sha256):
        raise StoreError(
            f"{artifact.variant}: the frame is not the artifact's {artifact.frame_sha256}", reason="integrity"
        )
    content = decompress(frame, artifact.cubin_size)
    if sha256_hex(content) != artifact.cubin_sha256:
        raise StoreError(
            f"{artifact.variant}: the frame does not hold cubin {artifact.cubin_sha256}", reason="integrity"
        )
    return content


def _refuse_change(what: str, fingerprint: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    changed = [name for name in sorted(given) if stored.get(name) != given[name]]
    if changed:
        name = changed[0]
        raise ConflictError(
            f"{what} {fingerprint} is already stored with another {', '.join(changed)} "
            f"({name}: {stored.get(name)!r:.100}, refused {given[name]!r:.100})"
        )
