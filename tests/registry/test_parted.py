"""An index in parts goes wherever one in a single document goes, whole, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from registry import gc, imports
from registry.contract import Index, part_digests, parts, sha256_hex
from registry.contract import index as index_file
from registry.export import backup, to_file, to_folder
from registry.store import Store, StoreError
from runtime.sources.folder import FolderSource
from runtime.sources.source import EmbeddedSource
from tests.registry.samples import KEYS, artifact, index


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "MAX_WHOLE", 2)
    monkeypatch.setattr(parts, "PART_ROWS", 40)


def put(store: Store, count: int, channel: str | None = "stable") -> Index:
    """An index of the first `count` variants of the table, without PTX."""
    made = [artifact(key) for key in KEYS[:count]]
    store.put_blobs([frame for _, frame in made])
    found = index([a for a, _ in made])
    store.put_index(found, channel)
    return found


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "r.db") as store:
        yield store


def parts_of(found: Index) -> set[str]:
    return set(part_digests(found.to_bytes()))


def test_it_is_stored_as_one_index(store):
    found = put(store, 5)
    assert store.index(found.digest) == found and store.get_index(found.digest) == found.to_bytes()
    assert store.indexes() == {found.digest: "sm_120"} and store.counts()["indexes"] == 1
    assert store.parts() == parts_of(found) and len(store.parts()) > 2
    assert store.verify() == []


def test_verify_finds_a_part_that_is_missing_or_damaged(store):
    found = put(store, 5)
    some = min(parts_of(found))
    with store.transaction() as db:
        db.execute("UPDATE indexes SET body = ? WHERE digest = ?", [b"{}", some])
    assert any(some in line and "another hash" in line for line in store.verify())
    with store.transaction() as db:
        db.execute("DELETE FROM indexes WHERE digest = ?", [some])
    assert any(found.digest in line and "not there" in line for line in store.verify())


def test_gc_keeps_the_parts_of_what_it_keeps_and_no_others(store):
    kept, gone = put(store, 5), put(store, 4, None)
    shared = parts_of(kept) & parts_of(gone)
    plan = gc.collect(store, now=time.time() + 2 * gc.KEEP_S)
    assert plan.indexes == (gone.digest,) and set(plan.parts) == parts_of(gone) - shared
    assert store.parts() == parts_of(kept) and store.verify() == [] and plan.blobs == ()
    assert plan.counts()["indexes"] == 1


def test_a_part_that_waits_for_its_index_stays_for_a_day(store):
    body = next(iter(index([artifact(key)[0] for key in KEYS[:3]]).documents.values()))
    assert store.put_part(body) in store.parts()
    assert gc.collect(store).parts == () and len(gc.collect(store, now=time.time() + 2 * gc.KEEP_S).parts) == 1


def test_an_index_whose_part_is_not_there_yet(store):
    with pytest.raises(StoreError) as error:
        store.read_index(index([artifact(key)[0] for key in KEYS[:3]]).to_bytes())
    assert error.value.reason == "not_found"


def test_exports_and_imports_take_the_parts_along(store, tmp_path):
    found = put(store, 5)
    to_folder(store, tmp_path / "mirror")
    to_file(store, tmp_path / "bundle.db")
    backup(store, tmp_path / "backup.db")
    assert {p.name for p in (tmp_path / "mirror/v1/indexes/sha256").iterdir()} == set(found.documents)
    for where in ("mirror", "bundle.db", "backup.db"):
        with Store(tmp_path / f"from-{where}.db") as other, imports.opened(tmp_path / where) as bundle:
            imports.by_digests(other, bundle, [found.digest], "stable")
            assert other.index(found.digest) == found and other.channel("stable") == {"sm_120": found.digest}
            assert other.verify() == []
    for source in (EmbeddedSource(str(tmp_path / "bundle.db")), FolderSource(str(tmp_path / "mirror"))):
        assert {digest: source.index(digest) for digest in found.documents} == found.documents


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{}")])
def test_an_import_without_a_part_or_with_another_is_refused(store, tmp_path, damage):
    found = put(store, 5)
    to_folder(store, tmp_path / "mirror")
    damage(tmp_path / "mirror/v1/indexes/sha256" / min(parts_of(found)))
    with Store(tmp_path / "other.db") as other, imports.opened(tmp_path / "mirror") as bundle:
        with pytest.raises(StoreError) as error:
            imports.by_digests(other, bundle, [found.digest], "stable")
        assert error.value.reason in ("not_found", "integrity")
        assert other.indexes() == {} and other.channels() == {}


def test_an_import_keeps_the_documents_of_a_writer_that_cuts_otherwise(store, tmp_path, monkeypatch):
    found = put(store, 5)
    to_folder(store, tmp_path / "mirror")
    monkeypatch.setattr(parts, "PART_ROWS", 7)
    with Store(tmp_path / "other.db") as other, imports.opened(tmp_path / "mirror") as bundle:
        imports.by_digests(other, bundle, [found.digest])
        assert {digest: other.get_index(digest) for digest in found.documents} == found.documents
        assert all(sha256_hex(body) == digest for digest, body in found.documents.items())
