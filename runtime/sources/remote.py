"""A registry server as a source, behind the disk cache; and what stands in for it offline."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.parse
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from registry.contract import Artifact
from runtime.errors import SourceError
from runtime.sources.answers import MAX_CHANNEL, MAX_INDEX, document, tuf_path
from runtime.sources.cache import DiskCache

if TYPE_CHECKING:
    from runtime.sources import Source
    from runtime.sources.transport import Line

DEADLINE_S = 60.0  # of a whole request with its retries
ATTEMPTS = 3
BACKOFF_S = 0.2  # before the second attempt; doubles


class HttpSource:
    """A registry server, or any static server with the same paths.

    Raises SourceError: url, client, unreachable, status, missing, redirect, too_long, deadline. Only redirects within
    the same scheme, host and port are followed. `transport` is handed to httpx2 (tests put a mock there).
    """

    anyone = "it is a server"

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

    def check_present(self) -> None:
        pass  # asking is what tells

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
        from runtime.sources.transport import ServerError, follow, import_httpx, late

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
        from runtime.sources.transport import Line, import_httpx

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

    anyone = "it is a server"

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

    def check_present(self) -> None:
        pass  # asking is what tells

    def discard(self, kind: str, digest: str) -> bool:
        return False

    def close(self) -> None:
        pass  # nothing was opened

    def _error(self, what: str) -> SourceError:
        message = f"{self.where}: offline, and {what} is not in the disk cache; run `python -m runtime prefetch` online"
        return SourceError(message, reason="offline")


class CachedSource:
    """A source behind the disk cache: what was fetched once is read from disk, so a warm cache needs no network."""

    anyone = "it is a server"

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

    def check_present(self) -> None:
        pass  # asking is what tells

    def discard(self, kind: str, digest: str) -> bool:
        return self.cache.set_aside(kind, digest)

    def close(self) -> None:
        self.inner.close()
