"""The registry file: PTX, artifacts, blobs, indexes and channels in one SQLite database.

Several processes may read and write at once. Every write is one immediate transaction with synchronous=FULL: when a
call returns, its rows and blobs are on disk together; when it raises or the process dies, none of them is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from sqlite_utils.db import Database
from sqlite_utils.migrations import Migrations

# pysqlite3 where it is installed: its SQLite has no WAL-reset bug.
from sqlite_utils.utils import sqlite3  # type: ignore[attr-defined]

from registry.contract import SCHEMA, Artifact, Index, Variant, canonical_json, sha256_hex
from registry.errors import ConflictError, StoreError
from registry.frames import compress, decompress
from registry.verify import problems

__all__ = [
    "APPLICATION_ID",
    "CHANNEL",
    "SCHEMA",
    "ConflictError",
    "Store",
    "StoreError",
    "StoredPtx",
    "check_channel",
    "compress",
    "decompress",
    "default_path",
]

APPLICATION_ID = 0x43554249  # 'CUBI' in the file's header: whose database this is
PAGE_SIZE = 8192
CHANNEL = "[a-z0-9][a-z0-9._-]{0,63}"  # what a channel's name looks like, whole

MIGRATIONS = Migrations("cubinery")


@MIGRATIONS()
def m001_tables(db: Database) -> None:
    """All tables. Not STRICT: the runtime reads them with whatever SQLite its Python has, and 3.34 has no STRICT."""
    tables: dict[str, tuple[dict[str, type], str | tuple[str, ...], list[tuple[str, str, str]]]] = {
        "blobs": ({"sha256": str, "frame": bytes, "size": int, "content_sha256": str}, "sha256", []),
        "ptx": (
            {"fingerprint": str, "variant": str, "ptx_sha256": str, "frame_sha256": str, "facts": str},
            "fingerprint",
            [("frame_sha256", "blobs", "sha256")],
        ),
        "artifacts": ({"fingerprint": str, "variant": str, "arch": str, "json": str}, "fingerprint", []),
        "indexes": ({"digest": str, "arch": str, "body": bytes}, "digest", []),
        "channels": ({"name": str, "arch": str, "digest": str}, ("name", "arch"), [("digest", "indexes", "digest")]),
    }
    for name, (columns, key, references) in tables.items():
        db.table(name).create(columns, pk=key, not_null=columns, foreign_keys=references)
    db.table("ptx").create_index(["ptx_sha256"])
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("PRAGMA user_version = 1")


@dataclass(frozen=True)
class StoredPtx:
    """A variant's PTX text and what the builder noted beside it (symbol, threads, smem, grid)."""

    variant: str
    ptx: str
    ptx_sha256: str
    facts: dict[str, Any]


def default_path() -> Path:
    """CUBINERY_REGISTRY if it names a file (no URL, no folder), else registry.db in the user's data folder."""
    named = os.environ.get("CUBINERY_REGISTRY", "")
    if named and "://" not in named and not os.path.isdir(named):
        return Path(named)
    return Path(platformdirs.user_data_dir("cubinery")) / "registry.db"


def check_channel(name: object) -> str:
    """`name` if it may name a channel, else StoreError ('argument')."""
    if not isinstance(name, str) or not re.fullmatch(CHANNEL, name):
        message = f"channel: {name!r:.100} is not 1 to 64 of a-z 0-9 . _ - that start with a letter or digit"
        raise StoreError(message, reason="argument")
    return name


class Store:
    """One connection to a registry file, for the thread and process that opened it; a context manager.

    path: the file; a writer creates it (mode 0644) and its missing folders (0755). readonly: never writes to it and
    needs it to exist; it sees every transaction that has ended. busy_timeout_s: how long a call waits its turn.

    Raises StoreError, here and in every method, whose `reason` names the cause. ContractError for values that do not
    follow the contract.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False, busy_timeout_s: float = 30.0):
        self.path = Path(path).absolute()
        self.readonly = readonly
        self._busy_timeout_s = busy_timeout_s
        with self._translated():
            if self.path.is_dir():
                raise StoreError(f"{self.path}: a folder; name the registry file", reason="not_a_registry")
            if readonly:
                self.path.stat()  # SQLite says of every reason only 'unable to open database file'
            else:
                _create(self.path)
            self._db = Database(self._connect(), execute_plugins=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. The last writer to leave folds the -wal file into the registry."""
        self._db.close()

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
                db.table("ptx").insert(row)
            else:
                # Not the frame: another zstd version may write other bytes for the same text.
                names = ("variant", "ptx_sha256", "facts")
                _refuse_change("PTX", fingerprint, dict(zip(names, stored, strict=True)), {n: row[n] for n in names})
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
        content = _check_frame(artifact, frame)
        with self._write() as db:
            stored = self._row("SELECT json FROM artifacts WHERE fingerprint = ?", fingerprint)
            if stored is None:
                _insert_blob(db, frame, content)
                db.table("artifacts").insert(row)
            else:
                _refuse_change("artifact", fingerprint, json.loads(stored[0]), json.loads(row["json"]))

    def get_artifact(self, fingerprint: str) -> Artifact | None:
        """The artifact stored under a fingerprint, or None."""
        row = self._row("SELECT json FROM artifacts WHERE fingerprint = ?", fingerprint)
        return None if row is None else self._artifact(fingerprint, row[0])

    def artifacts(self) -> dict[str, Artifact]:
        """Every artifact by fingerprint, in order of variant and architecture."""
        rows = self._rows("SELECT fingerprint, json FROM artifacts ORDER BY variant, arch, fingerprint")
        return {fingerprint: self._artifact(fingerprint, text) for fingerprint, text in rows}

    def get_frame(self, frame_sha256: str) -> bytes | None:
        """The zstd frame with this SHA-256, or None. Not hashed again: whoever uses it does that."""
        row = self._row("SELECT frame FROM blobs WHERE sha256 = ?", frame_sha256)
        return None if row is None else row[0]

    # -- indexes and channels -----------------------------------------------------------------------------------------

    def put_index(self, index: Index, channel: str | None) -> str:
        """Store an index and, if `channel` is given, point that name at it for its architecture; returns its digest.

        Raises StoreError ('not_found') when a blob that it names is absent: checked in the same transaction.
        """
        body = index.to_bytes()
        Index.from_bytes(body)  # what no client can read is never stored
        if channel is not None:
            check_channel(channel)
        digest = sha256_hex(body)
        with self._write() as db:
            self._require_blobs(index)
            db.table("indexes").insert({"digest": digest, "arch": index.arch, "body": body}, ignore=True)
            if channel is not None:
                db.table("channels").insert({"name": channel, "arch": index.arch, "digest": digest}, replace=True)
        return digest

    def get_index(self, digest: str) -> bytes | None:
        """An index's bytes as they were hashed, or None."""
        row = self._row("SELECT body FROM indexes WHERE digest = ?", digest)
        return None if row is None else row[0]

    def indexes(self) -> dict[str, str]:
        """Every index: digest -> architecture."""
        return dict(self._rows("SELECT digest, arch FROM indexes ORDER BY arch, digest"))

    def channel(self, name: str) -> dict[str, str]:
        """One channel: architecture -> index digest. Empty when there is no such channel."""
        return dict(self._rows("SELECT arch, digest FROM channels WHERE name = ? ORDER BY arch", name))

    def channels(self) -> dict[str, dict[str, str]]:
        """Every channel: name -> architecture -> index digest."""
        found: dict[str, dict[str, str]] = {}
        for name, arch, digest in self._rows("SELECT name, arch, digest FROM channels ORDER BY name, arch"):
            found.setdefault(name, {})[arch] = digest
        return found

    def counts(self) -> dict[str, int]:
        """Rows of each table, and 'bytes' of all frames together."""
        tables = ("blobs", "ptx", "artifacts", "indexes", "channels")
        columns = [f"(SELECT count(*) FROM {name})" for name in tables]
        row = self._row(f"SELECT {', '.join(columns)}, (SELECT coalesce(sum(length(frame)), 0) FROM blobs)")
        return dict(zip((*tables, "bytes"), row or (), strict=True))

    def verify(self) -> list[str]:
        """Hash and cross-check everything that the file holds; one line a problem, empty when it is sound."""
        found: list[str] = []
        with self._translated():
            self._db.execute("BEGIN")  # one snapshot, whatever others write meanwhile
        try:
            found.extend(problems(self._db.conn))
        except sqlite3.Error as error:  # pages too damaged to read on
            found.append(f"sqlite: {error}; the rest was not checked")
        finally:
            self._db.rollback()
        return found

    # -- the connection -----------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        mode = "ro" if self.readonly else "rw"
        # isolation_level None: transactions begin where _write says, never by themselves.
        return sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}", uri=True, timeout=self._busy_timeout_s, isolation_level=None
        )

    def _prepare(self) -> None:
        """Refuse a file that is not ours before changing anything, then set it up."""
        version = self._version()
        self._db.execute("PRAGMA foreign_keys = ON")
        if self.readonly:
            if version < SCHEMA:
                what = "has no tables yet" if version == 0 else f"has schema {version}, this code reads {SCHEMA}"
                message = f"{self.path}: the registry {what}; a writer (the builder) sets it up"
                raise StoreError(message, reason="older" if version else "empty")
            return
        self._db.execute(f"PRAGMA page_size = {PAGE_SIZE}")  # only a file without pages takes it
        self._enable_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        if version < SCHEMA:
            # Migrations.apply begins deferred transactions, of which most fail when several processes migrate at
            # once; inside this immediate one they are savepoints.
            with self._write() as db:
                MIGRATIONS.apply(db)

    def _version(self) -> int:
        """The file's schema version; 0 when it is empty. Raises StoreError for a file that is no registry."""
        row = self._row(
            "SELECT (SELECT application_id FROM pragma_application_id), "
            "(SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_master)"
        )
        application_id, version, tables = row or (0, 0, 0)
        if application_id != APPLICATION_ID and (application_id or version or tables):
            raise StoreError(f"{self.path}: an SQLite file of another program", reason="not_a_registry")
        if version > SCHEMA:
            message = f"{self.path}: has schema {version}, this code reads up to {SCHEMA}; update Cubinery"
            raise StoreError(message, reason="newer")
        return int(version)

    def _enable_wal(self) -> None:
        """Switch to WAL. The switch does not wait for others as other statements do, so it is tried again here."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                row = self._db.execute("PRAGMA journal_mode = WAL").fetchall()
                if row == [("wal",)]:
                    return
                if time.monotonic() > deadline:
                    raise StoreError(f"{self.path}: no WAL here (a network file system?)", reason="store")
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    @contextlib.contextmanager
    def _write(self) -> Iterator[Database]:
        """One transaction that waits its turn at its start, so that nothing in it can fail as 'locked'."""
        if self.readonly:
            raise StoreError(f"{self.path} was opened with readonly=True", reason="readonly")
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise

    def _rows(self, sql: str, *parameters: object) -> list[Any]:
        # fetchall: a statement that is not read to its end would keep its snapshot, and the -wal file, alive.
        with self._translated():
            return self._db.conn.execute(sql, parameters).fetchall()

    def _row(self, sql: str, *parameters: object) -> Any:
        rows = self._rows(sql, *parameters)
        return rows[0] if rows else None

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

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what SQLite and the file system raise into StoreError."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error) from error
        except FileNotFoundError as error:
            message = f"{self.path}: no such registry; python -m builder --registry PATH makes one"
            raise StoreError(message, reason="missing") from error
        except OSError as error:
            reason = "permission" if isinstance(error, PermissionError) else "store"
            raise StoreError(f"{self.path}: {error.strerror or error}", reason=reason) from error

    def _translate(self, error: Exception) -> StoreError:
        reason, hint = _SQLITE_REASONS.get(_code(error), ("store", ""))
        return StoreError(f"{self.path}: {error}{hint}", reason=reason)


# SQLite's primary result codes: the reason, and what to add to its words.
_SQLITE_REASONS = {
    sqlite3.SQLITE_AUTH: ("permission", ""),
    sqlite3.SQLITE_BUSY: ("busy", ": another process held its turn for too long"),
    sqlite3.SQLITE_CANTOPEN: (
        "permission",
        ": this user cannot open it, or its folder, which WAL needs to be writable",
    ),
    sqlite3.SQLITE_CORRUPT: ("corrupt", ": restore a copy, or delete it and build again"),
    sqlite3.SQLITE_FULL: ("full", ": no space left"),
    sqlite3.SQLITE_NOTADB: ("not_a_registry", ""),
    sqlite3.SQLITE_PERM: ("permission", ""),
    sqlite3.SQLITE_READONLY: (
        "permission",
        ": this user cannot write its folder, as WAL needs even to read, or the file",
    ),
}


def _code(error: Exception) -> int:
    """SQLite's primary result code of an exception, 0 when it has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _create(path: Path) -> None:
    """An empty file, and its missing folders, that nobody else can write, whatever the umask: the runtime trusts no
    other. O_EXCL: opening and closing a file that SQLite has open in this process would drop its locks."""
    for folder in reversed([folder for folder in path.parents if not folder.exists()]):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o755)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))


def _fingerprint(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,200}", value):
        raise StoreError(f"fingerprint: {value!r:.100} is not 1 to 200 printable characters", reason="argument")
    return value


def _insert_blob(db: Database, frame: bytes, content: bytes) -> None:
    row = {"sha256": sha256_hex(frame), "frame": frame, "size": len(content), "content_sha256": sha256_hex(content)}
    db.table("blobs").insert(row, ignore=True)


def _check_frame(artifact: Artifact, frame: bytes) -> bytes:
    """The cubin in `frame`, if both are what the artifact says."""
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
