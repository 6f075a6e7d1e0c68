"""registry.store: what goes in comes out, conflicts are refused, and every failure is typed."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest
from sqlite_utils.db import Database
from sqlite_utils.utils import OperationalError

from registry.contract import CubineryError, Index, Variant
from registry.store import (
    APPLICATION_ID,
    MIGRATIONS,
    SCHEMA,
    ConflictError,
    Store,
    StoreError,
    check_channel,
    compress,
    default_path,
)
from tests.registry.samples import KEYS, artifact, fill, index, ptx


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "registry.db") as opened:
        yield opened


def _pragma(path: Path, name: str):
    with sqlite3.connect(path) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_ptx_round_trips(store):
    sha256 = store.put_ptx("f", KEYS[0], ptx("é"), {"symbol": "s", "grid": {"tile_m": 128}})
    got = store.get_ptx("f")
    assert (got.variant, got.ptx, got.ptx_sha256) == (KEYS[0], ptx("é"), sha256)
    assert got.facts == {"symbol": "s", "grid": {"tile_m": 128}}
    assert store.ptx_text(sha256) == ptx("é")
    assert store.get_ptx("g") is None
    with pytest.raises(StoreError, match="no PTX") as caught:
        store.ptx_text("0" * 64)
    assert caught.value.reason == "not_found"


def test_artifacts_and_frames_round_trip(store):
    a, frame = artifact()
    store.put_artifact("f", a, frame)
    assert store.get_artifact("f") == a
    assert store.get_frame(a.frame_sha256) == frame
    assert store.artifacts() == {"f": a}
    assert store.get_artifact("g") is None
    assert store.get_frame("0" * 64) is None


def test_indexes_and_channels_round_trip(store):
    digests = fill(store)
    assert store.channel("stable") == digests
    assert store.channels() == {"stable": digests}
    assert store.indexes() == {digest: arch for arch, digest in digests.items()}
    body = store.get_index(digests["sm_120"])
    assert Index.from_bytes(body).digest == digests["sm_120"]
    assert store.get_index("0" * 64) is None
    assert store.channel("nightly") == {}
    assert store.verify() == []


def test_a_channel_moves_to_the_last_index_put(store):
    old = fill(store, KEYS[:2])
    new = fill(store, KEYS[:3], ("sm_120",))
    assert store.channel("stable") == {**old, **new} != old
    assert len(store.indexes()) == 3
    assert store.put_index(index([], "sm_90"), None) not in store.channel("stable").values()


def test_repeating_every_put_changes_nothing(store):
    fill(store)
    before = store.counts()
    fill(store)
    assert store.counts() == before


def test_equal_cubins_are_stored_once(store):
    one, frame = artifact(KEYS[0], content=b"same" * 100)
    store.put_artifact("a", one, frame)
    store.put_artifact("b", one.replace(variant=KEYS[1]), frame)
    assert store.counts()["artifacts"] == 2
    assert store.counts()["blobs"] == 1


@pytest.mark.parametrize("change", [{"ptx": "// other"}, {"facts": {"threads": 256}}, {"variant_key": KEYS[1]}])
def test_a_fingerprint_never_changes_its_ptx(store, change):
    given = {"variant_key": KEYS[0], "ptx": ptx("a"), "facts": {"threads": 128}}
    store.put_ptx("f", **given)
    before = store.counts()
    with pytest.raises(ConflictError, match="f is already stored") as caught:
        store.put_ptx("f", **{**given, **change})
    assert caught.value.reason == "conflict"
    assert (store.get_ptx("f").ptx, store.get_ptx("f").facts) == (given["ptx"], given["facts"])
    assert store.counts() == before


def test_a_fingerprint_never_changes_its_artifact(store):
    a, frame = artifact()
    store.put_artifact("f", a, frame)
    before = store.counts()
    for other in (artifact(content=b"other cubin"), (a.replace(registers=99), frame)):
        with pytest.raises(ConflictError, match=r"cubin_sha256|registers"):
            store.put_artifact("f", *other)
    assert store.get_artifact("f") == a
    assert store.counts() == before


def test_frames_must_be_what_the_artifact_says(store):
    a, frame = artifact()
    other = compress(b"other")
    wrong = [
        (a, frame[:-1]),
        (a, frame + b"\0"),
        (a, other),
        (a.replace(cubin_sha256="0" * 64), frame),
        (a.replace(cubin_size=a.cubin_size + 1), frame),
        (a.replace(frame_sha256="0" * 64), frame),
    ]
    for case in wrong:
        with pytest.raises(StoreError, match=a.variant.split("-")[0] + "|zstd") as caught:
            store.put_artifact("f", *case)
        assert caught.value.reason == "integrity"
    assert store.counts()["blobs"] == store.counts()["artifacts"] == 0


def test_an_index_needs_its_blobs_and_then_nothing_is_stored(store):
    a, frame = artifact()
    store.put_artifact("f", a, frame)
    missing, _ = artifact(KEYS[1])
    for artifacts in ([a, missing], [a.replace(cubin_size=1)]):
        with pytest.raises(StoreError, match="no blob") as caught:
            store.put_index(index(artifacts), "stable")
        assert caught.value.reason == "not_found"
    assert store.indexes() == store.channels() == {}


def test_nothing_outside_the_contract_is_stored(store):
    a, frame = artifact()
    with pytest.raises(CubineryError, match="threads"):
        store.put_artifact("f", a.replace(threads=0), frame)
    with pytest.raises(CubineryError, match="variant key"):
        store.put_ptx("f", "fwd", "", {})
    with pytest.raises(CubineryError, match="fingerprint"):
        store.put_ptx("", KEYS[0], "", {})
    assert set(store.counts().values()) == {0}


@pytest.mark.parametrize("name", ["", "Stable", "../x", ".hidden", "a/b", "a" * 65, "a\n", "<b>", None])
def test_channel_names_are_plain(store, name):
    with pytest.raises(StoreError) as caught:
        check_channel(name)
    assert caught.value.reason == "argument"
    if name is not None:
        with pytest.raises(StoreError):
            store.put_index(index([]), name)
    assert store.indexes() == {}


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_new_file_is_in_the_form_that_readers_count_on(tmp_path):
    path = tmp_path / "new" / "folder" / "registry.db"
    old = os.umask(0)
    try:
        with Store(path) as store:
            fill(store)
            modes = {
                p.name: p.stat().st_mode & 0o777 for p in [*path.parent.iterdir(), path.parent, path.parent.parent]
            }
    finally:
        os.umask(old)
    assert set(modes) == {"registry.db", "registry.db-wal", "registry.db-shm", "folder", "new"}
    assert all(mode & 0o022 == 0 for mode in modes.values()), modes  # the runtime trusts no other
    assert sorted(p.name for p in path.parent.iterdir()) == ["registry.db"]  # closing folds the -wal in
    assert _pragma(path, "journal_mode") == "wal"
    assert _pragma(path, "page_size") == 8192
    assert _pragma(path, "application_id") == APPLICATION_ID
    assert _pragma(path, "user_version") == SCHEMA == len(MIGRATIONS._migrations)


def test_every_commit_is_synchronous_and_references_are_enforced(store):
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert store._db.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    assert store._db.execute("PRAGMA busy_timeout").fetchone()[0] == 30_000


def test_the_standard_library_reads_it(tmp_path):
    """As the runtime does, without sqlite-utils."""
    with Store(tmp_path / "r.db") as store:
        digests = fill(store)
        with sqlite3.connect(f"file:{tmp_path}/r.db?mode=ro", uri=True) as connection:
            row = connection.execute("SELECT arch, digest FROM channels WHERE name = 'stable' ORDER BY arch").fetchall()
        connection.close()
    assert dict(row) == digests


def test_a_reader_sees_what_a_writer_commits_and_cannot_write(tmp_path):
    with Store(tmp_path / "r.db") as writer, Store(tmp_path / "r.db", readonly=True) as reader:
        assert reader.channels() == {}
        digests = fill(writer)
        assert reader.channel("stable") == digests
        assert reader.verify() == []
        with pytest.raises(StoreError) as caught:
            reader.put_index(index([]), None)
        assert caught.value.reason == "readonly"


def test_a_failed_transaction_leaves_the_store_usable(store, monkeypatch):
    a, frame = artifact()
    broken = "registry.store._insert_blob"
    with monkeypatch.context() as patch:
        patch.setattr(broken, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.put_artifact("f", a, frame)
    assert store.get_artifact("f") is None
    store.put_artifact("f", a, frame)
    assert store.get_artifact("f") == a


def test_a_writer_that_waits_too_long_says_busy(tmp_path):
    with Store(tmp_path / "r.db") as holder, Store(tmp_path / "r.db", busy_timeout_s=0.05) as waiter:
        with holder._write():
            with pytest.raises(StoreError, match=r"r\.db") as caught:
                waiter.put_index(index([]), None)
            assert caught.value.reason == "busy"
        waiter.put_index(index([]), None)


def test_the_switch_to_wal_is_tried_again_while_others_make_it(tmp_path, monkeypatch):
    """SQLite fails it at once, without waiting, when two processes open a new file in the same instant."""
    execute, refused = Database.execute, []

    def execute_refusing_once(self, sql, parameters=None):
        if "journal_mode" in sql and not refused:
            refused.append(OperationalError("database is locked"))
            refused[0].sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise refused[0]
        return execute(self, sql, parameters)

    monkeypatch.setattr(Database, "execute", execute_refusing_once)
    with Store(tmp_path / "r.db") as store:
        assert store.channels() == {}
    assert refused
    assert _pragma(tmp_path / "r.db", "journal_mode") == "wal"


def _other_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE history (url TEXT)")
    connection.close()


def _newer(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"something else entirely" * 100), "not_a_registry"),
        (_other_program, "not_a_registry"),
        (_newer, "newer"),
        (lambda path: path.mkdir(), "not_a_registry"),
    ],
    ids=["garbage", "other program", "newer schema", "folder"],
)
@pytest.mark.parametrize("readonly", [True, False])
def test_files_that_are_not_ours_are_refused_and_left_as_they_are(tmp_path, make, reason, readonly):
    path = tmp_path / "r.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match=r"r\.db") as caught:
        Store(path, readonly=readonly)
    assert caught.value.reason == reason
    assert not path.is_file() or path.read_bytes() == before


def test_readonly_needs_a_registry(tmp_path):
    with pytest.raises(StoreError, match="builder") as caught:
        Store(tmp_path / "none.db", readonly=True)
    assert caught.value.reason == "missing"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.db").touch()
    with pytest.raises(StoreError, match="no tables yet") as caught:
        Store(tmp_path / "empty.db", readonly=True)
    assert caught.value.reason == "empty"
    Store(tmp_path / "empty.db").close()
    Store(tmp_path / "empty.db", readonly=True).close()


def test_paths_with_odd_characters(tmp_path):
    path = tmp_path / "a b?mode=memory#%41 é.db"
    with Store(path) as store:
        fill(store)
    with Store(path, readonly=True) as store:
        assert store.verify() == []
    assert path.is_file()


def test_damaged_rows_are_typed(store):
    a, frame = artifact()
    store.put_artifact("f", a, frame)
    store.put_ptx("p", KEYS[0], ptx("a"), {})
    store._db.execute("UPDATE artifacts SET json = ?", ["{}"])
    store._db.execute("UPDATE blobs SET frame = ? WHERE size = ?", [compress(b"x" * len(ptx("a"))), len(ptx("a"))])
    for call, reason in ((lambda: store.get_artifact("f"), "corrupt"), (lambda: store.get_ptx("p"), "integrity")):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.reason == reason


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for value in ("", "https://registry.example", str(tmp_path)):
        monkeypatch.setenv("CUBINERY_REGISTRY", value)
        assert default_path() == tmp_path / "cubinery" / "registry.db"
    monkeypatch.setenv("CUBINERY_REGISTRY", str(tmp_path / "mine.db"))
    assert default_path() == tmp_path / "mine.db"


def test_facts_are_stored_as_canonical_json(store):
    store.put_ptx("f", KEYS[0], "", {"b": 1, "a": 2})
    assert store._db.execute("SELECT facts FROM ptx").fetchone()[0] == '{"a":2,"b":1}'
    store.put_ptx("f", KEYS[0], "", {"a": 2, "b": 1})
    assert json.loads('{"a":2,"b":1}') == store.get_ptx("f").facts
    assert Variant.parse(store.get_ptx("f").variant).key == KEYS[0]
