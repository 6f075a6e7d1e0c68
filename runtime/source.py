"""Where indexes and frames come from: the embedded SQLite file, or a server. Nothing here is trusted or verified.

A source has `where` (for messages), `channel(name) -> {arch: digest}`, `index(digest) -> bytes`,
`frame(artifact) -> bytes` and `discard(kind, digest) -> bool`: whether a cached copy was set aside, so that asking
again may give other bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, Protocol

from registry.contract import Artifact
from runtime.cache import DiskCache
from runtime.config import Config
from runtime.errors import InstallError, SourceError

SCHEMA = 1  # of the registry file (registry.store); user_version in its header
MAX_INDEX = 64 << 20  # bytes
MAX_CHANNEL = 1 << 20
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


def open_source(config: Config) -> Source:
    """The source that the settings name; nothing is opened yet. A remote one stands behind the disk cache."""
    if not config.remote:
        return EmbeddedSource(config.registry)
    inner: Source = OfflineSource(config.registry) if config.offline else HttpSource(config.registry)
    return CachedSource(inner, DiskCache(config.cache))


class EmbeddedSource:
    """A registry file, read-only. Opened for each question: no connection is shared by threads or lives over a fork.

    Raises SourceError: no_registry, unreadable, schema, missing, no_channel.
    """

    def __init__(self, path: str):
        self.path = path
        self.where = path

    def channel(self, name: str) -> dict[str, str]:
        found = dict(self._rows("SELECT arch, digest FROM channels WHERE name = ?", name))
        if not found:
            names = ", ".join(sorted({row[0] for row in self._rows("SELECT name FROM channels")})) or "none"
            raise SourceError(f"{self.path}: no channel {name!r} (it has: {names})", reason="no_channel")
        return found

    def index(self, digest: str) -> bytes:
        return self._blob("SELECT CAST(body AS BLOB) FROM indexes WHERE digest = ?", digest, "index")

    def frame(self, artifact: Artifact) -> bytes:
        return self._blob(
            "SELECT CAST(frame AS BLOB) FROM blobs WHERE sha256 = ?", artifact.frame_sha256, artifact.variant
        )

    def discard(self, kind: str, digest: str) -> bool:
        return False  # the file is the only copy

    def _blob(self, query: str, digest: str, what: str) -> bytes:
        rows = self._rows(query, digest)
        if not rows:
            raise SourceError(f"{self.path}: holds no {what} {digest[:12]}…", reason="missing")
        return rows[0][0]

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with self._open() as db:
            return db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if not os.path.isfile(self.path):
            raise SourceError(
                f"no registry at {self.path}: run `python -m builder --arch sm_120` in a checkout of cubinery, or name "
                "another with runtime.configure(registry=…) or CUBINERY_REGISTRY (a file, or a server's http(s) URL)",
                reason="no_registry",
            )
        try:
            with contextlib.closing(self._connect()) as db:
                yield db
        except sqlite3.Error as error:
            raise SourceError(f"{self.path}: cannot be read as a registry: {error}", reason="unreadable") from error

    def _connect(self) -> sqlite3.Connection:
        """Read-only; in a folder that cannot be written a WAL file opens only as immutable, which needs that nobody
        else writes it: so only when it has no -wal beside it."""
        base = "file:" + urllib.parse.quote(self.path)
        try:
            return _checked(base + "?mode=ro", self.path)
        except sqlite3.OperationalError:
            wal = self.path + "-wal"
            if os.path.exists(wal) and os.path.getsize(wal):
                raise
            return _checked(base + "?mode=ro&immutable=1", self.path)


def _checked(uri: str, path: str) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, timeout=10)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        db.execute("SELECT 1 FROM sqlite_master").fetchone()  # the first real read: fails where mode=ro cannot work
    except BaseException:
        db.close()
        raise
    if version != SCHEMA:
        db.close()
        raise SourceError(
            f"{path}: registry schema {version}, this client reads {SCHEMA}: "
            + ("update the client" if version > SCHEMA else "it is no registry, or an unfinished one"),
            reason="schema",
        )
    return db


class HttpSource:
    """A registry server, or any static server with the same paths.

    Raises SourceError: unreachable, status, missing, redirect, too_long, deadline. Only redirects within the same
    scheme, host and port are followed. `transport` is handed to httpx2 (tests put a mock there).
    """

    def __init__(self, url: str, *, deadline_s: float = DEADLINE_S, transport: Any = None):
        self.where = url
        self._deadline_s = deadline_s
        self._transport = transport
        self._client: Any = None

    def channel(self, name: str) -> dict[str, str]:
        """What the server says; it confers no trust."""
        body = self._get(f"/v1/channels/{urllib.parse.quote(name, safe='')}", MAX_CHANNEL)
        try:
            indexes = json.loads(body)["indexes"]
            return {str(arch): str(digest) for arch, digest in indexes.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(f"{self.where}: channel {name!r} is no channel document", reason="status") from None

    def index(self, digest: str) -> bytes:
        return self._get(f"/v1/indexes/sha256/{digest}", MAX_INDEX)

    def frame(self, artifact: Artifact) -> bytes:
        return self._get(f"/v1/blobs/sha256/{artifact.frame_sha256}", artifact.frame_size)

    def discard(self, kind: str, digest: str) -> bool:
        return False

    def _get(self, path: str, cap: int) -> bytes:
        """The body, at most `cap` bytes. Server errors and broken connections are tried again until the deadline."""
        httpx = _httpx()
        if self._client is None:
            timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
            headers = {"Accept-Encoding": "identity", "User-Agent": "cubinery"}
            self._client = httpx.Client(timeout=timeout, headers=headers, transport=self._transport)
        url, end = self.where + path, time.monotonic() + self._deadline_s
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(max(0.0, min(BACKOFF_S * 2 ** (attempt - 1), end - time.monotonic())))
            try:
                return self._once(url, cap, end)
            except (httpx.TransportError, _ServerError) as error:
                last = error
            if time.monotonic() >= end:
                break
        kind = "status" if isinstance(last, _ServerError) else "unreachable"
        raise SourceError(f"{url}: {last or type(last).__name__}", reason=kind) from None

    def _once(self, url: str, cap: int, end: float) -> bytes:
        origin = _origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            with self._client.stream("GET", url) as response:
                if not response.is_redirect:
                    return _body(response, url, cap, end)
                target = urllib.parse.urljoin(url, response.headers.get("location", ""))
            if _origin(target) != origin:
                message = f"{url}: redirects to {target:.200}, another origin; name that registry itself if you mean it"
                raise SourceError(message, reason="redirect")
            url = target
        raise SourceError(f"{url}: more than {MAX_REDIRECTS} redirects", reason="redirect")


class _ServerError(Exception):
    """A 5xx answer: worth another attempt."""


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
            raise SourceError(f"{url}: longer than the {cap} bytes that it may have", reason="too_long")
        if time.monotonic() > end:
            raise SourceError(f"{url}: not finished within its deadline", reason="deadline")
    return bytes(body)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


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
