"""Where bytes come from: the embedded file, servers good and bad, and the disk cache in front of them."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import socket
import socketserver
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch

import runtime
from registry.contract import sha256_hex
from registry.store import Store
from runtime.errors import InstallError, IntegrityError, SourceError, UntrustedError
from runtime.load import session
from runtime.sources import remote as server_source
from runtime.sources import source as embedded
from runtime.sources.cache import DiskCache
from runtime.sources.remote import CachedSource, HttpSource
from runtime.sources.source import EmbeddedSource
from tests.runtime.fakes import FakeBackend, toy_index, write_registry
from tests.support.sources import URL, Server, reply, server

__all__ = ["server"]  # a fixture

Q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)


def fails(ask, reason: str, kind=SourceError) -> str:
    with pytest.raises(kind) as error:
        ask()
    assert error.value.reason == reason, error.value
    return str(error.value)


# -- the embedded registry --------------------------------------------------------------------------------------------


def test_embedded_gives_what_the_store_holds(registry: Path):
    embedded = EmbeddedSource(str(registry))
    with Store(registry, readonly=True) as store:
        (digest,) = embedded.channel("stable").values()
        assert embedded.channel("stable") == store.channel("stable")
        assert embedded.index(digest) == store.get_index(digest)
    index, frames = toy_index()
    assert index.digest == digest
    assert all(embedded.frame(a) == frames[a.frame_sha256] for a in index.artifacts)


def test_embedded_reads_while_a_builder_writes(registry: Path):
    with Store(registry) as store:  # its -wal holds what is newest
        index, _ = toy_index()
        store.put_index(index, "nightly")
        assert os.path.getsize(f"{registry}-wal") > 0
        assert EmbeddedSource(str(registry)).channel("nightly") == {"sm_120": index.digest}


def test_what_is_missing_is_named(registry: Path, tmp_path: Path):
    embedded = EmbeddedSource(str(registry))
    assert "it has: stable" in fails(lambda: embedded.channel("nope"), "no_channel")
    fails(lambda: embedded.index("0" * 64), "missing")
    message = fails(lambda: EmbeddedSource(str(tmp_path / "none.db")).channel("stable"), "no_registry")
    assert "python -m builder" in message and "CUBINERY_REGISTRY" in message
    fails(lambda: EmbeddedSource(str(tmp_path)).channel("stable"), "no_registry")


def test_no_registry_at_the_default_place(backend: FakeBackend):
    from registry.store import default_path

    message = fails(lambda: runtime.flash_attn(Q, Q, Q), "no_registry")
    assert str(default_path()) in message


def test_files_that_are_no_registry(tmp_path: Path):
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    fails(lambda: EmbeddedSource(str(tmp_path / "text.db")).channel("stable"), "unreadable")
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    fails(lambda: EmbeddedSource(str(tmp_path / "empty.db")).channel("stable"), "schema")
    write_registry(tmp_path / "newer.db", only="bf16-d64")
    with sqlite3.connect(tmp_path / "newer.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert "update the client" in fails(lambda: EmbeddedSource(str(tmp_path / "newer.db")).channel("stable"), "schema")


READ_AS_NOBODY = """
import os, sqlite3, sys
from runtime.sources.source import EmbeddedSource
if os.geteuid() == 0: os.setuid(65534)
print(EmbeddedSource(sys.argv[1]).channel("stable")["sm_120"])
"""


def test_a_folder_that_cannot_be_written(registry: Path):
    """A WAL file in it opens only as immutable; with a -wal beside it, it is refused."""
    folder = Path(tempfile.mkdtemp())  # not tmp_path: another user must get there
    try:
        shutil.copy(registry, folder / "r.db")
        folder.chmod(0o555)
        command = [sys.executable, "-c", READ_AS_NOBODY, str(folder / "r.db")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.strip()) == 64
        folder.chmod(0o755)
        (folder / "r.db-wal").write_bytes(b"x" * 100)
        folder.chmod(0o555)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and "cannot be read as a registry" in done.stderr
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def edited(registry: Path, *statements: str) -> EmbeddedSource:
    with sqlite3.connect(registry) as db:
        db.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            db.execute(statement)
    db.close()
    return EmbeddedSource(str(registry))


def plain(registry: Path) -> None:
    """No WAL, so that another connection can lock the whole file."""
    with sqlite3.connect(registry) as db:
        assert db.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    db.close()


def test_a_locked_file_is_never_read_as_immutable(registry: Path, monkeypatch):
    plain(registry)
    monkeypatch.setattr(embedded, "BUSY_S", 0.05)
    writer = sqlite3.connect(registry, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert "locked" in fails(lambda: EmbeddedSource(str(registry)).channel("stable"), "unreadable")
    writer.execute("ROLLBACK")
    writer.close()
    assert EmbeddedSource(str(registry)).channel("stable")


@pytest.mark.parametrize("beside", ["-wal", "-journal"])
@pytest.mark.parametrize(
    "code",
    [
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY_ROLLBACK,
        sqlite3.SQLITE_IOERR_LOCK,
        sqlite3.SQLITE_IOERR_SHMMAP,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_IOERR_READ,
    ],
)
def test_immutable_needs_a_file_that_stands_alone(registry: Path, monkeypatch, beside, code):
    """As from a folder that cannot be written, or a file system without locks: without immutable SQLite refuses."""
    connect = sqlite3.connect

    def refuse(where: str, **options):
        if "immutable=1" in where:
            return connect(where, **options)
        error = sqlite3.OperationalError("refused")
        error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr(sqlite3, "connect", refuse)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR_READ):
        said = fails(lambda: EmbeddedSource(str(registry)).channel("stable"), "unreadable")
        assert "copy it to a local disk, or serve it over HTTP" in said
    else:
        assert EmbeddedSource(str(registry)).channel("stable")
    Path(f"{registry}{beside}").write_bytes(b"x" * 100)
    fails(lambda: EmbeddedSource(str(registry)).channel("stable"), "unreadable")


def test_paths_that_a_uri_could_misread(registry: Path, monkeypatch):
    assert EmbeddedSource("/" + str(registry)).channel("stable"), "//host/path would name a host"
    odd = registry.parent / "a?mode=rw#%41\udcff.db"
    shutil.copy(registry, odd)
    assert EmbeddedSource(str(odd)).channel("stable")
    monkeypatch.chdir(registry.parent)
    assert EmbeddedSource(registry.name).path == str(registry) and EmbeddedSource(registry.name).channel("stable")


@pytest.mark.parametrize("row", ["'sm_120a', '" + "0" * 64 + "'", "'sm_120', 'latest'", "3, 4"])
def test_channels_are_architectures_and_digests(registry: Path, row):
    source = edited(registry, f"INSERT INTO channels (name, arch, digest) VALUES ('odd', {row})")
    fails(lambda: source.channel("odd"), "unreadable")


def test_a_file_of_others_cannot_fill_the_memory(registry: Path, monkeypatch):
    digest, huge = "1" * 64, 3_000_000
    source_ = edited(
        registry,
        f"INSERT INTO indexes (digest, arch, body) VALUES ('{digest}', 'sm_120', zeroblob({huge}))",
        f"INSERT INTO indexes (digest, arch, body) VALUES ('{digest[::-1][1:]}2', 'sm_120', zeroblob(1001))",
    )
    assert source_.index(digest) == bytes(huge)
    monkeypatch.setattr(embedded, "MAX_INDEX", 1000)
    fails(lambda: source_.index(digest), "too_long")
    fails(lambda: source_.index(digest[1:] + "2"), "too_long")
    artifact = toy_index()[0].artifacts[0]
    changed = f"UPDATE blobs SET frame = zeroblob({huge}) WHERE sha256 = '{artifact.frame_sha256}'"
    fails(lambda: edited(registry, changed).frame(artifact), "too_long")


def test_a_file_of_others_cannot_hold_a_call(registry: Path, monkeypatch):
    rows = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000) "
    slow = edited(
        registry, "DROP TABLE channels", "CREATE TABLE channels (name, arch, digest)",
        f"INSERT INTO channels {rows} SELECT 'x' || i, 'sm_120', '{'0' * 64}' FROM n",
    )  # fmt: skip
    fails(lambda: slow.channel("stable"), "no_channel")
    monkeypatch.setattr(embedded, "FILE_S", -embedded.BUSY_S)
    fails(lambda: slow.channel("stable"), "deadline")


@pytest.mark.parametrize("trick", [
    "CREATE VIEW channels AS SELECT 'stable' AS name, 'sm_120' AS arch, '" + "0" * 64 + "' AS digest",
    "CREATE VIRTUAL TABLE channels USING fts4(name, arch, digest)",
], ids=["view", "virtual table"])  # fmt: skip
def test_only_tables_are_read(registry: Path, trick):
    fails(lambda: edited(registry, "DROP TABLE channels", trick).channel("stable"), "schema")


# -- servers, without sockets -----------------------------------------------------------------------------------------


def mock(answer, **options) -> HttpSource:
    return HttpSource(URL, transport=httpx2.MockTransport(answer), **options)


def test_an_unpinned_server_is_refused_and_never_asked(backend: FakeBackend, server: Server, tmp_path: Path):
    runtime.configure(registry=URL, cache=tmp_path / "cache")
    message = fails(lambda: runtime.flash_attn(Q, Q, Q), "untrusted", UntrustedError)
    assert "configure(index=" in message and "CUBINERY_INDEX" in message
    assert server.asked == []


@pytest.mark.parametrize("pin", ["{}", "sm_120={}", "sm_90=" + "1" * 64 + ", sm_120={}"])
def test_a_pinned_index_serves_calls(backend: FakeBackend, server: Server, tmp_path: Path, monkeypatch, pin):
    monkeypatch.setenv("CUBINERY_REGISTRY", URL + "/")
    monkeypatch.setenv("CUBINERY_INDEX", pin.format(server.index.digest))
    monkeypatch.setenv("CUBINERY_CACHE", str(tmp_path / "cache"))
    runtime.configure()
    runtime.flash_attn(Q, Q, Q)
    assert len(backend.driver.launches) == 1
    assert [path.split("/")[2] for path in server.asked] == ["indexes", "blobs"], "no channel is asked for"


def test_a_digest_that_the_server_does_not_have(backend: FakeBackend, server: Server, tmp_path: Path):
    runtime.configure(registry=URL, index="2" * 64, cache=tmp_path / "cache")
    fails(lambda: runtime.flash_attn(Q, Q, Q), "missing")


def test_a_warm_cache_needs_no_server(backend: FakeBackend, server: Server, tmp_path: Path):
    settings = {"registry": URL, "index": server.index.digest, "cache": tmp_path / "cache"}
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    asked = len(server.asked)
    server.down = True
    for offline in (None, True):
        runtime.configure(**settings, offline=offline)
        runtime.flash_attn(Q, Q, Q)
    assert len(server.asked) == asked and backend.driver.calls.count("load_library") == 3


def test_a_server_that_is_down(backend: FakeBackend, server: Server, tmp_path: Path):
    server.down = True
    runtime.configure(registry=URL, index=server.index.digest, cache=tmp_path / "cache")
    message = fails(lambda: runtime.flash_attn(Q, Q, Q), "unreachable")
    assert URL in message and len(server.asked) == server_source.ATTEMPTS
    runtime.configure(registry=URL, index=server.index.digest, cache=tmp_path / "cache", offline=True)
    assert "prefetch" in fails(lambda: runtime.flash_attn(Q, Q, Q), "offline")
    assert len(server.asked) == server_source.ATTEMPTS


def test_a_server_that_lies_is_refused_and_not_cached(backend: FakeBackend, server: Server, tmp_path: Path):
    settings = {"registry": URL, "index": server.index.digest, "cache": tmp_path / "cache"}
    good = dict(server.frames)
    server.frames = {digest: frame[:-1] + b"\0" for digest, frame in good.items()}
    runtime.configure(**settings)
    fails(lambda: runtime.flash_attn(Q, Q, Q), "sha256", IntegrityError)
    assert not backend.driver.calls
    server.frames = good
    runtime.flash_attn(Q, Q, Q)


@pytest.mark.parametrize("kind", ["blobs", "indexes"])
def test_a_corrupt_cache_entry_is_set_aside_and_fetched_once(backend, server: Server, tmp_path: Path, kind, caplog):
    settings = {"registry": URL, "index": server.index.digest, "cache": tmp_path / "cache"}
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    (entry,) = (tmp_path / "cache" / "v1" / kind).rglob("[0-9a-f]" * 64)
    sound = entry.read_bytes()
    entry.write_bytes(sound[:-2] + b"??")
    asked = len(server.asked)
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    assert len(server.asked) == asked + 1 and entry.read_bytes() == sound
    assert entry.with_name(entry.name + ".corrupt").exists() and "corrupt" in caplog.text
    entry.write_bytes(sound[:-2] + b"??")
    server.down = True
    runtime.configure(**settings)
    fails(lambda: runtime.flash_attn(Q, Q, Q), "unreachable")


def test_server_errors_are_tried_again(monkeypatch):
    monkeypatch.setattr(server_source, "BACKOFF_S", 0.001)
    answers = [httpx2.Response(503), httpx2.ReadError("reset"), reply(200, b"body")]

    def answer(request):
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    assert mock(answer).index("0" * 64) == b"body"
    fails(lambda: mock(lambda _: httpx2.Response(500)).index("0" * 64), "status")


def test_a_bucket_that_may_not_be_listed_has_no_such_metadata():
    """It answers 403 for what is not there; of anything else, 403 is a refusal."""
    bucket = mock(lambda _: httpx2.Response(403))
    fails(lambda: bucket.tuf("2.root.json", 1000), "missing")
    fails(lambda: bucket.index("0" * 64), "status")


def test_client_errors_are_not():
    asked = []

    def answer(request):
        asked.append(request)
        return httpx2.Response(403)

    fails(lambda: mock(answer).index("0" * 64), "status")
    assert len(asked) == 1


@pytest.mark.parametrize(("target", "followed"), [
    ("/moved", True), (URL + "/moved", True), ("http://elsewhere.test/moved", False),
    ("https://registry.test/moved", False), ("http://registry.test:81/moved", False), ("//elsewhere.test/x", False),
    ("file:///etc/passwd", False), ("http://registry.test:99999/moved", False), ("http://[/moved", False),
    ("/moved\x01", False), ("http://user:secret@registry.test/moved", False),
])  # fmt: skip
def test_redirects_stay_on_their_origin(target, followed):
    def answer(request):
        if request.url.path == "/moved":
            return reply(200, b"body")
        return httpx2.Response(302, headers={"location": target})

    if followed:
        assert mock(answer).index("0" * 64) == b"body"
    else:
        assert "secret" not in fails(lambda: mock(answer).index("0" * 64), "redirect")
    fails(lambda: mock(lambda _: httpx2.Response(302, headers={"location": "/loop"})).index("0" * 64), "redirect")


def test_https_never_falls_back_to_http():

    def answer(_):
        return httpx2.Response(301, headers={"location": "http://registry.test/x"})

    secure = HttpSource("https://registry.test", transport=httpx2.MockTransport(answer))
    fails(lambda: secure.index("0" * 64), "redirect")


def test_more_bytes_than_may_be(server: Server, monkeypatch):
    artifact = server.index.artifacts[0]
    fails(lambda: mock(lambda _: reply(200, bytes(artifact.frame_size + 1))).frame(artifact), "too_long")
    monkeypatch.setattr(server_source, "MAX_INDEX", 10)
    fails(lambda: mock(lambda _: reply(200, bytes(11))).index("0" * 64), "too_long")


def test_a_slow_drip_meets_the_deadline():
    class Drip(httpx2.SyncByteStream):
        def __iter__(self):
            for _ in range(1000):
                time.sleep(0.02)
                yield b"x"

    start = time.monotonic()
    fails(lambda: mock(lambda _: httpx2.Response(200, stream=Drip()), deadline_s=0.2).index("0" * 64), "deadline")
    assert time.monotonic() - start < 3


def test_channels_of_a_server_are_readable_but_confer_no_trust(server: Server):
    remote = mock(server)
    assert remote.channel("stable") == {"sm_120": server.index.digest}
    fails(lambda: mock(lambda _: reply(200, b"[]")).channel("stable"), "status")
    fails(lambda: remote.channel("../../etc"), "missing")
    for body in (b"[" * 100_000, b'{"indexes": []}', b'{"indexes": {"sm_120a": "x"}}'):
        fails(lambda body=body: mock(lambda _: reply(200, body)).channel("stable"), "status")


@pytest.mark.parametrize("url", ["http://a..b", "http://h\x01", "http://☃.☃☃"])
def test_urls_that_httpx_refuses(url):
    fails(lambda: HttpSource(url).index("0" * 64), "url")


@pytest.mark.parametrize(("name", "value"), [
    ("ALL_PROXY", "socks5://127.0.0.1:9"), ("ALL_PROXY", "gopher://x"), ("SSL_CERT_FILE", "/nope"),
    ("SSL_CERT_FILE", __file__),
])  # fmt: skip
def test_an_environment_that_httpx_refuses(monkeypatch, name, value):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, value)
    assert name.split("_")[-1] in fails(lambda: HttpSource("http://127.0.0.1:9").index("0" * 64), "client")


def test_connections_are_kept_and_closed(monkeypatch):
    made = []

    class Client(httpx2.Client):
        def __init__(self, **options):
            made.append(self)
            super().__init__(**options)

    monkeypatch.setattr(httpx2, "Client", Client)
    together = threading.Barrier(2)
    calls = threading.local()

    def answer(request):
        if not hasattr(calls, "seen"):
            calls.seen = together.wait(10)
        return reply(200, b"body")

    remote = mock(answer)
    threads = [threading.Thread(target=remote.index, args=("0" * 64,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    calls.seen = 0
    assert remote.index("0" * 64) == b"body" and len(made) == 2, "one client for each request at a time"
    CachedSource(remote, DiskCache("/nonexistent")).close()
    assert all(client.is_closed for client in made)
    assert remote.index("0" * 64) == b"body", "a call in flight finishes"
    assert len(made) == 3 and all(client.is_closed for client in made)


def test_without_httpx2(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(InstallError, match=r"cubinery\[remote\]"):
        HttpSource(URL).index("0" * 64)


# -- once with real sockets -------------------------------------------------------------------------------------------


DRIPS = {"header": b"HTTP/1.1 200 OK\r\nX-Slow: ", "body": b"HTTP/1.1 200 OK\r\n\r\n", "status": b"HTTP/1.1"}


@pytest.fixture(params=DRIPS)
def dripping(request) -> Iterator[str]:
    """A server that starts its answer, and then sends a byte now and then."""

    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(DRIPS[request.param])
                for _ in range(200):
                    time.sleep(0.05)
                    self.request.sendall(b" ")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_deadline_covers_every_phase(dripping: str):
    start = time.monotonic()
    fails(lambda: HttpSource(dripping, deadline_s=0.4).index("0" * 64), "deadline")
    assert time.monotonic() - start < 3


def test_the_deadline_covers_a_tls_handshake():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            with contextlib.suppress(OSError), server.accept()[0] as peer:
                peer.sendall(b"\x16\x03\x03\x3f\xff")  # a long handshake record
                for _ in range(200):
                    time.sleep(0.05)
                    peer.sendall(b"\x02")

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        fails(lambda: HttpSource(url, deadline_s=0.4).index("0" * 64), "deadline")
        assert time.monotonic() - start < 3


def test_a_static_server_over_loopback(backend: FakeBackend, tmp_path: Path):
    """Any static server with the same paths will do; then it goes, and a new process's state works from the cache."""
    index, frames = toy_index(only="bf16-d64")
    for kind, entries in (("indexes", {index.digest: index.to_bytes()}), ("blobs", frames)):
        folder = tmp_path / "mirror" / "v1" / kind / "sha256"
        folder.mkdir(parents=True)
        for digest, content in entries.items():
            (folder / digest).write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Quiet, directory=tmp_path / "mirror")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        settings = {"registry": f"http://127.0.0.1:{httpd.server_port}", "index": index.digest, "cache": tmp_path / "c"}
        runtime.configure(**settings)
        runtime.flash_attn(Q, Q, Q)
        httpd.shutdown()
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    assert len(backend.driver.launches) == 2
    runtime.configure(**settings | {"cache": tmp_path / "empty"})
    fails(lambda: runtime.flash_attn(Q, Q, Q), "unreachable")


# -- the disk cache ---------------------------------------------------------------------------------------------------

DATA = b"some frame"
DIGEST = sha256_hex(DATA)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(str(tmp_path / "deep" / "cache"))


def test_entries_are_whole_private_and_named_by_hash(cache: DiskCache):
    assert cache.get("blobs", DIGEST, 100) is None
    cache.put("blobs", DIGEST, DATA)
    assert cache.get("blobs", DIGEST, 100) == DATA and cache.get("indexes", DIGEST, 100) is None
    path = Path(cache.root, "v1", "blobs", "sha256", DIGEST[:2], DIGEST)
    assert path.read_bytes() == DATA and [p.name for p in path.parent.iterdir()] == [DIGEST]
    for folder in (Path(cache.root), *path.relative_to(cache.root).parents):
        assert stat.S_IMODE(Path(cache.root, folder).stat().st_mode) == 0o700
    cache.put("blobs", DIGEST, DATA)
    assert cache.get("blobs", DIGEST, 100) == DATA


def test_wrong_bytes_are_not_written(cache: DiskCache):
    cache.put("blobs", DIGEST, DATA + b"!")
    assert cache.get("blobs", DIGEST, 100) is None


def test_entries_that_are_links_foreign_or_too_long_are_misses(cache: DiskCache, tmp_path: Path):
    cache.put("blobs", DIGEST, DATA)
    path = Path(cache.path("blobs", DIGEST))
    assert cache.get("blobs", DIGEST, len(DATA) - 1) is None
    path.chmod(0o666)
    assert cache.get("blobs", DIGEST, 100) is None
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(DATA)
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.get("blobs", DIGEST, 100) is None
    cache.put("blobs", DIGEST, DATA)
    assert not path.is_symlink() and cache.get("blobs", DIGEST, 100) == DATA
    path.unlink()
    os.mkfifo(path, 0o600)
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.append(cache.get("blobs", DIGEST, 100)), daemon=True)
    thread.start()
    thread.join(10)
    assert found == [None], "nobody waits for a FIFO's writer"


def test_what_killed_processes_left_is_removed(cache: DiskCache):
    cache.put("blobs", DIGEST, DATA)
    folder = Path(cache.path("blobs", DIGEST)).parent
    old, new = folder / f"{DIGEST}.1.aa.tmp", folder / f"{DIGEST}.2.bb.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 90_000))
    cache.put("blobs", DIGEST, DATA)
    assert sorted(p.name for p in folder.iterdir()) == [DIGEST, new.name]


@pytest.mark.parametrize("kind", ["blobs", "indexes"])
def test_a_corrupt_entry_that_cannot_be_moved_is_passed_over(backend, server, tmp_path, monkeypatch, caplog, kind):
    settings = {"registry": URL, "index": server.index.digest, "cache": tmp_path / "cache"}
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    (entry,) = (tmp_path / "cache" / "v1" / kind).rglob("[0-9a-f]" * 64)
    entry.write_bytes(b"?" * entry.stat().st_size)

    def refuse(*_, **__):
        raise OSError(30, os.strerror(30))

    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse)
    asked = len(server.asked)
    runtime.configure(**settings)
    runtime.flash_attn(Q, Q, Q)
    assert len(server.asked) == asked + 1 and "passed over" in caplog.text
    server.frames = dict.fromkeys(server.frames, b"?")
    runtime.configure(**settings)
    if kind == "blobs":
        fails(lambda: runtime.flash_attn(Q, Q, Q), "size", IntegrityError)
        assert len(server.asked) == asked + 2, "the server is asked once more, not for ever"


@pytest.mark.parametrize("damage", ["writable", "link", "file"])
def test_a_cache_that_others_could_fill_is_refused(tmp_path: Path, damage):
    root = tmp_path / "cache"
    if damage == "writable":
        root.mkdir()
        root.chmod(0o777)
    elif damage == "link":
        (tmp_path / "real").mkdir()
        root.symlink_to(tmp_path / "real")
    else:
        root.touch()
    for ask in (lambda c: c.get("blobs", DIGEST, 9), lambda c: c.put("blobs", DIGEST, DATA)):
        assert "CUBINERY_CACHE" in fails(partial(ask, DiskCache(str(root))), "cache_owner")


def test_a_linked_folder_inside_is_not_written_through(cache: DiskCache, tmp_path: Path, caplog):
    (tmp_path / "outside").mkdir()
    Path(cache.root).mkdir(parents=True, mode=0o700)
    Path(cache.root, "v1").symlink_to(tmp_path / "outside")
    cache.put("blobs", DIGEST, DATA)
    assert not list((tmp_path / "outside").iterdir()) and "loading from memory" in caplog.text


@pytest.mark.parametrize("failure", [30, 28, 13])  # read-only file system, disk full, permission denied
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_cache_that_cannot_be_written_loads_from_memory(
    backend, server, tmp_path, monkeypatch, caplog, failure, call
):
    def refuse(*_, **__):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, call, refuse)
    runtime.configure(registry=URL, index=server.index.digest, cache=tmp_path / "cache")
    runtime.flash_attn(Q, Q, Q)
    monkeypatch.undo()
    assert len(backend.driver.launches) == 1
    assert caplog.text.count("loading from memory") == 1, "said once"
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != "locks"]
    assert not files, "nothing half-written stays"


def test_two_that_fetch_the_same_entry_agree(tmp_path: Path):
    cache = DiskCache(str(tmp_path / "cache"))
    threads = [threading.Thread(target=cache.put, args=("blobs", DIGEST, DATA)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get("blobs", DIGEST, 100) == DATA
    assert [p.name for p in Path(cache.path("blobs", DIGEST)).parent.iterdir()] == [DIGEST]


def test_the_embedded_registry_needs_no_cache(backend: FakeBackend, registry: Path, tmp_path: Path):
    runtime.configure(registry=registry, cache=tmp_path / "cache")
    runtime.flash_attn(Q, Q, Q)
    assert not (tmp_path / "cache").exists()
    assert not isinstance(session.current().source, CachedSource)
