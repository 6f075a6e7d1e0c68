"""Where indexes and frames come from: the embedded SQLite file, a mirror's folder, or a server. Nothing here is
trusted or verified.

A source has `where` (for messages), `channel(name) -> {arch: digest}`, `index(digest) -> bytes`,
`frame(artifact) -> bytes`, `tuf(path, cap) -> bytes` of a file below v1/tuf/, SourceError ('missing') if it has none,
and `discard(kind, digest) -> bool`: whether a cached copy was set aside, so that asking again may give other bytes.
`close()` ends the connections that nobody is using; a source may be used after it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

from registry.contract import Artifact, ContractError
from registry.errors import StoreError
from registry.untrusted import HAS_TUF, channel, connect
from runtime.config import Config
from runtime.errors import SourceError
from runtime.sources.answers import MAX_CHANNEL, MAX_INDEX, document, too_long, tuf_path
from runtime.sources.cache import DiskCache
from runtime.sources.folder import FolderSource
from runtime.sources.transport import Line, ServerError, follow, import_httpx, late

MAX_ROWS = 100  # of a question about channels
ROW_SLACK = 1 << 16  # bytes of a row beside its frame or body
BUSY_S, FILE_S = 10.0, 10.0  # of waiting for a file's writer, of a question to a file
# What SQLite says where a file system has no POSIX locks, or no shared memory for a WAL. A mount whose lock server does
# not answer reads as BUSY, like a writer: that is never passed over.
NO_LOCKS = frozenset((sqlite3.SQLITE_IOERR_LOCK, sqlite3.SQLITE_IOERR_RDLOCK, sqlite3.SQLITE_IOERR_CHECKRESERVEDLOCK,
                      sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMMAP,
                      sqlite3.SQLITE_IOERR_SHMLOCK))  # fmt: skip
DEADLINE_S = 60.0  # of a whole request with its retries
ATTEMPTS = 3
BACKOFF_S = 0.2  # before the second attempt; doubles


class Source(Protocol):
    where: str

    def channel(self, name: str) -> dict[str, str]: ...
    def index(self, digest: str) -> bytes: ...
    def frame(self, artifact: Artifact) -> bytes: ...
    def tuf(self, path: str, cap: int) -> bytes: ...
    def discard(self, kind: str, digest: str) -> bool: ...
    def close(self) -> None: ...


def open_source(config: Config) -> Source:
    """The source that the settings name; nothing is opened yet. A server stands behind the disk cache."""
    if "://" not in config.registry:
        if config.registry.endswith("/") or os.path.isdir(config.registry):
            return FolderSource(config.registry)
        return EmbeddedSource(config.registry)
    inner: Source = OfflineSource(config.registry) if config.offline else HttpSource(config.registry)
    return CachedSource(inner, DiskCache(config.cache_folder, config.cache_limit))


class EmbeddedSource:
    """A registry file, read-only. Opened for each question: no connection is shared by threads or lives over a fork.

    The file may be anybody's (with given digests), so what a question may cost is bounded: bytes, rows and seconds.
    Raises SourceError: no_registry, unreadable, schema, missing, no_channel, too_long, deadline.
    """

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
        try:
            return channel(dict(found))
        except ContractError as error:
            raise SourceError(f"{self.path}: channel {name!r} is no channel: {error}", reason="unreadable") from None

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
        base = "file://" + urllib.parse.quote(os.fsencode(self.path))
        try:
            return connect(base + "?mode=ro", self.path, longest, BUSY_S, FILE_S)
        except sqlite3.OperationalError as error:
            refused = _primary_code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
            if not refused and getattr(error, "sqlite_errorcode", 0) not in NO_LOCKS:
                raise
            if _filled(self.path + "-wal") or _filled(self.path + "-journal"):
                raise
        return connect(base + "?mode=ro&immutable=1", self.path, longest, BUSY_S, FILE_S)


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # errors of the module itself have none


def _filled(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False


class HttpSource:
    """A registry server, or any static server with the same paths.

    Raises SourceError: url, client, unreachable, status, missing, redirect, too_long, deadline. Only redirects within
    the same scheme, host and port are followed. `transport` is handed to httpx2 (tests put a mock there).
    """

    def __init__(self, url: str, *, deadline_s: float = DEADLINE_S, transport: Any = None):
        self.where = url
        self._deadline_s = deadline_s
        self._transport = transport
        self._tls: Any = None
        self._idle: list[Line] = []  # append and pop are atomic: threads share it, and a fork leaves no lock held
        self._closed = False

    def channel(self, name: str) -> dict[str, str]:
        """What the server says; it confers no trust."""
        body = self._get(f"/v1/channels/{urllib.parse.quote(name, safe='')}", MAX_CHANNEL)
        return document(body, f"{self.where}: channel {name!r}", "status")

    def index(self, digest: str) -> bytes:
        return self._get(f"/v1/indexes/sha256/{digest}", MAX_INDEX)

    def frame(self, artifact: Artifact) -> bytes:
        return self._get(f"/v1/blobs/sha256/{artifact.frame_sha256}", artifact.frame_size)

    def tuf(self, path: str, cap: int) -> bytes:
        return self._get(f"/v1/tuf/{tuf_path(path, self.where)}", cap)

    def discard(self, kind: str, digest: str) -> bool:
        return False

    def close(self) -> None:
        """Requests in flight finish, and then close what they used."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _get(self, path: str, cap: int) -> bytes:
        """The body, at most `cap` bytes. Server errors and broken connections are tried again until the deadline."""
        httpx = import_httpx()
        url, end = self.where + path, time.monotonic() + self._deadline_s
        last: Exception | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(max(0.0, min(BACKOFF_S * 2 ** (attempt - 1), end - time.monotonic())))
            if time.monotonic() >= end:
                break
            try:
                with self._line(end) as line:
                    return follow(line, url, cap, end)
            except (httpx.TransportError, ServerError) as error:
                last = error
            except (httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: a host that is no name
                raise SourceError(f"{url}: cannot be asked for: {error}", reason="url") from None
        if time.monotonic() >= end:
            raise late(url)
        kind = "status" if isinstance(last, ServerError) else "unreachable"
        raise SourceError(f"{url}: {last or type(last).__name__}", reason=kind) from None

    @contextlib.contextmanager
    def _line(self, end: float) -> Iterator[Line]:
        """A line for one request, which is cut at `end`; after a failure it is not used again."""
        try:
            line = self._idle.pop()
        except IndexError:
            line = self._open()
        watchdog = threading.Timer(max(0.0, end - time.monotonic()), line.cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield line
        except BaseException:
            line.cut()
            raise
        finally:
            watchdog.cancel()
            watchdog.join()  # so that it cannot cut the next request
            if line.is_cut:
                line.close()
            else:
                self._idle.append(line)
                if self._closed:
                    self.close()

    def _open(self) -> Line:
        httpx = import_httpx()
        headers = {"Accept-Encoding": "identity", "User-Agent": "cubinery"}
        try:
            if self._tls is None:
                self._tls = httpx.create_ssl_context()
            return Line(httpx.Client(headers=headers, transport=self._transport, verify=self._tls))
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            message = (
                f"no HTTP client can be made: {error}; check the variables SSL_CERT_FILE, SSL_CERT_DIR and *_PROXY"
            )
            raise SourceError(f"{self.where}: {message}", reason="client") from None


class OfflineSource:
    """What stands in for a server when `offline` is set: every question that the disk cache cannot answer fails."""

    def __init__(self, url: str):
        self.where = url

    def channel(self, name: str) -> dict[str, str]:
        raise self._error(f"channel {name!r}")

    def index(self, digest: str) -> bytes:
        raise self._error(f"index {digest[:12]}…")

    def frame(self, artifact: Artifact) -> bytes:
        raise self._error(artifact.variant)

    def tuf(self, path: str, cap: int) -> bytes:
        raise self._error(f"tuf/{path}")

    def discard(self, kind: str, digest: str) -> bool:
        return False

    def close(self) -> None:
        pass  # nothing was opened

    def _error(self, what: str) -> SourceError:
        message = f"{self.where}: offline, and {what} is not in the disk cache; run `python -m runtime prefetch` online"
        return SourceError(message, reason="offline")


class CachedSource:
    """A source behind the disk cache: what was fetched once is read from disk, so a warm cache needs no network."""

    def __init__(self, inner: Source, cache: DiskCache):
        self.inner, self.cache, self.where = inner, cache, inner.where

    def channel(self, name: str) -> dict[str, str]:
        return self.inner.channel(name)

    def index(self, digest: str) -> bytes:
        return self.cache.fetch("indexes", digest, MAX_INDEX, lambda: self.inner.index(digest))

    def frame(self, artifact: Artifact) -> bytes:
        download = partial(self.inner.frame, artifact)
        return self.cache.fetch("blobs", artifact.frame_sha256, artifact.frame_size, download)

    def tuf(self, path: str, cap: int) -> bytes:
        return self.inner.tuf(path, cap)

    def discard(self, kind: str, digest: str) -> bool:
        return self.cache.set_aside(kind, digest)

    def close(self) -> None:
        self.inner.close()
