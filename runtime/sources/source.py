"""Which source the settings name, and the embedded one: a registry file, read with the standard library's SQLite."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from typing import TYPE_CHECKING, Any

from registry.contract.arch import ARCH
from registry.contract.canonical import DIGEST
from registry.errors import StoreError
from registry.untrusted import HAS_TUF, connect
from runtime.config import Config
from runtime.errors import SourceError
from runtime.sources import Source
from runtime.sources.answers import MAX_CHANNEL, MAX_INDEX, as_channel, too_long, tuf_path

if TYPE_CHECKING:
    import sqlite3

    from registry.contract import Artifact

MAX_ROWS = 100  # of a question about channels
ROW_SLACK = 1 << 16  # bytes of a row beside its frame or body
BUSY_S, FILE_S = 10.0, 10.0  # of waiting for a file's writer, of a question to a file
# What SQLite says where a file system has no POSIX locks, or no shared memory for a WAL. A mount whose lock server does
# not answer reads as BUSY, like a writer: that is never passed over.
NO_LOCKS = frozenset(("SQLITE_IOERR_LOCK", "SQLITE_IOERR_RDLOCK", "SQLITE_IOERR_CHECKRESERVEDLOCK",
                      "SQLITE_IOERR_SHMOPEN", "SQLITE_IOERR_SHMMAP", "SQLITE_IOERR_SHMLOCK"))  # fmt: skip


def open_source(config: Config) -> Source:
    """The source that the settings name; nothing is opened yet. A server stands behind the disk cache. Each kind is
    imported where it is used: a process uses one."""
    if "://" not in config.registry:
        if config.registry.endswith("/") or os.path.isdir(config.registry):
            from runtime.sources.folder import FolderSource

            return FolderSource(config.registry)
        return EmbeddedSource(config.registry)
    from runtime.sources.cache import DiskCache
    from runtime.sources.remote import CachedSource, HttpSource, OfflineSource

    inner: Source = OfflineSource(config.registry) if config.offline else HttpSource(config.registry)
    return CachedSource(inner, DiskCache(config.cache_folder, config.cache_limit))


class EmbeddedSource:
    """A registry file, read-only. Opened for each question: no connection is shared by threads or lives over a fork.

    The file may be anybody's (with given digests), so what a question may cost is bounded: bytes, rows and seconds.
    Raises SourceError: no_registry, unreadable, schema, missing, no_channel, too_long, deadline.
    """

    anyone = ""

    def __init__(self, path: str):
        self.path = os.path.abspath(path)
        self.where = self.path

    def channel(self, name: str) -> dict[str, str]:
        query = f"SELECT arch, digest FROM channels WHERE name = ? LIMIT {MAX_ROWS}"
        found = self._rows(MAX_CHANNEL, query, name)
        if not found:
            rows = self._rows(MAX_CHANNEL, f"SELECT DISTINCT name FROM channels LIMIT {MAX_ROWS}")
            names = ", ".join(sorted(str(row[0]) for row in rows)) or "none"
            raise SourceError(f"{self.path}: no channel {name!r} (it has: {names:.1000})", reason="no_channel")
        if all(ARCH.fullmatch(str(arch)) and DIGEST.fullmatch(str(digest)) for arch, digest in found):
            return dict(found)
        return as_channel(dict(found), f"{self.path}: channel {name!r}", "unreadable")  # says what is wrong

    def index(self, digest: str) -> bytes:
        return self._blob(
            "SELECT CAST(body AS BLOB) FROM indexes WHERE digest = ?", digest, f"index {digest[:12]}…", MAX_INDEX
        )

    def frame(self, artifact: Artifact) -> bytes:
        query = "SELECT CAST(frame AS BLOB) FROM blobs WHERE sha256 = ?"
        return self._blob(query, artifact.frame_sha256, artifact.variant, artifact.frame_size)

    def tuf(self, path: str, cap: int) -> bytes:
        if not self._rows(cap, HAS_TUF):
            raise SourceError(f"{self.path}: holds no TUF metadata", reason="missing")
        query = "SELECT CAST(body AS BLOB) FROM tuf WHERE path = ?"
        return self._blob(query, tuf_path(path, self.path), f"tuf/{path}", cap)

    def discard(self, kind: str, digest: str) -> bool:
        return False  # the file is the only copy

    def close(self) -> None:
        pass  # nothing stays open

    def check_present(self) -> None:
        """SourceError ('no_registry') if there is no file; it is not opened."""
        if not os.path.isfile(self.path):
            raise SourceError(
                f"no registry at {self.path}: run `python -m builder --arch sm_120` in a checkout of cubinery, or name "
                "another with runtime.configure(registry=…) or CUBINERY_REGISTRY (a file, or a server's http(s) URL)",
                reason="no_registry",
            )

    def _blob(self, query: str, key: str, what: str, cap: int) -> bytes:
        rows = self._rows(cap, query, key)
        if not rows or not isinstance(rows[0][0], bytes):
            raise SourceError(f"{self.path}: holds no {what}", reason="missing")
        if len(rows[0][0]) > cap:
            raise too_long(self.path, cap)
        return rows[0][0]

    def _rows(self, cap: int, query: str, *values: str) -> list[tuple[Any, ...]]:
        """A question's answer, of values of at most `cap` bytes (and some slack) and within FILE_S."""
        import sqlite3  # here: a client of a server reads no such file

        self.check_present()
        try:
            with contextlib.closing(self._connect(min(cap + ROW_SLACK, 2**31 - 1))) as db:
                return db.execute(query, values).fetchall()
        except StoreError as error:
            raise SourceError(str(error), reason="schema") from None
        except sqlite3.Error as error:
            code = _primary_code(error)
            if code == sqlite3.SQLITE_TOOBIG:
                raise too_long(self.path, cap) from None
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL):
                message = (
                    f"{self.path}: cannot be locked: {error}. Somebody writes it, or no POSIX locks work on its file "
                    "system: copy it to a local disk, or serve it over HTTP"
                )
                raise SourceError(message, reason="unreadable") from error
            if code == sqlite3.SQLITE_INTERRUPT:
                raise SourceError(f"{self.path}: not read within its deadline", reason="deadline") from None
            raise SourceError(f"{self.path}: cannot be read as a registry: {error}", reason="unreadable") from error

    def _connect(self, longest: int) -> sqlite3.Connection:
        """Read-only. As immutable, where SQLite cannot lock the file: a WAL file in a folder that cannot be written, or
        a file system without POSIX locks. Nobody else may write it then: so only when it has no -wal or -journal to be
        read with it. Should somebody begin to, the hashes of what is read tell."""
        import sqlite3

        base = "file://" + urllib.parse.quote(os.fsencode(self.path))
        try:
            return connect(base + "?mode=ro", self.path, longest, BUSY_S, FILE_S)
        except sqlite3.OperationalError as error:
            refused = _primary_code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
            if not refused and _code(error) not in {getattr(sqlite3, name) for name in NO_LOCKS}:
                raise
            if _filled(self.path + "-wal") or _filled(self.path + "-journal"):
                raise
        return connect(base + "?mode=ro&immutable=1", self.path, longest, BUSY_S, FILE_S)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0)  # errors of the module itself have none


def _primary_code(error: sqlite3.Error) -> int:
    return _code(error) & 0xFF


def _filled(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False
