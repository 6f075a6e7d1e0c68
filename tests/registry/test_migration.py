"""A file of an older schema: read as it is, brought up when it is opened for writing."""

from __future__ import annotations

import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from sqlite_utils.db import Database

from registry import gc
from registry.export import backup, to_file
from registry.schema import APPLICATION_ID, m001_tables
from registry.store import SCHEMA, Store, StoreError
from runtime.errors import SourceError
from runtime.sources.source import EmbeddedSource
from tests.registry.samples import fill


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """What a release before this one wrote: schema 1, WAL."""
    new, path = tmp_path / "new.db", tmp_path / "old.db"
    with Store(new) as store:
        fill(store)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        db = Database(connection)
        m001_tables(db)
        db.execute(
            "CREATE TABLE _sqlite_migrations (id INTEGER PRIMARY KEY, migration_set TEXT, name TEXT, applied_at TEXT)"
        )
        db.execute("INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('cubinery', 'm001_tables')")
        connection.execute("ATTACH ? AS new", [str(new)])
        for table, columns in {
            "blobs": "sha256, frame, size, content_sha256",
            "ptx": "fingerprint, variant, ptx_sha256, frame_sha256, facts",
            "artifacts": "fingerprint, variant, arch, json",
            "indexes": "digest, arch, body",
            "channels": "name, arch, digest",
        }.items():
            connection.execute(f"INSERT INTO main.{table} SELECT {columns} FROM new.{table}")
    connection.close()
    return path


def test_the_runtime_and_readers_take_it_as_it_is(old, tmp_path):
    before = old.read_bytes()
    with Store(tmp_path / "new.db", readonly=True) as new, Store(old, readonly=True) as store:
        assert store.channels() == new.channels() and store.indexes() == new.indexes()
        assert store.tuf("timestamp.json") is None and store.tuf_paths() == [] and store.history("stable") == []
        assert store.verify() == [] and store.counts() == new.counts()
        (digest, *_) = store.channel("stable").values()
        source = EmbeddedSource(str(old))
        assert source.channel("stable") == store.channel("stable")
        assert source.index(digest) == store.get_index(digest)
        with pytest.raises(SourceError) as caught:
            source.tuf("timestamp.json", 1000)
        assert caught.value.reason == "missing"
        to_file(store, tmp_path / "bundle.db")
        backup(store, tmp_path / "backup.db")
    assert old.read_bytes() == before
    with Store(tmp_path / "backup.db") as restored, Store(tmp_path / "bundle.db", readonly=True) as bundle:
        assert restored.channels() == bundle.channels() == {"stable": EmbeddedSource(str(old)).channel("stable")}


def test_a_writer_brings_it_up_and_what_it_holds_counts_as_young(old):
    start = time.time() - 1
    with Store(old, readonly=True) as reader:
        counts = reader.counts()
        with Store(old) as store:
            assert store._version() == SCHEMA == 3
            assert store.counts() == counts and store.verify() == []
            assert {move.arch: move.digest for move in store.history("stable")} == store.channel("stable")
            assert min(store.ages("indexes").values()) >= start
            assert gc.collect(store).counts()["blobs"] == 0
            store.put_tuf({"timestamp.json": b"{}"})
            fill(store)
            assert store.counts() == counts
        assert reader.tuf("timestamp.json") == b"{}", "a reader that had it open sees the new table"
    assert EmbeddedSource(str(old)).tuf("timestamp.json", 10) == b"{}"


def test_it_keeps_its_name_and_a_failed_migration_leaves_it(old, tmp_path, monkeypatch):
    copy = tmp_path / "copy.db"
    shutil.copy(old, copy)
    with sqlite3.connect(copy) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        connection.execute("CREATE TABLE history (x)")  # in the way
    connection.close()
    with pytest.raises(StoreError, match="history"):
        Store(copy)
    with Store(copy, readonly=True) as store:
        assert store._version() == 1 and store.verify() == []
