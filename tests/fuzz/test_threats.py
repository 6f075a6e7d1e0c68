"""Each threat of docs/trust.md has its tests; here are those on the wire that no other file has."""

from __future__ import annotations

import ast
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.contract import sha256_hex
from runtime.errors import SourceError
from runtime.sources import remote as server_source
from runtime.sources.cache import DiskCache
from runtime.sources.remote import CachedSource, HttpSource
from tests.project.shell import ROOT

# Those that the issue lists.
THREATS = (
    "flipped byte", "truncation", "wrong length", "wrong architecture", "wrong ABI", "zstd bomb, declared",
    "zstd bomb, undeclared", "zstd bomb, several frames", "zstd bomb, trailing bytes", "path traversal in names",
    "symlink swap", "foreign-owned cache", "rollback to an older index", "expired metadata", "unknown key",
    "redirect to another host", "https→http", "5xx", "stall", "slow drip", "reset", "disk full", "kill −9 at any point",
    "64 processes starting cold on one cache", "server down",
)  # fmt: skip
PAGE = (ROOT / "docs/trust.md").read_text()
TABLE = PAGE.split("| threat | what happens | tests |")[1].split("\n\n")[0].splitlines()[2:]
ROWS = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in TABLE)}


def names(where: str) -> list[str]:
    """`file::test` in code spans."""
    return re.findall(r"`(tests/[^`]+)`", where)


def test_every_threat_is_in_the_table():
    assert not set(THREATS) - ROWS.keys()


@pytest.mark.parametrize("threat", ROWS)
def test_its_tests_exist_and_so_do_its_reasons(threat: str):
    happens, where = ROWS[threat]
    assert names(where), "a test for each"
    for name in names(where):
        path, test = name.split("::")
        made = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert test in made and test.startswith("test_"), name
    sources = "".join(path.read_text() for room in ("runtime", "registry") for path in (ROOT / room).rglob("*.py"))
    reasons = re.findall(r"`(\w+)`", happens)
    assert reasons or happens.startswith(("loads", "nothing"))
    for reason in reasons:
        assert re.search(rf'"{reason}"', sources), f"no error has the reason {reason}"


# -- on the wire ------------------------------------------------------------------------------------------------------

BODY = b"the body of an index" * 10
DIGEST = sha256_hex(BODY)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)


class Peer(socketserver.ThreadingTCPServer):
    """A server that says `said` to the first `bad` requests, `then` stalls, resets or closes; later it is honest."""

    daemon_threads, block_on_close = True, False

    def __init__(self, said: bytes, then: str, bad: int = 1000):
        super().__init__(("127.0.0.1", 0), Handler)
        self.said, self.then, self.bad, self.asked = said, then, bad, 0
        self.end = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.BaseRequestHandler):
    server: Peer

    def handle(self) -> None:
        self.request.recv(65536)
        self.server.asked += 1
        if self.server.asked > self.server.bad:
            self.request.sendall(HEAD + BODY)
            return
        self.request.sendall(self.server.said)
        if self.server.then == "stall":
            self.server.end.wait(10)
        elif self.server.then == "reset":  # closing with a linger of 0 seconds sends RST
            time.sleep(0.02)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()


@pytest.fixture
def peer(monkeypatch) -> Iterator[type[Peer]]:
    monkeypatch.setattr(server_source, "BACKOFF_S", 0.001)
    made: list[Peer] = []

    def start(*given) -> Peer:
        made.append(Peer(*given))
        threading.Thread(target=made[-1].serve_forever, args=(0.01,), daemon=True).start()
        return made[-1]

    yield start
    for server in made:
        server.end.set()
        server.shutdown()
        server.server_close()


def refused(server: Peer, folder: Path, deadline_s: float) -> str:
    """The reason for which neither an index nor metadata can be had. Nothing of it stays in the cache."""
    reasons = set()
    cache = DiskCache(str(folder))
    remote = CachedSource(HttpSource(server.url, deadline_s=deadline_s), cache)
    for ask in (lambda: remote.index(DIGEST), lambda: remote.tuf("timestamp.json", 1000)):
        start = time.monotonic()
        with pytest.raises(SourceError) as error:
            ask()
        assert time.monotonic() - start < deadline_s + 3
        reasons.add(error.value.reason)
    remote.close()
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    (reason,) = reasons
    return reason


PARTS = {"before a byte": b"", "in the headers": HEAD[:30], "in the body": HEAD + BODY[:50]}


@pytest.mark.parametrize("part", PARTS)
def test_threat_stall(peer, tmp_path: Path, part: str):
    server = peer(PARTS[part], "stall")
    assert refused(server, tmp_path / "c", 0.3) == "deadline"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["reset", "close"])
def test_threat_reset_and_truncation_on_the_wire(peer, tmp_path: Path, part: str, how: str):
    server = peer(PARTS[part], how)
    assert refused(server, tmp_path / "c", 20) == "unreachable"
    assert server.asked == 2 * server_source.ATTEMPTS


@pytest.mark.parametrize("how", ["reset", "close"])
def test_what_breaks_once_is_asked_for_again(peer, how: str):
    server = peer(HEAD + BODY[:50], how, 1)
    assert HttpSource(server.url).index(DIGEST) == BODY and server.asked == 2


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_threat_5xx(peer, tmp_path: Path, status: int):
    server = peer(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status, "close")
    assert refused(server, tmp_path / "c", 20) == "status"
    assert server.asked == 2 * server_source.ATTEMPTS
