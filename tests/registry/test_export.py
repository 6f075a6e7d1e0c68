"""Exports and backups: whole, in order, incremental, of one moment, and readable where nothing can be written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from registry import export, files
from registry.contract import Index, is_part, sha256_hex
from registry.export import backup, to_file, to_folder
from registry.store import Store, StoreError
from tests.registry.releases import keys, one_index, release
from tests.registry.samples import KEYS, fill, ptx

ROOT = Path(__file__).parents[2]

READ_AS_NOBODY = """
import os, sqlite3, sys
from runtime.sources.source import EmbeddedSource
if os.geteuid() == 0: os.setuid(65534)
print(EmbeddedSource(sys.argv[1]).channel("stable")["sm_120"])
"""


@pytest.fixture
def store(tmp_path):
    """With one signed channel, 'stable', for two architectures, and a newer index that is not signed."""
    with Store(tmp_path / "r.db") as store:
        fill(store)
        keys(store, tmp_path / "keys")
        release(store, tmp_path / "keys")
        one_index(store, "nightly", "nightly")
        yield store


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def whole(folder: Path) -> None:
    """Every file of a mirror is what its name says, and what it names is there."""
    for kind in ("blobs", "indexes"):
        for path in (folder / "v1" / kind / "sha256").glob("*"):
            assert sha256_hex(path.read_bytes()) == path.name
    indexes = {path.name: path.read_bytes() for path in (folder / "v1" / "indexes" / "sha256").glob("*")}
    for body in indexes.values():
        for a in () if is_part(body) else Index.from_bytes(body, indexes.get).artifacts:
            assert (folder / "v1" / "blobs" / "sha256" / a.frame_sha256).stat().st_size == a.frame_size
    for path in (folder / "v1" / "channels").glob("*"):
        for digest in json.loads(path.read_bytes())["indexes"].values():
            assert (folder / "v1" / "indexes" / "sha256" / digest).exists()


# -- a mirror's folder ------------------------------------------------------------------------------------------------


def test_a_mirror_has_what_a_server_has_at_the_same_paths(store, tmp_path):
    done = to_folder(store, tmp_path / "m")
    found = tree(tmp_path / "m")
    assert (done.files, done.unchanged, done.bytes) == (len(found), 0, sum(map(len, found.values())))
    for digest in store.indexes():
        assert found[f"v1/indexes/sha256/{digest}"] == store.get_index(digest)
        for a in store.index(digest).artifacts:
            assert found[f"v1/blobs/sha256/{a.frame_sha256}"] == store.get_frame(a.frame_sha256)
    for name, indexes in store.channels().items():
        assert json.loads(found[f"v1/channels/{name}"]) == {"name": name, "indexes": indexes}
    assert {p.removeprefix("v1/tuf/"): b for p, b in found.items() if p.startswith("v1/tuf/")} == {
        path: store.tuf(path) for path in store.tuf_paths()
    }
    texts = {sha256_hex(ptx(key).encode()) for key in KEYS}
    assert len(found) == done.blobs + done.indexes + done.tuf + done.channels
    assert not texts & {sha256_hex(body) for body in found.values()}, "PTX stays at home"
    assert all((tmp_path / "m" / p).stat().st_mode & 0o777 == 0o644 for p in found)
    whole(tmp_path / "m")


def test_again_writes_only_what_is_new_and_removes_nothing(store, tmp_path):
    first = to_folder(store, tmp_path / "m")
    again = to_folder(store, tmp_path / "m")
    assert (again.files, again.bytes, again.unchanged) == (0, 0, first.files)
    before = tree(tmp_path / "m")
    index = one_index(store, "newer", "nightly")
    more = to_folder(store, tmp_path / "m")
    changed = {path for path, body in tree(tmp_path / "m").items() if before.get(path) != body}
    (a,) = index.artifacts
    assert changed == {
        f"v1/blobs/sha256/{a.frame_sha256}", f"v1/indexes/sha256/{index.digest}", "v1/channels/nightly"
    }  # fmt: skip
    assert more.files == 3 and before.keys() <= tree(tmp_path / "m").keys()


def test_files_that_lost_bytes_are_written_anew(store, tmp_path):
    to_folder(store, tmp_path / "m")
    before = tree(tmp_path / "m")
    for path in before:
        os.truncate(tmp_path / "m" / path, 7)
    assert to_folder(store, tmp_path / "m").unchanged == 0
    assert tree(tmp_path / "m") == before


def test_what_names_a_file_is_written_after_it(store, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(export, "write", lambda path, data, at: (written.append(path), files.write(path, data, at)))
    synced = []
    monkeypatch.setattr(export, "sync", lambda path: (synced.append((len(written), path)), files.sync(path)))
    to_folder(store, tmp_path / "m")
    names = [str(path.relative_to(tmp_path / "m" / "v1")) for path in written]
    kinds = list(dict.fromkeys(name.split("/")[0] for name in names))
    assert kinds == ["blobs", "indexes", "tuf", "channels"]
    metadata = [name.removeprefix("tuf/") for name in names if name.startswith("tuf/")]
    assert metadata[0].startswith("targets/")
    assert metadata[1:] == ["1.targets.json", "1.snapshot.json", "1.root.json", "timestamp.json"]
    for kind in ("blobs/sha256", "indexes/sha256", "tuf/targets", "tuf", "channels"):
        last = max(n for n, path in enumerate(written) if path.parent == tmp_path / "m" / "v1" / kind)
        assert (last + 1, tmp_path / "m" / "v1" / kind) in synced, "on disk before the next kind begins"


def test_two_exports_to_one_folder_take_turns(store, tmp_path):
    """The later one reads the registry only when it has its turn: a mirror never goes back."""
    with export._locked(tmp_path / "m" / "v1"):
        (tmp_path / "m" / "v1" / ".partial" / "left").touch()
        thread = threading.Thread(target=lambda: to_folder_of(tmp_path))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not (tmp_path / "m" / "v1" / "blobs").exists()
        index = one_index(store, "meanwhile")
    thread.join(20)
    assert (tmp_path / "m" / "v1" / "indexes" / "sha256" / index.digest).exists()
    assert list((tmp_path / "m" / "v1" / ".partial").iterdir()) == [], "what a killed export left is gone"


def to_folder_of(tmp_path: Path) -> None:
    with Store(tmp_path / "r.db", readonly=True) as store:
        to_folder(store, tmp_path / "m")


def test_an_export_is_of_one_moment(store, tmp_path, monkeypatch):
    """What others write and forget meanwhile is not in it."""
    before, timestamp = store.channels(), store.tuf("timestamp.json")

    def write(path, data, at):
        if path.parent.name == "sha256" and not started:
            started.append(one_index(store, "meanwhile"))
            store.put_tuf({"timestamp.json": b"newer"})
        files.write(path, data, at)

    started: list[Index] = []
    monkeypatch.setattr(export, "write", write)
    with Store(store.path, readonly=True) as reader:
        to_folder(reader, tmp_path / "m")
    assert started and store.channel("stable")["sm_120"] == started[0].digest
    found = {p.name: json.loads(p.read_bytes())["indexes"] for p in (tmp_path / "m" / "v1" / "channels").iterdir()}
    assert found == before and (tmp_path / "m" / "v1" / "tuf" / "timestamp.json").read_bytes() == timestamp
    whole(tmp_path / "m")


def test_only_some_channels_and_architectures(store, tmp_path):
    old = store.channel("stable")
    store.put_index(store.index(old["sm_120"]), "also")
    to_folder(store, tmp_path / "stable", channels=["stable"])
    assert {p.name for p in (tmp_path / "stable" / "v1" / "indexes" / "sha256").iterdir()} == set(old.values())
    assert os.listdir(tmp_path / "stable" / "v1" / "channels") == ["stable"]
    to_folder(store, tmp_path / "one", channels=["stable"], archs=["sm_90"])
    (path,) = (tmp_path / "one" / "v1" / "channels").iterdir()
    assert json.loads(path.read_bytes()) == {"name": "stable", "indexes": {"sm_90": old["sm_90"]}}
    with pytest.raises(StoreError, match="there are: also, nightly, stable") as caught:
        to_folder(store, tmp_path / "none", channels=["nope"])
    assert caught.value.reason == "not_found"
    newer = one_index(store, "newer").digest  # the registry's channel moves on, the signed one does not
    to_folder(store, tmp_path / "both", channels=["stable"])
    assert {p.name for p in (tmp_path / "both" / "v1" / "indexes" / "sha256").iterdir()} == {newer, *old.values()}


# -- one file ---------------------------------------------------------------------------------------------------------


def test_a_file_for_read_only_images(store, tmp_path):
    path = tmp_path / "image" / "release.db"
    path.parent.mkdir()
    to_file(store, path, channels=["stable"])
    assert path.read_bytes()[18:20] == b"\x01\x01", "not in WAL mode"
    assert path.stat().st_mode & 0o777 == 0o644 and os.listdir(path.parent) == ["release.db"]
    with Store(path, readonly=True) as copy:
        assert copy.verify() == []
        assert copy.channels() == {"stable": store.channel("stable")}
        assert {p: copy.tuf(p) for p in copy.tuf_paths()} == {p: store.tuf(p) for p in store.tuf_paths()}
        assert set(copy.indexes()) == set(store.channel("stable").values())
        assert copy.counts()["ptx"] == copy.counts()["artifacts"] == 0
        assert copy.counts()["blobs"] == 6
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: another user must get there
        folder = Path(name)
        shutil.copy(path, folder)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", READ_AS_NOBODY, str(folder / "release.db")], capture_output=True, text=True, cwd=ROOT
        )
        folder.chmod(0o755)
    assert (done.stdout.strip(), done.stderr) == (store.channel("stable")["sm_120"], "")


def test_it_becomes_a_registry_again_when_it_is_written(store, tmp_path):
    to_file(store, tmp_path / "x.db")
    with Store(tmp_path / "x.db") as copy:
        one_index(copy, "more")
        assert copy.verify() == []


@pytest.mark.parametrize("make", [to_file, backup])
def test_the_old_file_stays_until_the_new_one_is_whole(store, tmp_path, monkeypatch, make):
    target = tmp_path / "x.db"
    target.write_bytes(b"the one before")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StoreError) as caught:
            make(store, target)
    assert caught.value.reason == "full"
    assert target.read_bytes() == b"the one before"
    assert not list(tmp_path.glob(".x.db.*"))
    make(store, target)
    with Store(target, readonly=True) as copy:
        assert copy.verify() == []


def test_what_killed_exports_left_goes_a_day_later(store, tmp_path):
    for name, age in (("old", 2 * files.STALE_S), ("young", 0)):
        folder = tmp_path / f".x.db.{name}.partial"
        folder.mkdir()
        (folder / "x.db").touch()
        os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    to_file(store, tmp_path / "x.db")
    assert [p.name for p in tmp_path.glob(".x.db.*")] == [".x.db.young.partial"]


@pytest.mark.parametrize("make", [to_file, backup])
def test_targets_that_cannot_be_meant(store, tmp_path, make):
    (tmp_path / "link.db").symlink_to(store.path)
    (tmp_path / "used.db-wal").touch()
    for target, reason in (
        (store.path, "argument"),
        (tmp_path / "link.db", "argument"),
        (tmp_path, "argument"),
        (tmp_path / "used.db", "busy"),
        (tmp_path / "no" / "folder.db", "missing"),
    ):
        with pytest.raises(StoreError) as caught:
            make(store, target)
        assert caught.value.reason == reason, target
    assert store.verify() == []


# -- backups ----------------------------------------------------------------------------------------------------------


def test_a_backup_holds_everything_and_is_compact(store, tmp_path):
    size = backup(store, tmp_path / "b.db")
    assert size == (tmp_path / "b.db").stat().st_size and (tmp_path / "b.db").read_bytes()[18:20] == b"\x01\x01"
    with Store(tmp_path / "b.db") as copy:  # as restoring it does
        assert copy.verify() == [] and copy.counts() == store.counts()
        assert copy.history("stable") == store.history("stable")
        assert copy.tuf_paths() == store.tuf_paths() and copy.artifacts() == store.artifacts()


def test_a_damaged_registry_gives_no_backup(store, tmp_path):
    backup(store, tmp_path / "b.db")
    before = (tmp_path / "b.db").read_bytes()
    store._db.execute("UPDATE blobs SET frame = CAST(frame || x'00' AS BLOB)")
    with pytest.raises(StoreError, match="left as it is") as caught:
        backup(store, tmp_path / "b.db")
    assert caught.value.reason == "corrupt" and (tmp_path / "b.db").read_bytes() == before


def test_a_backup_while_a_builder_writes(store, tmp_path):
    writer = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py")), "write", str(store.path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert writer.stdout.readline()
        seen = set()
        for n in range(5):
            backup(store, tmp_path / f"{n}.db")
            with sqlite3.connect(tmp_path / f"{n}.db") as db:
                seen.add(db.execute("SELECT count(*) FROM indexes").fetchone()[0])
            db.close()
    finally:
        writer.kill()
        writer.communicate()
    assert len(seen) > 1
