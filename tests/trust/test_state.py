"""runtime.trust.state: what a refresh leaves behind, for whom, and what damage does to it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from registry.releases.client import Known, merge
from runtime.errors import SourceError
from runtime.trust.state import State, Trusted
from tests.trust.repository import A, B, C

# -- what is kept -----------------------------------------------------------------------------------------------------


def trusted(version: int, digest: str = A) -> Trusted:
    return Trusted(version, {"sm_120": digest}, 1.5, 2.5, 3.5, (C,))


def test_sources_roots_and_channels_are_kept_apart(tmp_path):
    folder = str(tmp_path / "state")
    one, other, rooted = (
        State(folder, w, r) for w, r in (("https://a", b"1"), ("https://b", b"1"), ("https://a", b"2"))
    )
    one.merge(lambda _: (b"x", 1), "stable", trusted(1))
    assert one.read("stable") == trusted(1)
    assert State(folder, "HTTPS://A/", b"1").read("stable") == trusted(1), "one URL, written in two ways"
    assert one.read("nightly") is other.read("stable") is rooted.read("stable") is None
    other.merge(lambda _: (b"y", 2), "stable", trusted(2, B))
    assert (one.read("stable"), other.read("stable")) == (trusted(1), trusted(2, B))
    assert (one.metadata(), other.metadata(), rooted.metadata()) == (b"x", b"y", None)


def test_the_higher_version_stays_unless_keys_were_replaced(tmp_path):
    kept = State(str(tmp_path / "s"), "https://a", b"root")
    assert kept.merge(lambda _: (b"", 5), "stable", trusted(5, B)) == trusted(5, B)
    assert kept.merge(lambda _: (b"", 5), "stable", trusted(4)) == trusted(5, B), "another process was ahead"
    assert kept.merge(lambda _: (b"", 3), "stable", trusted(3)) == trusted(3), "the metadata itself begins anew"
    assert kept.read("stable") == trusted(3)


def test_files_and_folder_are_the_user_s_alone(client):
    client.refresh()
    folder = Path(client.settings.state_folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert sorted(path.name[:8] for path in folder.iterdir()) == ["lock", "trusted.", client.state._metadata_name[:8]]


@pytest.mark.parametrize("how", ["writable", "link", "file"])
def test_a_state_folder_that_others_could_change_is_refused(client, tmp_path, how):
    client.refresh()
    folder = Path(client.settings.state_folder)
    if how == "writable":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere") if how == "link" else folder.touch()
    for ask in (client.refresh, client.warm):
        with pytest.raises(SourceError, match=r"configure\(state=") as error:
            ask()
        assert error.value.reason == "state_owner"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_s_state_folder_is_refused(client):
    client.refresh()
    os.chown(client.settings.state_folder, 12345, -1)
    with pytest.raises(SourceError) as error:
        client.warm()
    assert error.value.reason == "state_owner"


DAMAGED = (
    b"",
    b"{",
    b"[]",
    b'{"format": 2}',
    b'{"format": 1, "sources": 3}',
    b'{"format": 1, "sources": {"a": {"b": 1}}}',
    b"\xff",
    b"[" * 100_000,
)


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_mean_asking_again(repository, client, damage):
    client.refresh()
    for path in Path(client.settings.state_folder).iterdir():
        path.write_bytes(damage)
    assert client.digests() == client.warm() == {"sm_120": A}


@pytest.mark.parametrize("junk", ["{}", "junk"])
def test_roots_that_do_not_follow_are_not_kept(repository, client, junk):
    """A damaged file with more roots than there are does not win over the real chain."""
    repository.publish("root")
    client.refresh()
    path = Path(client.settings.state_folder, client.state._metadata_name)
    found = json.loads(path.read_bytes())
    for roots in ([junk] * 5, [*found["roots"], junk, junk], [*found["roots"], *found["roots"]]):
        path.write_text(json.dumps({**found, "roots": roots}))
        repository.release(B)
        assert client.refresh() == {"sm_120": B}
        assert client.versions()["root"] == 2


def test_every_cut_of_the_state_is_asked_again_or_the_same(repository, client):
    """What a crash of the machine may leave of trusted.json never is something else than was trusted."""
    client.refresh()
    path = Path(client.settings.state_folder, "trusted.json")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert client.state.read("stable") is None
    path.write_bytes(whole)
    assert client.warm() == {"sm_120": A}


def test_a_link_in_the_place_of_a_file_is_not_followed(client, tmp_path):
    client.refresh()
    path = Path(client.settings.state_folder, "trusted.json")
    path.rename(tmp_path / "trusted.json")
    path.symlink_to(tmp_path / "trusted.json")
    assert client.state.read("stable") is None


def test_a_folder_that_cannot_be_written_means_asking_in_each_process(repository, client, monkeypatch, caplog):
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT and str(path).startswith(client.settings.state_folder):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert client.digests() == {"sm_120": A}
    assert "cannot be written" in caplog.text
    assert client.state.read("stable") is None and client.state.metadata() is None


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_keeps_the_old_state_whole(repository, client, monkeypatch, call):
    client.refresh()
    before = {path.name: path.read_bytes() for path in Path(client.settings.state_folder).iterdir()}
    repository.release(B)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        assert client.refresh() == {"sm_120": B}, "this process knows"
    after = {path.name: path.read_bytes() for path in Path(client.settings.state_folder).iterdir()}
    assert after == before
    assert client.refresh() == client.warm() == {"sm_120": B}


def test_what_a_killed_process_left_is_removed_in_the_end(client):
    client.refresh()
    old, young = (Path(client.settings.state_folder, f"trusted.json.{n}.tmp") for n in (1, 2))
    for path in (old, young):
        path.write_bytes(b"{")
    os.utime(old, (0, 0))
    assert client.refresh() == client.warm() == {"sm_120": A}
    assert not old.exists() and young.exists(), "somebody may be writing the young one"


def test_merges_take_turns(tmp_path):
    """What two processes find at once is kept of both: none writes over what it has not read."""
    one, other = (State(str(tmp_path / "s"), where, b"root") for where in ("https://a", "https://b"))
    entered, second = threading.Event(), threading.Event()

    def slow(_: bytes | None) -> tuple[bytes, int]:
        entered.set()
        assert not second.wait(0.3), "the other one came in meanwhile"
        return b"", 1

    def merge_second() -> None:
        entered.wait()
        other.merge(lambda _: (second.set() or b"", 1), "stable", trusted(1, B))

    thread = threading.Thread(target=merge_second)
    thread.start()
    one.merge(slow, "stable", trusted(1))
    thread.join()
    assert (one.read("stable"), other.read("stable")) == (trusted(1), trusted(1, B))


def test_locks_that_do_not_work_are_done_without(repository, client, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert client.refresh() == client.warm() == {"sm_120": A}


def test_merging_is_by_version_and_by_the_newest_root_s_keys(repository):
    def known(*roots: bytes) -> Known:
        files = (repository.files[repository.path(role)] for role in ("timestamp", "snapshot", "targets"))
        return Known(roots, *files)

    root, first = repository.files["1.root.json"], known()
    repository.release(B)
    second = known()
    assert merge(root, first, second) == merge(root, second, first) == second
    mixed = Known((), second.timestamp, first.snapshot, first.targets)
    assert merge(root, first, mixed) == mixed
    old = repository.replace_keys("timestamp")
    repository.publish("root")
    rotated = Known((repository.files["2.root.json"],), None, second.snapshot, second.targets)
    assert merge(root, second, rotated) == rotated, "the old key's timestamp is gone"
    repository.sign("timestamp", old)
    assert merge(root, rotated, known(repository.files["2.root.json"])).timestamp is None
