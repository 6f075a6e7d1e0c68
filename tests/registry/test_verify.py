"""Store.verify: every kind of damage is found and named, and nothing else is."""

from __future__ import annotations

import pytest

from registry.contract import Index, sha256_hex
from registry.store import Store, compress
from tests.registry.samples import KEYS, fill

DIGEST = "(SELECT digest FROM indexes WHERE arch = 'sm_120')"
CUBIN = "(SELECT sha256 FROM blobs WHERE size = 3000 ORDER BY sha256 LIMIT 1)"
PTX = "(SELECT frame_sha256 FROM ptx ORDER BY fingerprint LIMIT 1)"

# (SQL that damages the file, words of a problem that must be reported)
DAMAGE = {
    "frame flipped": (
        f"UPDATE blobs SET frame = CAST(x'00' || substr(frame, 2) AS BLOB) WHERE sha256 = {CUBIN}",
        "another hash",
    ),
    "frame cut": (f"UPDATE blobs SET frame = substr(frame, 1, 20) WHERE sha256 = {CUBIN}", "another hash"),
    "frame emptied": (f"UPDATE blobs SET frame = x'' WHERE sha256 = {CUBIN}", "another hash"),
    "wrong size": (f"UPDATE blobs SET size = size + 1 WHERE sha256 = {CUBIN}", "declares 3000 bytes, expected 3001"),
    "wrong content hash": (f"UPDATE blobs SET content_sha256 = '0' WHERE sha256 = {CUBIN}", "the content is not 0"),
    "blob gone": (f"DELETE FROM blobs WHERE sha256 = {CUBIN}", "missing or damaged"),
    "ptx blob gone": (f"DELETE FROM blobs WHERE sha256 = {PTX}", "a row of ptx refers to a row of blobs"),
    "ptx hash": ("UPDATE ptx SET ptx_sha256 = '0'", "another text than 0"),
    "ptx variant": ("UPDATE ptx SET variant = 'fwd'", "variant key 'fwd'"),
    "ptx facts": ("UPDATE ptx SET facts = '[]'", "facts are no object"),
    "ptx facts cut": ("UPDATE ptx SET facts = '{'", "Expecting property name"),
    "ptx rows gone": ("DELETE FROM ptx", "PTX"),
    "artifact json": ("UPDATE artifacts SET json = '{}'", "are missing or unknown"),
    "artifact spacing": ("UPDATE artifacts SET json = json || ' '", "not canonical"),
    "artifact arch": ("UPDATE artifacts SET arch = 'sm_121' WHERE arch = 'sm_120'", "the row says"),
    "artifact size": ("UPDATE artifacts SET json = replace(json, 'e\":3000', 'e\":3001')", "does not hold cubin"),
    "index body": ("UPDATE indexes SET body = substr(body, 2)", "the body has another hash"),
    "index arch": ("UPDATE indexes SET arch = 'sm_90'", "the row says sm_90"),
    "channel arch": ("UPDATE channels SET arch = 'sm_80' WHERE arch = 'sm_90'", "is for sm_90"),
    "channel dangles": (f"DELETE FROM indexes WHERE digest = {DIGEST}", "is missing or damaged"),
}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "r.db") as opened:
        fill(opened, KEYS[:2])
        opened._db.execute("PRAGMA foreign_keys = OFF")
        yield opened


def test_a_sound_registry_has_no_problems(store):
    assert store.verify() == []


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(store, name):
    sql, words = DAMAGE[name]
    assert store._db.execute(sql).rowcount > 0
    problems = store.verify()
    assert any(words in line for line in problems), problems


def _replace_index(store: Store, body: bytes) -> None:
    row = {"digest": sha256_hex(body), "arch": "sm_120", "body": body}
    store._db.table("indexes").insert(row)


def test_indexes_that_hash_right_but_read_wrong_are_found(store):
    good = store.get_index(store.channel("stable")["sm_120"])
    for body, words in ((b"[]", "instead of an object"), (good + b"\n", "not canonical")):
        _replace_index(store, body)
        assert any(words in line for line in store.verify())
    frame = Index.from_bytes(good).artifacts[0].frame_sha256
    _replace_index(store, good.replace(frame.encode(), b"0" * 64))
    assert any(f"blob {'0' * 64} is missing" in line for line in store.verify())


def test_a_frame_with_the_right_hash_but_no_zstd_is_found(store):
    for frame in (b"no zstd", compress(b"abc") + b"\0"):
        row = {"sha256": sha256_hex(frame), "frame": frame, "size": 3, "content_sha256": sha256_hex(b"abc")}
        store._db.table("blobs").insert(row)
        assert len(store.verify()) == 1
        store._db.execute("DELETE FROM blobs WHERE sha256 = ?", [row["sha256"]])


def test_a_damaged_page_is_found(tmp_path):
    path = tmp_path / "r.db"
    with Store(path) as store:
        fill(store, KEYS)
        page = store._db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'artifacts'").fetchone()[0]
    data = bytearray(path.read_bytes())
    start = (page - 1) * 8192
    data[start : start + 8192] = b"\xa5" * 8192
    path.write_bytes(data)
    with Store(path, readonly=True) as store:
        problems = store.verify()
    assert any(line.startswith("sqlite: ") for line in problems), problems
    assert problems[-1] == "sqlite: database disk image is malformed; the rest was not checked"
