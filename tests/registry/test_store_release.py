"""What a store holds of releases: TUF's files, loose blobs, where channels have pointed, what the builder wants."""

from __future__ import annotations

import time

import pytest

from registry import store as store_module
from registry.contract import sha256_hex
from registry.store import ConflictError, Store, StoreError, compress
from tests.registry.releases import one_index
from tests.registry.samples import artifact, index


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "r.db") as store:
        yield store


def reason(call) -> str:
    with pytest.raises(StoreError) as caught:
        call()
    return caught.value.reason


def test_tuf_files_come_back_and_are_replaced(store):
    files = {"1.root.json": b"r", "timestamp.json": b"1", f"targets/{sha256_hex(b'd')}.stable.json": b"d"}
    store.put_tuf(files)
    store.put_tuf({"timestamp.json": b"2"})
    assert store.tuf_paths() == sorted(files)
    assert {path: store.tuf(path) for path in files} == {**files, "timestamp.json": b"2"}
    assert store.tuf("2.root.json") is None and store.verify() == []
    with Store(store.path, readonly=True) as reader:
        assert reader.tuf("timestamp.json") == b"2"
        assert reason(lambda: reader.put_tuf({"x": b""})) == "readonly"


def test_all_tuf_files_or_none(store):
    store.put_tuf({"timestamp.json": b"1"})
    for path in ("../x", "", "targets/", "targets/a/b", "/x", "a b", ".x", "x\n"):
        assert reason(lambda path=path: store.put_tuf({"2.root.json": b"r", path: b"x"})) == "argument"
    assert store.tuf_paths() == ["timestamp.json"]


def test_two_publishers_cannot_both_follow_on_one_release(store):
    store.put_tuf({"timestamp.json": b"1"}, expected={"timestamp.json": None})
    for expected in ({"timestamp.json": None}, {"timestamp.json": b"0"}, {"timestamp.json": b"1", "x": b"y"}):
        with pytest.raises(ConflictError):
            store.put_tuf({"timestamp.json": b"2"}, expected=expected)
    assert store.tuf("timestamp.json") == b"1"
    store.put_tuf({"timestamp.json": b"2"}, expected={"timestamp.json": b"1", "x": None})
    assert store.tuf("timestamp.json") == b"2"


def test_verify_finds_a_channels_document_under_a_wrong_name(store):
    path = f"targets/{sha256_hex(b'd')}.stable.json"
    store.put_tuf({path: b"other"})
    assert store.verify() == [f"tuf {path}: the file has another hash"]


def test_loose_blobs_are_whole_frames_and_an_index_may_name_them(store):
    a, frame = artifact()
    assert store.put_blobs([frame]) == [a.frame_sha256] == store.put_blobs([frame])
    assert store.get_frame(a.frame_sha256) == frame
    store.put_index(index([a]), "stable")
    assert store.verify() == []


@pytest.mark.parametrize("bad", [b"", b"no frame", compress(b"x" * 99)[:-1], compress(b"x") + b"\0", compress(b"") * 2])
def test_of_blobs_that_are_not_one_frame_none_is_stored(store, bad):
    assert reason(lambda: store.put_blobs([compress(b"good"), bad])) == "integrity"
    assert store.counts()["blobs"] == 0


def test_a_blob_has_a_largest_size(store, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_CONTENT", 1000)
    store.put_blobs([compress(bytes(1000))])
    assert reason(lambda: store.put_blobs([compress(bytes(1001))])) == "integrity"


def test_history_says_where_a_channel_has_pointed(store):
    start = time.time()
    a, b = one_index(store, "a"), one_index(store, "b")
    store.put_index(b, "stable")  # again: no move
    store.put_index(a, "stable")
    store.put_index(a, "nightly")
    moves = store.history("stable")
    assert [(move.arch, move.digest) for move in moves] == [("sm_120", d.digest) for d in (a, b, a)]
    assert start <= moves[-1].moved <= moves[0].moved <= time.time()
    assert store.history("none") == [] and len(store.history("nightly")) == 1


def test_wanted_fingerprints_replace_those_of_their_architecture(store):
    store.set_wanted("sm_120", ["a", "b", "b"])
    store.set_wanted("sm_90", ["c"])
    assert store.wanted() == {"a", "b", "c"}
    store.set_wanted("sm_120", ["d"])
    assert store.wanted() == {"c", "d"}
    assert reason(lambda: store.set_wanted("sm_120", ["e", "not one word"])) == "argument"
    assert store.wanted() == {"c", "d"}
