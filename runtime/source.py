"""Where indexes and frames come from: the embedded SQLite file, or a server. Nothing here is trusted or verified.

A source has `where` (for messages), `channel(name) -> {arch: digest}`, `index(digest) -> bytes`,
`frame(artifact) -> bytes` and `discard(kind, digest) -> bool`: whether a cached copy was set aside, so that asking
again may give other bytes. `close()` ends the connections that nobody is using; a source may be used after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, Protocol

from registry.contract import SCHEMA, Artifact, ContractError, check_arch, check_digest
from runtime.cache import DiskCache
from runtime.config import Config
from runtime.errors import InstallError, SourceError

MAX_INDEX = 64 << 20  # bytes
MAX_CHANNEL = 1 << 20
MAX_ROWS = 100  # of a question about channels
ROW_SLACK = 1 << 16  # bytes of a row beside its frame or body
BUSY_S, FILE_S = 10.0, 10.0  # of waiting for a file's writer, of a question to a file
CONNECT_S, READ_S, DEADLINE_S = 5.0, 15.0, 60.0  # of a connection, of a silence, of a whole request with its retries
ATTEMPTS = 3
BACKOFF_S = 0.2  # before the second attempt; doubles
MAX_REDIRECTS = 3


class Source(Protocol):
    where: str

    def channel(self, name: str) -> dict[str, str]: ...
    def index(self, digest: str) -> bytes: ...
    def frame(self, artifact: Artifact) -> bytes: ...
    def discard(self, kind: str, digest: str) -> bool: ...
    def close(self) -> None: ...


def open_source(config: Config) -> Source:
    """The source that the settings name; nothing is opened yet. A remote one stands behind the disk cache."""
    if not config.remote:
        return EmbeddedSource(config.registry)
    inner: Source = OfflineSource(config.registry) if config.offline else HttpSource(config.registry)
    return CachedSource(inner, DiskCache(config.cache))


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
        return _channel(dict(found), f"{self.path}: channel {name!r}", "unreadable")

    def index(self, digest: str) -> bytes:
        return self._blob("SELECT CAST(body AS BLOB) FROM indexes WHERE digest = ?", digest, "index", MAX_INDEX)

    def frame(self, artifact: Artifact) -> bytes:
        query = "SELECT CAST(frame AS BLOB) FROM blobs WHERE sha256 = ?"
        return self._blob(query, artifact.frame_sha256, artifact.variant, artifact.frame_size)

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

    def _blob(self, query: str, digest: str, what: str, cap: int) -> bytes:
        rows = self._rows(cap, query, digest)
        if not rows or not isinstance(rows[0][0], bytes):
            raise SourceError(f"{self.path}: holds no {what} {digest[:12]}…", reason="missing")
        if len(rows[0][0]) > cap:
            raise _too_long(self.path, cap)
        return rows[0][0]

    def _rows(self, cap: int, query: str, *values: str) -> list[tuple[Any, ...]]:
        """A question's answer, of values of at most `cap` bytes (and some slack) and within FILE_S."""
        self.check_present()
        try:
            with contextlib.closing(self._connect(min(cap + ROW_SLACK, 2**31 - 1))) as db:
                return db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            code = _primary_code(error)
            if code == sqlite3.SQLITE_TOOBIG:
                raise _too_long(self.path, cap) from None
            if code == sqlite3.SQLITE_INTERRUPT:
                raise SourceError(f"{self.path}: not read within its deadline", reason="deadline") from None
            raise SourceError(f"{self.path}: cannot be read as a registry: {error}", reason="unreadable") from error

    def _connect(self, longest: int) -> sqlite3.Connection:
        """Read-only; in a folder that cannot be written a WAL file opens only as immutable, which needs that nobody
        else writes it: so only when it has no -wal or -journal to be read with it."""
        base = "file://" + urllib.parse.quote(os.fsencode(self.path))
        try:
            return _checked(base + "?mode=ro", self.path, longest)
        except sqlite3.OperationalError as error:
            if _primary_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            if _filled(self.path + "-wal") or _filled(self.path + "-journal"):
                raise
            return _checked(base + "?mode=ro&immutable=1", self.path, longest)


def _checked(uri: str, path: str, longest: int) -> sqlite3.Connection:
    """A connection to a file that is a registry: its version, and tables where views or virtual tables could be.

    From here on no value is longer than `longest` bytes, and nothing runs for longer than FILE_S.
    """
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S)
    end = time.monotonic() + BUSY_S + FILE_S
    try:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)
        db.set_progress_handler(lambda: time.monotonic() > end, 1000)  # instructions
        db.execute("PRAGMA trusted_schema = OFF")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        # The first real read: it fails where mode=ro cannot work.
        (tables,) = db.execute(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND rootpage > 0 "
            "AND name IN ('blobs', 'channels', 'indexes')"
        ).fetchone()
        if version != SCHEMA or tables != 3:
            hint = "update the client" if version > SCHEMA else "it is no registry, or an unfinished one"
            message = f"{path}: registry schema {version}, this client reads {SCHEMA}: {hint}"
            raise SourceError(message, reason="schema")
    except BaseException:
        db.close()
        raise
    return db


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # errors of the module itself have none


def _filled(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False


def _too_long(where: str, cap: int) -> SourceError:
    return SourceError(f"{where}: longer than the {cap} bytes that it may have", reason="too_long")


def _channel(found: Any, what: str, reason: str) -> dict[str, str]:
    """{arch: digest} if it is that, else SourceError with this reason."""
    try:
        return {check_arch(arch): check_digest(digest) for arch, digest in found.items()}
    except (ContractError, AttributeError) as error:
        raise SourceError(f"{what} is no channel: {error}", reason=reason) from None


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
        self._idle: list[_Line] = []  # append and pop are atomic: threads share it, and a fork leaves no lock held
        self._closed = False

    def channel(self, name: str) -> dict[str, str]:
        """What the server says; it confers no trust."""
        body = self._get(f"/v1/channels/{urllib.parse.quote(name, safe='')}", MAX_CHANNEL)
        what = f"{self.where}: channel {name!r}"
        try:
            found = json.loads(body)["indexes"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SourceError(f"{what} is no channel document", reason="status") from None
        return _channel(found, what, "status")

    def index(self, digest: str) -> bytes:
        return self._get(f"/v1/indexes/sha256/{digest}", MAX_INDEX)

    def frame(self, artifact: Artifact) -> bytes:
        return self._get(f"/v1/blobs/sha256/{artifact.frame_sha256}", artifact.frame_size)

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
        httpx = _httpx()
        url, end = self.where + path, time.monotonic() + self._deadline_s
        last: Exception | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(max(0.0, min(BACKOFF_S * 2 ** (attempt - 1), end - time.monotonic())))
            if time.monotonic() >= end:
                break
            try:
                with self._line(end) as line:
                    return _follow(line, url, cap, end)
            except (httpx.TransportError, _ServerError) as error:
                last = error
            except (httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: a host that is no name
                raise SourceError(f"{url}: cannot be asked for: {error}", reason="url") from None
        if time.monotonic() >= end:
            raise _late(url)
        kind = "status" if isinstance(last, _ServerError) else "unreachable"
        raise SourceError(f"{url}: {last or type(last).__name__}", reason=kind) from None

    @contextlib.contextmanager
    def _line(self, end: float) -> Iterator[_Line]:
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

    def _open(self) -> _Line:
        httpx = _httpx()
        headers = {"Accept-Encoding": "identity", "User-Agent": "cubinery"}
        try:
            if self._tls is None:
                self._tls = httpx.create_ssl_context()
            return _Line(httpx.Client(headers=headers, transport=self._transport, verify=self._tls))
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            message = (
                f"no HTTP client can be made: {error}; check the variables SSL_CERT_FILE, SSL_CERT_DIR and *_PROXY"
            )
            raise SourceError(f"{self.where}: {message}", reason="client") from None


class _Line:
    """A client that serves one request at a time: so it has one connection, and that one can be cut.

    httpx's timeouts bound each silence, not the whole: a server that sends a byte now and then would hold a call for
    ever. Only the look-up of a name cannot be cut; the system bounds it.
    """

    def __init__(self, client: Any):
        self.is_cut = False
        self._client = client
        self._socket: Any = None

    def get(self, url: str, end: float) -> contextlib.AbstractContextManager[Any]:
        """The response, its body still to be read."""
        left = max(0.001, end - time.monotonic())
        timeout = _httpx().Timeout(min(READ_S, left), connect=min(CONNECT_S, left))
        return self._client.stream("GET", url, timeout=timeout, extensions={"trace": self._watch})

    def cut(self) -> None:
        """End what is under way, from any thread: reads return at once."""
        self.is_cut = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the other side was faster
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._client.close()
        if self._socket is not None:
            self._socket.close()

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """Keeps a second descriptor of the connection: the first is lost to TLS, which takes it over."""
        if not event.endswith(".connect_tcp.complete"):  # of a connection, or of a proxy's
            return
        old, self._socket = self._socket, info["return_value"].get_extra_info("socket").dup()
        if old is not None:
            old.close()
        if self.is_cut:
            self.cut()


class _ServerError(Exception):
    """A 5xx answer: worth another attempt."""


def _follow(line: _Line, url: str, cap: int, end: float) -> bytes:
    """A URL's body, past redirects within its origin. Messages name only the URL that was asked for first."""
    target = url
    for _ in range(MAX_REDIRECTS + 1):
        with line.get(target, end) as response:
            if not response.is_redirect:
                return _body(response, url, cap, end)
            location = response.headers.get("location", "")
        try:
            target = urllib.parse.urljoin(target, location)
            same = _origin(target) == _origin(url)
            usable = target.isprintable()
        except ValueError:  # of a port that is no number, or broken brackets
            usable = False
        if not usable:
            raise SourceError(f"{url}: redirects to what is no URL", reason="redirect") from None
        if not same:
            message = f"{url}: redirects to another origin; name that registry itself if you mean it"
            raise SourceError(message, reason="redirect")
    raise SourceError(f"{url}: more than {MAX_REDIRECTS} redirects", reason="redirect")


def _body(response: Any, url: str, cap: int, end: float) -> bytes:
    status = response.status_code
    if status >= 500:
        raise _ServerError(f"the server answers {status}")
    if status != 200:
        raise SourceError(f"{url}: the server answers {status}", reason="missing" if status == 404 else "status")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > cap:
            raise _too_long(url, cap)
        if time.monotonic() >= end:
            raise _late(url)
    if time.monotonic() >= end:  # a connection that was cut may look like one that ended
        raise _late(url)
    return bytes(body)


def _late(url: str) -> SourceError:
    return SourceError(f"{url}: not finished within its deadline", reason="deadline")


def _origin(url: str) -> tuple[Any, ...]:
    """A user in it makes another origin: credentials are not taken from a redirect. ValueError for what is no URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.username, parts.password, parts.hostname, parts.port


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise InstallError("a registry server needs httpx2: pip install 'cubinery[remote]'") from None
    return httpx2


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
        data = self.cache.get("indexes", digest, MAX_INDEX)
        if data is None:
            data = self.inner.index(digest)
            self.cache.put("indexes", digest, data)
        return data

    def frame(self, artifact: Artifact) -> bytes:
        data = self.cache.get("blobs", artifact.frame_sha256, artifact.frame_size)
        if data is None:
            data = self.inner.frame(artifact)
            self.cache.put("blobs", artifact.frame_sha256, data)
        return data

    def discard(self, kind: str, digest: str) -> bool:
        return self.cache.set_aside(kind, digest)

    def close(self) -> None:
        self.inner.close()
