"""One HTTP request at a time over a connection that can be cut: redirects within an origin, caps, deadlines."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.parse
from typing import Any

from runtime.errors import InstallError, SourceError
from runtime.sources.answers import too_long

CONNECT_S, READ_S = 5.0, 15.0  # of a connection, of a silence
MAX_REDIRECTS = 3


class Line:
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
        timeout = import_httpx().Timeout(min(READ_S, left), connect=min(CONNECT_S, left))
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


class ServerError(Exception):
    """A 5xx answer: worth another attempt."""


def follow(line: Line, url: str, cap: int, end: float) -> bytes:
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
        raise ServerError(f"the server answers {status}")
    if status != 200:
        # A bucket that may not be listed answers 403 for a file of signed metadata that is not there.
        missing = status == 404 or (status == 403 and "/v1/tuf/" in url)
        raise SourceError(f"{url}: the server answers {status}", reason="missing" if missing else "status")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > cap:
            raise too_long(url, cap)
        if time.monotonic() >= end:
            raise late(url)
    if time.monotonic() >= end:  # a connection that was cut may look like one that ended
        raise late(url)
    return bytes(body)


def late(url: str) -> SourceError:
    return SourceError(f"{url}: not finished within its deadline", reason="deadline")


def _origin(url: str) -> tuple[Any, ...]:
    """A user in it makes another origin: credentials are not taken from a redirect. ValueError for what is no URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.username, parts.password, parts.hostname, parts.port


def import_httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise InstallError("a registry server needs httpx2: pip install 'cubinery[remote]'") from None
    return httpx2
