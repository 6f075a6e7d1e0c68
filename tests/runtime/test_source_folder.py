"""A mirror's folder as a source; and files below v1/tuf/ from every source."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch

import runtime
from registry.contract import OpenIndex
from registry.export import to_folder
from registry.store import Store
from runtime.errors import IntegrityError, SourceError, UntrustedError
from runtime.load import session
from runtime.sources import answers, folder
from runtime.sources import source as embedded
from runtime.sources.cache import DiskCache
from runtime.sources.folder import FolderSource
from runtime.sources.remote import CachedSource, HttpSource, OfflineSource
from runtime.sources.source import EmbeddedSource
from tests.runtime.fakes import FakeBackend, toy_index

Q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
ROOT = Path(__file__).parents[2]
TUF = {"1.root.json": b"root", "timestamp.json": b"time", f"targets/{'a' * 64}.stable.json": b"target"}


def fails(ask, reason: str, kind=SourceError) -> str:
    with pytest.raises(kind) as error:
        ask()
    assert error.value.reason == reason, error.value
    return str(error.value)


@pytest.fixture
def mirror(registry: Path, tmp_path: Path) -> Path:
    """What `python -m registry export` makes of the test's registry, which has TUF files."""
    with Store(registry) as store:
        store.put_tuf(TUF)
        to_folder(store, tmp_path / "mirror")
    return tmp_path / "mirror"


def test_it_gives_what_the_registry_holds(registry: Path, mirror: Path):
    here, there = FolderSource(str(mirror)), EmbeddedSource(str(registry))
    assert here.channel("stable") == there.channel("stable")
    (digest,) = here.channel("stable").values()
    assert here.index(digest) == there.index(digest)
    index, frames = toy_index()
    assert all(here.frame(a) == frames[a.frame_sha256] for a in index.artifacts)
    assert {path: here.tuf(path, 100) for path in TUF} == {path: there.tuf(path, 100) for path in TUF} == TUF
    assert here.where == str(mirror) and here.discard("blobs", "0" * 64) is False
    here.close()
    assert here.index(digest), "a source may be used after close"


def test_calls_are_served_from_a_pinned_mirror_without_a_disk_cache(backend: FakeBackend, mirror: Path, tmp_path: Path):
    (digest,) = FolderSource(str(mirror)).channel("stable").values()
    runtime.configure(registry=mirror, index=digest, cache=tmp_path / "cache")
    runtime.flash_attn(Q, Q, Q)
    assert len(backend.driver.launches) == 1
    assert isinstance(session.current().source, FolderSource) and not (tmp_path / "cache").exists()


def test_a_mirror_is_remote_whoever_owns_it(backend: FakeBackend, mirror: Path):
    runtime.configure(registry=mirror)
    with pytest.raises(UntrustedError):
        runtime.flash_attn(Q, Q, Q)


def test_offline_reads_a_mirror_too(backend: FakeBackend, mirror: Path):
    (digest,) = FolderSource(str(mirror)).channel("stable").values()
    runtime.configure(registry=f"{mirror}/", index=digest, offline=True)
    runtime.flash_attn(Q, Q, Q)
    assert len(backend.driver.launches) == 1


def test_what_is_missing_is_named(mirror: Path, tmp_path: Path):
    here = FolderSource(str(mirror))
    fails(lambda: here.channel("nope"), "no_channel")
    fails(lambda: here.index("0" * 64), "missing")
    fails(lambda: here.tuf("2.root.json", 100), "missing")
    artifact = toy_index()[0].artifacts[0]
    assert artifact.variant in fails(lambda: here.frame(artifact.replace(frame_sha256="0" * 64)), "missing")
    for path in (tmp_path / "none", mirror / "v1" / "channels" / "stable"):  # absent, and a file
        assert "registry export" in fails(lambda path=path: FolderSource(str(path)).channel("stable"), "no_registry")


def test_a_path_with_a_slash_is_a_folder_though_nothing_is_there(tmp_path: Path):
    runtime.configure(registry=f"{tmp_path}/none/", index="0" * 64)
    assert isinstance(session.current().source, FolderSource)
    runtime.configure(registry=tmp_path / "none", index="0" * 64)
    assert isinstance(session.current().source, EmbeddedSource)


NAMES = ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\0b", "A", "x" * 65, "targets", "%2e%2e", "stable\n"]


def test_no_name_leads_out_of_the_folder(mirror: Path):
    (mirror / "x").write_text(json.dumps({"indexes": {"sm_120": "0" * 64}}))
    for name in NAMES:
        fails(lambda name=name: FolderSource(str(mirror)).channel(name), "no_channel")


PATHS = ["../x", "..", ".", "", "/etc/passwd", "targets/../x", "targets/a/b", "targets/", "a\0b", "x/y", ".hidden"]


def test_no_tuf_path_leads_anywhere_else(registry: Path, mirror: Path):
    (mirror / "v1" / "x").write_text("outside")
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(200, stream=httpx2.ByteStream(b"x"))

    http_ = HttpSource("http://registry.test", transport=httpx2.MockTransport(answer))
    for made in (FolderSource(str(mirror)), EmbeddedSource(str(registry)), http_):
        for path in PATHS:
            fails(lambda made=made, path=path: made.tuf(path, 100), "missing")
    assert not asked


BODIES = [
    b"", b"[]", b"{", b'{"indexes": 1}', b'{"indexes": {"sm_120": "x"}}', b'{"indexes": {"x": "' + b"0" * 64 + b'"}}',
    b"\xff", b"[" * 100_000,
]  # fmt: skip


def test_what_is_no_channel_document(mirror: Path):
    for body in BODIES:
        (mirror / "v1" / "channels" / "stable").write_bytes(body)
        fails(lambda: FolderSource(str(mirror)).channel("stable"), "unreadable")


def test_no_file_costs_more_than_it_may(mirror: Path, monkeypatch):
    here = FolderSource(str(mirror))
    (digest,) = here.channel("stable").values()
    artifact = toy_index()[0].artifacts[0]
    with open(mirror / "v1" / "blobs" / "sha256" / artifact.frame_sha256, "ab") as file:
        file.truncate(1 << 40)  # a hole, which costs no disk: only memory, were it read
    fails(lambda: here.frame(artifact), "too_long")
    fails(lambda: here.tuf("timestamp.json", 3), "too_long")
    assert here.tuf("timestamp.json", 4) == b"time"
    monkeypatch.setattr(folder, "MAX_INDEX", 10)
    fails(lambda: here.index(digest), "too_long")
    monkeypatch.setattr(folder, "MAX_CHANNEL", 10)
    fails(lambda: here.channel("stable"), "too_long")
    assert answers.MAX_INDEX == embedded.MAX_INDEX


def test_only_regular_files_are_read_and_links_lead_to_bytes_that_are_verified(mirror: Path):
    here, path = FolderSource(str(mirror)), mirror / "v1" / "channels" / "stable"
    body = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    fails(lambda: here.channel("stable"), "unreadable")  # and does not wait for a writer
    path.unlink()
    path.mkdir()
    fails(lambda: here.channel("stable"), "unreadable")
    path.rmdir()
    (mirror / "elsewhere").write_bytes(body)
    path.symlink_to(mirror / "elsewhere")
    (digest,) = here.channel("stable").values()
    index = mirror / "v1" / "indexes" / "sha256" / digest
    index.unlink()
    index.symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError):
        OpenIndex(here.index(digest), digest)
    index.unlink()
    index.symlink_to("/dev/zero")
    fails(lambda: here.index(digest), "unreadable")


READ_AS_NOBODY = """
import os, sys
from runtime.sources.folder import FolderSource
from runtime.errors import SourceError
if os.geteuid() == 0: os.setuid(65534)
try: FolderSource(sys.argv[1]).channel("stable")
except SourceError as error: print(error.reason)
"""


def test_a_file_that_may_not_be_read(mirror: Path):
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: another user must get there
        shutil.copytree(mirror, f"{name}/m")
        Path(name).chmod(0o755)
        Path(name, "m/v1/channels/stable").chmod(0)
        command = [sys.executable, "-c", READ_AS_NOBODY, f"{name}/m"]
        assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == "unreadable\n"


# -- files below v1/tuf/ ----------------------------------------------------------------------------------------------


def test_a_file_gives_them_bounded_and_a_table_only(registry: Path, mirror: Path):
    here = EmbeddedSource(str(registry))
    fails(lambda: here.tuf("2.root.json", 100), "missing")
    fails(lambda: here.tuf("timestamp.json", 3), "too_long")
    with sqlite3.connect(registry) as db:
        db.execute("UPDATE tuf SET body = zeroblob(1000000)")
    db.close()
    fails(lambda: here.tuf("timestamp.json", 100), "too_long")
    with sqlite3.connect(registry) as db:
        db.execute("DROP TABLE tuf")
        db.execute("CREATE VIEW tuf AS SELECT 'timestamp.json' AS path, x'00' AS body")
    db.close()
    fails(lambda: here.tuf("timestamp.json", 100), "missing")


@pytest.fixture
def served(mirror: Path) -> Iterator[str]:
    """A mirror's folder behind Python's own static server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(mirror)))
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_any_static_server_serves_a_mirror(backend: FakeBackend, registry: Path, served: str, tmp_path: Path):
    there = HttpSource(served)
    assert {path: there.tuf(path, 100) for path in TUF} == TUF
    fails(lambda: there.tuf("2.root.json", 100), "missing")
    fails(lambda: there.tuf("timestamp.json", 3), "too_long")
    assert there.channel("stable") == EmbeddedSource(str(registry)).channel("stable")
    (digest,) = there.channel("stable").values()
    there.close()
    assert CachedSource(there, DiskCache(str(tmp_path / "c"))).tuf("timestamp.json", 100) == b"time"
    runtime.configure(registry=served, index=digest, cache=tmp_path / "cache")
    runtime.flash_attn(Q, Q, Q)
    assert len(backend.driver.launches) == 1


def test_offline_there_is_no_metadata(tmp_path: Path):
    fails(lambda: OfflineSource("http://registry.test").tuf("timestamp.json", 100), "offline")
