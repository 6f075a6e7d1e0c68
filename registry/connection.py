"""One SQLite connection to a registry file: opening, transactions, errors."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from sqlite_utils.db import Database

# pysqlite3 where it is installed: its SQLite has no WAL-reset bug.
from sqlite_utils.utils import sqlite3 as sqlite3  # type: ignore[attr-defined]

from registry.contract import SCHEMA
from registry.errors import StoreError
from registry.schema import APPLICATION_ID, MIGRATIONS, PAGE_SIZE


class Connection:
    """What every user of the file shares; `Store` is what it is for."""

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. The last writer to leave folds the -wal file into the registry."""
        self._db.close()

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
            if version == 0:
                message = f"{self.path}: the registry has no tables yet; a writer (the builder) sets it up"
                raise StoreError(message, reason="empty")
            return  # an older schema is read as it is: the tables that it lacks count as empty
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

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Database]:
        """Several writes as one: all of them, or none if it raises. Store's own writes cannot stand in it."""
        with self._write() as db:
            yield db

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read within sees the registry as it is now, whatever others write meanwhile."""
        with self._translated():
            self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.rollback()

    def _has(self, table: str) -> bool:
        """Asked every time: another process may migrate the file while this one has it open."""
        return self._row("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", table) is not None

    def _rows(self, sql: str, *parameters: object) -> list[Any]:
        # fetchall: a statement that is not read to its end would keep its snapshot, and the -wal file, alive.
        with self._translated():
            return self._db.conn.execute(sql, parameters).fetchall()

    def _row(self, sql: str, *parameters: object) -> Any:
        rows = self._rows(sql, *parameters)
        return rows[0] if rows else None

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
