"""Where bytes come from: the embedded file, servers good and bad, and the disk cache in front of them."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch

import runtime
from registry.contract import sha256_hex
from registry.store import Store
from runtime import session, source
from runtime.cache import DiskCache
from runtime.errors import InstallError, IntegrityError, SourceError, UntrustedError
from runtime.source import CachedSource, EmbeddedSource, HttpSource
from tests.runtime.fakes import FakeBackend, toy_index, write_registry

Q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
URL = "http://registry.test"


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
import os, sys
from runtime.source import EmbeddedSource
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


# -- servers, without sockets -----------------------------------------------------------------------------------------


def reply(status: int, body: bytes) -> httpx2.Response:
    """As from a socket: a body that can be read once."""
    return httpx2.Response(status, stream=httpx2.ByteStream(body))


class Server:
    """A mock registry server; `answer` may be replaced to misbehave."""

    def __init__(self, **options):
        self.index, self.frames = toy_index("sm_120", **options)
        self.asked: list[str] = []
        self.down = False

    def __call__(self, request):
        path = request.url.path
        self.asked.append(path)
        if self.down:
            raise httpx2.ConnectError("refused")
        *_, digest = path.split("/")
        if path == f"/v1/indexes/sha256/{self.index.digest}":
            return reply(200, self.index.to_bytes())
        if path.startswith("/v1/blobs/sha256/") and digest in self.frames:
            return reply(200, self.frames[digest])
        if path == "/v1/channels/stable":
            body = {"name": "stable", "indexes": {"sm_120": self.index.digest}}
            return reply(200, json.dumps(body).encode())
        return httpx2.Response(404)


@pytest.fixture
def server(monkeypatch):
    """A server at URL for everything that opens an HttpSource."""
    made = Server(only="bf16-d64")
    monkeypatch.setattr(source, "HttpSource", partial(HttpSource, transport=httpx2.MockTransport(made)))
    monkeypatch.setattr(source, "BACKOFF_S", 0.001)
    return made


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
    assert URL in message and len(server.asked) == source.ATTEMPTS
    runtime.configure(registry=URL, index=server.index.digest, cache=tmp_path / "cache", offline=True)
    assert "prefetch" in fails(lambda: runtime.flash_attn(Q, Q, Q), "offline")
    assert len(server.asked) == source.ATTEMPTS


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
    monkeypatch.setattr(source, "BACKOFF_S", 0.001)
    answers = [httpx2.Response(503), httpx2.ReadError("reset"), reply(200, b"body")]

    def answer(request):
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    assert mock(answer).index("0" * 64) == b"body"
    fails(lambda: mock(lambda _: httpx2.Response(500)).index("0" * 64), "status")


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
    ("file:///etc/passwd", False),
])  # fmt: skip
def test_redirects_stay_on_their_origin(target, followed):
    def answer(request):
        if request.url.path == "/moved":
            return reply(200, b"body")
        return httpx2.Response(302, headers={"location": target})

    if followed:
        assert mock(answer).index("0" * 64) == b"body"
    else:
        fails(lambda: mock(answer).index("0" * 64), "redirect")
    fails(lambda: mock(lambda _: httpx2.Response(302, headers={"location": "/loop"})).index("0" * 64), "redirect")


def test_https_never_falls_back_to_http():
    answer = lambda _: httpx2.Response(301, headers={"location": "http://registry.test/x"})  # noqa: E731
    secure = HttpSource("https://registry.test", transport=httpx2.MockTransport(answer))
    fails(lambda: secure.index("0" * 64), "redirect")


def test_more_bytes_than_may_be(server: Server, monkeypatch):
    artifact = server.index.artifacts[0]
    fails(lambda: mock(lambda _: reply(200, bytes(artifact.frame_size + 1))).frame(artifact), "too_long")
    monkeypatch.setattr(source, "MAX_INDEX", 10)
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


def test_without_httpx2(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(InstallError, match=r"cubinery\[remote\]"):
        HttpSource(URL).index("0" * 64)


# -- once with real sockets -------------------------------------------------------------------------------------------


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
    os.mkfifo(path)
    path.chmod(0o600)


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
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()], "nothing half-written stays"


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
