"""What gc keeps, what it forgets, and that neither readers nor builders notice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry import gc
from registry.store import Store, StoreError, compress
from tests.registry.releases import keys, one_index, release
from tests.registry.samples import KEYS, artifact, fill, ptx

LATER = 2 * gc.KEEP_S  # seconds: by then nothing of a test is young


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "r.db") as store:
        yield store


def later() -> float:
    return time.time() + LATER


def collect(store: Store, **options) -> gc.Plan:
    """gc of the day after tomorrow; the registry is sound before and after."""
    assert store.verify() == []
    plan = gc.collect(store, **{"now": later(), **options})
    assert store.verify() == []
    return plan


def test_what_nothing_names_goes_with_all_that_belongs_to_it(store):
    kept, gone = one_index(store, "kept"), one_index(store, "gone", None)
    plan = collect(store)
    (a,) = gone.artifacts
    assert (plan.indexes, plan.artifacts, plan.ptx) == ((gone.digest,), ("cubin:gone",), ("ptx:gone",))
    assert a.frame_sha256 in plan.blobs and len(plan.blobs) == 2  # its cubin and its PTX
    assert plan.bytes > a.frame_size
    assert store.indexes() == {kept.digest: "sm_120"}
    assert store.counts() | {"bytes": 0} == {
        "blobs": 2, "ptx": 1, "artifacts": 1, "indexes": 1, "channels": 1, "bytes": 0
    }  # fmt: skip
    assert collect(store).counts() == {"indexes": 0, "parts": 0, "artifacts": 0, "ptx": 0, "blobs": 0, "bytes": 0}


def test_a_dry_run_says_the_same_and_changes_nothing(store):
    one_index(store, "gone", None)
    before = store.counts()
    found = gc.collect(store, now=later(), dry_run=True)
    assert store.counts() == before
    assert collect(store) == found and store.counts() != before


def test_every_channel_keeps_its_last_ten_indexes_of_each_architecture(store):
    made = [one_index(store, str(n)).digest for n in range(13)]
    store.put_index(store.index(made[12]), "stable")  # no move
    nightly = one_index(store, "n", "nightly").digest
    plan = collect(store)
    assert set(plan.indexes) == set(made[:3])
    assert set(store.indexes()) == {*made[3:], nightly}
    assert [move.digest for move in store.history("stable")] == made[:2:-1]
    assert set(collect(store, keep_indexes=2).indexes) == set(made[3:11])


def test_going_back_and_forth_counts_each_index_once(store):
    made = [one_index(store, str(n)) for n in range(3)]
    for n in (0, 2, 1, 2, 1):
        store.put_index(made[n], "stable")
    assert collect(store, keep_indexes=2).indexes == (made[0].digest,)
    assert store.channel("stable") == {"sm_120": made[1].digest}


def test_signed_channels_keep_theirs_when_the_registrys_own_have_moved_on(store, tmp_path):
    keys(store, tmp_path / "keys")
    signed = []
    for n in range(3):
        signed.append(one_index(store, f"signed-{n}").digest)
        release(store, tmp_path / "keys")
    store._db.execute("DELETE FROM history")
    unsigned = one_index(store, "newer").digest
    assert gc.signed_channels(store)["stable"] == [{"sm_120": digest} for digest in reversed(signed)]
    assert collect(store, keep_indexes=2).indexes == (signed[0],)
    assert set(store.indexes()) == {*signed[1:], unsigned}


def test_a_channels_document_that_cannot_be_read_keeps_what_it_names(store, tmp_path):
    keys(store, tmp_path / "keys")
    signed = one_index(store, "signed", "odd").digest
    release(store, tmp_path / "keys", "odd")
    (path,) = [path for path in store.tuf_paths() if path.startswith("targets/")]
    store.put_tuf({path: store.tuf(path).replace(b'"format":1', b'"format":7')})
    store._db.execute("DELETE FROM channels")
    assert gc.collect(store, now=later()).indexes == ()
    assert list(store.indexes()) == [signed]


def test_what_the_builder_wants_stays_though_no_index_names_it(store):
    for seed in ("wanted", "gone"):
        one_index(store, seed, None)
    store.set_wanted("sm_120", ["ptx:wanted", "cubin:wanted"])
    store.set_wanted("sm_90", ["other"])
    store.put_ptx("ptx:alone", KEYS[0], ptx("alone"), {})  # its artifact is still to be made
    store.set_wanted("sm_100", ["ptx:alone"])
    collect(store)
    assert store.get_ptx("ptx:alone") is not None
    store.set_wanted("sm_100", [])
    assert list(store.artifacts()) == ["cubin:wanted"]
    assert store.get_ptx("ptx:wanted") is not None and store.get_ptx("ptx:gone") is None
    store.set_wanted("sm_120", [])
    collect(store)
    assert store.counts()["blobs"] == 0


def test_what_is_younger_than_a_day_stays_and_putting_again_makes_young(store):
    a, frame = artifact()
    index = one_index(store, "old", None)
    put = [  # none of them belongs to another
        lambda: store.put_ptx("p", a.variant, "// of no artifact", {}),
        lambda: store.put_ptx("q", a.variant, ptx(a.variant), {}),
        lambda: store.put_artifact("a", a, frame),
        lambda: store.put_blobs([compress(b"of nothing")]),
        lambda: store.put_index(index, None),
    ]
    for call in put:
        call()
    assert collect(store, now=time.time()).counts()["blobs"] == 0
    for table in ("blobs", "ptx", "artifacts", "indexes"):
        store._db.execute(f"UPDATE {table} SET added = 0")
    for call in put:
        call()
    plan = collect(store, now=time.time())
    assert plan.counts() | {"bytes": 0} == {"indexes": 0, "parts": 0, "artifacts": 0, "ptx": 0, "blobs": 0, "bytes": 0}


def test_an_index_of_another_format_keeps_its_blobs(store):
    index = one_index(store, "old")
    body = index.to_bytes().replace(b'"format":2', b'"format":1')
    store._db.execute("UPDATE indexes SET body = ?", [body])
    assert gc.collect(store, now=later()).blobs == ()


def test_a_failing_gc_forgets_nothing(store, monkeypatch):
    one_index(store, "gone", None)
    before = store.counts()
    store._db.execute("CREATE TRIGGER broken BEFORE DELETE ON ptx BEGIN SELECT RAISE(ABORT, 'planted'); END")
    with pytest.raises(StoreError, match="planted"):
        gc.collect(store, now=later())
    assert store.counts() == before


WRITER = """
import sys, time
from registry.store import Store, StoreError
from tests.registry.releases import one_index
lost = 0
with Store(sys.argv[1]) as store:
    print("ready", flush=True)
    for n in range(60):
        try:
            one_index(store, f"w{n}", "nightly")
        except StoreError as error:
            assert error.reason == "not_found", error  # its blob went between: it says so, and stores no index
            lost += 1
print(lost)
"""


def test_beside_readers_and_a_builder_with_no_day_of_grace(tmp_path):
    """Readers hold what they began with; an index whose blobs gc was faster to take is refused, never stored."""
    path = tmp_path / "r.db"
    with Store(path) as store, Store(path, readonly=True) as reader:
        digests = fill(store, KEYS[:1])
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert writer.stdout.readline() == "ready\n"
        runs = 0
        while writer.poll() is None:
            gc.collect(store, keep_s=0.0, keep_indexes=2)
            runs += 1
            for digest in digests.values():
                for a in reader.index(digest).artifacts:
                    assert len(reader.get_frame(a.frame_sha256)) == a.frame_size
            time.sleep(0.002)
        assert writer.wait() == 0 and runs > 5
        assert store.verify() == []
        assert store.channel("stable") == digests
