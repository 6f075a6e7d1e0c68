"""Taking in bundles: nothing is stored that signatures under the given root, or a given digest, do not lead to."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import imports
from registry.contract import CubineryError, sha256_hex
from registry.errors import ReleaseError
from registry.export import to_file, to_folder
from registry.imports import Imported, by_digests, by_signatures, opened
from registry.releases.client import verify_all
from registry.store import Store, StoreError, compress
from tests.registry.releases import keys, one_index, release
from tests.registry.samples import KEYS, artifact, fill, index


class Site:
    """A publishing registry, its root, and an empty registry of a host without a network."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.keys = folder / "keys"
        self.source = Store(folder / "source.db")
        self.target = Store(folder / "target.db")
        self.digests = fill(self.source, KEYS[:2])
        self.root = keys(self.source, self.keys)
        release(self.source, self.keys)

    def bundle(self, kind: str = "file") -> Path:
        path = self.folder / kind
        (to_file if kind == "file" else to_folder)(self.source, path)
        return path

    def take(self, path: Path, *channels: str, root: bytes | None = None) -> Imported:
        with opened(path) as bundle:
            return by_signatures(self.target, bundle, root or self.root, channels)


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.source.close()
    made.target.close()


def refused(call: Callable[[], object], reason: str, kind: type[CubineryError] = StoreError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.reason == reason, caught.value
    return str(caught.value)


def untouched(store: Store) -> None:
    """No index, channel or metadata came in; blobs that nothing names may have."""
    assert (store.indexes(), store.channels(), store.tuf_paths(), store.verify()) == ({}, {}, [], [])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_signed_release_is_taken_in_whole(site, kind):
    done = site.take(site.bundle(kind))
    assert done.indexes == {digest: arch for arch, digest in site.digests.items()}
    assert done.channels == {"stable": site.digests} and done.blobs == 4
    target = site.target
    assert target.channels() == {"stable": site.digests} and target.verify() == []
    assert {p: target.tuf(p) for p in target.tuf_paths()} == {p: site.source.tuf(p) for p in site.source.tuf_paths()}
    assert verify_all(lambda p, cap: target.tuf(p), site.root, fresh=True)["stable"].indexes == site.digests
    again = site.take(site.bundle(kind))
    assert (again.blobs, again.channels) == (0, done.channels)


def test_a_later_bundle_brings_only_what_is_new(site):
    site.take(site.bundle())
    newer = one_index(site.source, "newer")
    release(site.source, site.keys)
    done = site.take(site.bundle())
    assert done.blobs == 1 and site.target.channel("stable") == {**site.digests, "sm_120": newer.digest}
    assert site.target.verify() == []


def test_only_some_channels(site):
    one_index(site.source, "n", "nightly")
    release(site.source, site.keys, "nightly")
    assert site.take(site.bundle(), "stable").channels == {"stable": site.digests}
    assert site.target.channels() == {"stable": site.digests}
    refused(lambda: site.take(site.bundle(), "other"), "no_channel", ReleaseError)


def test_an_older_bundle_is_a_rollback(site):
    old = site.folder / "old.db"
    shutil.copy(site.bundle(), old)
    newer = one_index(site.source, "newer")
    release(site.source, site.keys)
    site.take(site.bundle())
    refused(lambda: site.take(old), "rollback", ReleaseError)
    assert site.target.channel("stable")["sm_120"] == newer.digest


def test_a_root_that_did_not_sign_it(site, tmp_path):
    with Store(tmp_path / "other.db") as other:
        foreign = keys(other, tmp_path / "foreign")
    refused(lambda: site.take(site.bundle(), root=foreign), "signature", ReleaseError)
    refused(lambda: site.take(site.bundle(), root=b"{}"), "root", ReleaseError)
    untouched(site.target)


def test_targets_that_have_expired(site, monkeypatch):
    from registry.releases import publish

    monkeypatch.setattr(publish, "verify_all", lambda *_, **__: {})
    release(site.source, site.keys, days=-1)
    refused(lambda: site.take(site.bundle()), "expired", ReleaseError)
    untouched(site.target)


def test_an_expired_timestamp_does_not_matter_offline(site, monkeypatch):
    """A bundle claims no freshness."""
    from registry.releases import publish

    monkeypatch.setitem(publish.DAYS, "timestamp", -1)
    monkeypatch.setattr(publish, "verify_all", lambda *_, **__: {})
    release(site.source, site.keys)
    assert site.take(site.bundle()).channels == {"stable": site.digests}


def test_another_publishers_release_does_not_replace_ours(site, tmp_path):
    site.take(site.bundle())
    with Store(tmp_path / "other.db") as other:
        fill(other, KEYS[:1])
        foreign = keys(other, tmp_path / "foreign")
        release(other, tmp_path / "foreign")
        to_file(other, tmp_path / "foreign.db")
    message = refused(lambda: site.take(tmp_path / "foreign.db", root=foreign), "signature", ReleaseError)
    assert "its own release does not hold under this root" in message
    assert site.target.channels() == {"stable": site.digests}


SPOIL: dict[str, Callable[[bytes], bytes]] = {
    "flip": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("kind", ["blobs/sha256", "indexes/sha256", "tuf", "tuf/targets"])
def test_changed_bytes_are_refused_wherever_they_are(site, kind, spoil):
    folder = site.bundle("folder")
    for path in sorted((folder / "v1" / kind).iterdir()):
        if path.is_dir() or path.name == "1.root.json":  # the root that counts is the one given
            continue
        before = path.read_bytes()
        path.write_bytes(SPOIL[spoil](before))
        site.target = Store(site.folder / f"target of {path.name}.db")
        with pytest.raises(CubineryError) as caught:
            site.take(folder)
        assert caught.value.reason in ("integrity", "mismatch", "signature", "metadata", "too_long"), path
        assert site.target.channels() == {} and site.target.tuf_paths() == [] and site.target.verify() == []
        path.write_bytes(before)
    assert site.take(folder).channels == {"stable": site.digests}


@pytest.mark.parametrize("kind", ["blobs/sha256", "indexes/sha256", "tuf", "tuf/targets"])
def test_what_is_missing_is_named(site, kind):
    folder = site.bundle("folder")
    path = sorted((folder / "v1" / kind).iterdir())[-1]
    path.unlink()
    with pytest.raises(CubineryError) as caught:
        site.take(folder)
    assert caught.value.reason in ("not_found", "missing")
    assert site.target.channels() == {} and site.target.tuf_paths() == []


# -- by digest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_given_digest_is_enough_and_brings_no_metadata(site, kind):
    with opened(site.bundle(kind)) as bundle:
        done = by_digests(site.target, bundle, list(site.digests.values()), "stable")
    assert done.channels == site.target.channels() == {"stable": site.digests}
    assert site.target.tuf_paths() == [] and site.target.verify() == []


def test_a_digest_moves_no_channel_unless_one_is_named(site):
    with opened(site.bundle()) as bundle:
        by_digests(site.target, bundle, [site.digests["sm_90"]])
    assert site.target.channels() == {} and site.target.indexes() == {site.digests["sm_90"]: "sm_90"}


def test_digests_that_lead_nowhere(site):
    with opened(site.bundle()) as bundle:
        refused(lambda: by_digests(site.target, bundle, ["0" * 64]), "not_found")
        refused(lambda: by_digests(site.target, bundle, ["../x"]), "contract", CubineryError)
        newer = one_index(site.source, "newer").digest
    with opened(site.bundle()) as bundle:
        both = [newer, site.digests["sm_120"]]
        refused(lambda: by_digests(site.target, bundle, both, "stable"), "argument")
    assert site.target.channels() == {}


def test_a_bomb_is_refused_by_the_size_it_declares(site, tmp_path):
    """A frame that is the one named, but holds far more than the index says."""
    frame = compress(bytes(200 << 20))
    a, _ = artifact(KEYS[0], frame_sha256=sha256_hex(frame), frame_size=len(frame))
    bomb = index([a])
    folder = tmp_path / "bomb" / "v1"
    for kind, digest, body in (("indexes", bomb.digest, bomb.to_bytes()), ("blobs", sha256_hex(frame), frame)):
        (folder / kind / "sha256").mkdir(parents=True)
        (folder / kind / "sha256" / digest).write_bytes(body)
    with opened(tmp_path / "bomb") as bundle:
        refused(lambda: by_digests(site.target, bundle, [bomb.digest]), "integrity")
    untouched(site.target)


def test_files_that_are_no_bundle(site, tmp_path):
    def take(path: Path) -> None:
        with opened(path) as bundle:
            by_digests(site.target, bundle, ["0" * 64])

    refused(lambda: take(tmp_path / "none.db"), "missing")
    (tmp_path / "text.db").write_text("no database " * 100)
    refused(lambda: take(tmp_path / "text.db"), "not_a_registry")
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    refused(lambda: take(tmp_path / "empty.db"), "not_a_registry")
    refused(lambda: take(tmp_path / "keys"), "not_found")


@pytest.mark.parametrize("trick", ["view", "longer"])
def test_a_bundle_made_to_hurt(site, monkeypatch, trick):
    path = site.bundle()
    monkeypatch.setattr(imports, "MAX_INDEX", 1 << 20)
    with sqlite3.connect(path) as db:
        if trick == "view":
            db.execute("DROP TABLE indexes")
            db.execute("CREATE VIEW indexes AS SELECT randomblob(1000000000) AS body, '' AS digest, 'sm_120' AS arch")
        else:
            db.execute("UPDATE indexes SET body = zeroblob(100000000)")
    db.close()
    refused(lambda: site.take(path), "not_a_registry" if trick == "view" else "too_long")
    untouched(site.target)


def test_the_signed_channel_of_another_architecture(site, monkeypatch):
    """A publisher's mistake, which no signature finds."""
    from registry.releases import publish

    swapped = {"sm_120": site.digests["sm_90"], "sm_90": site.digests["sm_120"]}
    monkeypatch.setattr(Store, "channel", lambda self, name: swapped)
    monkeypatch.setattr(publish, "follow", lambda *_: None)
    release(site.source, site.keys)
    monkeypatch.undo()
    refused(lambda: site.take(site.bundle()), "metadata", ReleaseError)
    assert site.target.channels() == {} and site.target.tuf_paths() == []


def test_what_comes_in_is_what_the_store_would_make(site):
    site.take(site.bundle())
    for digest in site.digests.values():
        assert site.target.index(digest).digest == digest
    assert json.loads(site.target.tuf("1.root.json")) == json.loads(site.root)
