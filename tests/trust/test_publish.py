"""Making releases: what each change signs, what it refuses, and that nothing half-made is stored."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from registry.__main__ import main
from registry.errors import ConflictError, ReleaseError
from registry.releases import publish, signing
from registry.releases.client import verify_all
from registry.releases.publish import Draft
from registry.store import Store
from tests.runtime.fakes import write_registry

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)  # signatures end on whole seconds
ONLY = ("bf16-d64", "bf16-d96", "bf16-d128")


class Desk:
    """A registry with a root, its keys, and three indexes for sm_120 that the channel `stable` has had in turn."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "r.db"
        self.store = Store(self.path)
        made = signing.make_keys(folder / "keys", dict.fromkeys(signing.ROLES, 1))
        now = datetime.datetime.now(datetime.UTC)
        self.root = publish.create_root(self.store, made, dict.fromkeys(signing.ROLES, 1), now)
        self.digests = [write_registry(self.path, only=only)["sm_120"] for only in ONLY]

    def draft(self, *folders: str, **settings) -> Draft:
        return Draft(self.store, signing.read_keys(self.folder / name for name in folders or ("keys",)), **settings)

    def point(self, number: int) -> str:
        """Let the registry's own channel point at one of the indexes, as the builder would."""

        digest = self.digests[number]
        self.store.put_index(self.store.index(digest), "stable")
        return digest

    def publish(self, number: int, **settings) -> Draft:
        self.point(number)
        draft = self.draft(**settings)
        draft.publish("stable")
        return finish(draft)

    def signed(self) -> dict[str, dict[str, str]]:
        """What a new client would load."""
        channels = verify_all(lambda path, _: self.store.tuf(path), self.root, fresh=True)
        return {name: channel.indexes for name, channel in channels.items()}


def finish(draft: Draft) -> Draft:
    draft.sign_targets()
    draft.commit()
    return draft


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def test_publish_signs_what_the_channel_points_at(desk):
    with pytest.raises(ReleaseError) as error:
        desk.draft().publish("nightly")
    assert error.value.reason == "no_channel"
    draft = desk.publish(0)
    assert desk.signed() == {"stable": {"sm_120": desk.digests[0]}}
    assert set(draft.files) == {"1.targets.json", "1.snapshot.json", "timestamp.json",
                                next(p for p in draft.files if p.startswith("targets/"))}  # fmt: skip
    desk.point(1)
    assert desk.signed() == {"stable": {"sm_120": desk.digests[0]}}, "building is not publishing"
    desk.publish(1)
    assert desk.signed() == {"stable": {"sm_120": desk.digests[1]}}
    assert publish.versions(desk.store) == {"root": 1, "targets": 2, "snapshot": 2}


def test_publish_of_one_architecture_leaves_the_others(desk):
    desk.publish(0)
    both = write_registry(desk.path, "sm_120", "sm_90", only=ONLY[1])
    draft = desk.draft()
    draft.publish("stable", ["sm_90"])
    finish(draft)
    assert desk.signed()["stable"] == {"sm_120": desk.digests[0], "sm_90": both["sm_90"]}
    with pytest.raises(ReleaseError, match="nothing for sm_100"):
        desk.draft().publish("stable", ["sm_100"])


def test_rollback_is_a_higher_version_of_an_older_index(desk):
    for number in range(3):
        desk.publish(number)
    first, second, third = desk.digests
    for expected in (second, first):
        draft = desk.draft()
        draft.rollback("stable")
        finish(draft)
        assert desk.signed()["stable"] == desk.store.channel("stable") == {"sm_120": expected}
    assert publish.versions(desk.store)["targets"] == 5
    with pytest.raises(ReleaseError, match="no earlier index") as error:
        desk.draft().rollback("stable")
    assert error.value.reason == "argument"
    draft = desk.draft()
    draft.rollback("stable", to=third)
    finish(draft)
    assert desk.signed()["stable"] == {"sm_120": third}
    for wrong in ({"name": "nightly"}, {"name": "stable", "to": "0" * 64}):
        with pytest.raises(ReleaseError):
            desk.draft().rollback(**wrong)


def test_promote_gives_one_channel_s_indexes_to_another(desk):
    desk.publish(0)
    draft = desk.draft()
    draft.promote("stable", "lts")
    finish(draft)
    desk.publish(1)
    assert desk.signed() == {"lts": {"sm_120": desk.digests[0]}, "stable": {"sm_120": desk.digests[1]}}
    assert desk.store.channel("lts") == {"sm_120": desk.digests[0]}, "gc keeps what a channel points at"
    with pytest.raises(ReleaseError, match="not signed") as error:
        desk.draft().promote("nightly", "stable")
    assert error.value.reason == "no_channel"


def test_yank_takes_every_channel_back_and_stays(desk):
    desk.publish(0)
    desk.publish(1)
    draft = desk.draft()
    draft.promote("stable", "lts")
    finish(draft)
    draft = desk.draft()
    draft.yank(desk.digests[1])
    finish(draft)
    first, second, _ = desk.digests
    assert desk.signed() == {"lts": {"sm_120": second}, "stable": {"sm_120": first}}, "lts had nothing before"
    channels = verify_all(lambda path, _: desk.store.tuf(path), desk.root, fresh=True)
    assert {channel.yanked for channel in channels.values()} == {(second,)}
    desk.point(1)
    for change in (lambda d: d.publish("stable"), lambda d: d.rollback("stable", to=second)):
        with pytest.raises(ReleaseError) as error:
            change(desk.draft())
        assert error.value.reason == "yanked"
    assert second in desk.publish(2).channels["stable"].yanked
    with pytest.raises(ReleaseError, match="holds no index"):
        desk.draft().yank("0" * 64)


def test_a_rollback_passes_over_what_was_yanked(desk):
    for number in range(3):
        desk.publish(number)
    draft = desk.draft()
    draft.yank(desk.digests[1])
    finish(draft)
    assert desk.signed()["stable"] == {"sm_120": desk.digests[2]}
    draft = desk.draft()
    draft.rollback("stable")
    finish(draft)
    assert desk.signed()["stable"] == {"sm_120": desk.digests[0]}


@pytest.mark.parametrize("role", signing.ROLES)
def test_rotation_replaces_a_role_s_keys(desk, role):
    desk.publish(0)
    draft = desk.draft()
    new = signing.make_keys(desk.folder / "new", {role: 3})[role]
    draft.rotate(role, new, 2)
    draft.commit()
    assert desk.signed() == {"stable": {"sm_120": desk.digests[0]}}, "clients follow from the first root"
    old = desk.draft()
    if role == "timestamp":
        finish(old)
        assert "timestamp.json" not in old.files, "left to who has the key"
    else:
        with pytest.raises(ReleaseError, match=f"{role}: 0 of the 2 keys") as error:
            old.rotate("root") if role == "root" else old.sign_targets()
        assert error.value.reason == "keys"
    both = desk.draft("keys", "new")
    both.rotate("root")
    both.publish("stable")
    finish(both)
    assert publish.versions(desk.store)["root"] == 3 and desk.signed()


def test_below_the_threshold_nothing_is_stored(desk):
    draft = desk.draft()
    draft.rotate("targets", signing.make_keys(desk.folder / "new", {"targets": 2})["targets"], 2)
    draft.commit()
    (desk.folder / "new" / "targets-2.pem").unlink()
    before = desk.store.tuf_paths()
    half = desk.draft("keys", "new")
    half.publish("stable")
    with pytest.raises(ReleaseError, match="1 of the 2 keys"):
        half.sign_targets()
    assert desk.store.tuf_paths() == before


def test_of_two_that_publish_at_once_one_is_refused(desk):
    desk.publish(0)
    one, other = desk.draft(), desk.draft()
    for draft in (one, other):
        desk.point(1)
        draft.publish("stable")
        draft.sign_targets()
    one.commit()
    with pytest.raises(ConflictError):
        other.commit()
    renewal = desk.draft()
    renewal.sign_timestamp()
    desk.publish(2)
    with pytest.raises(ConflictError):
        renewal.commit()
    assert desk.signed() == {"stable": {"sm_120": desk.digests[2]}}


def test_a_release_that_no_client_would_take_is_not_stored(desk):
    """For one, under a root that has expired."""
    before = desk.store.tuf_paths()
    draft = desk.draft(now=NOW - datetime.timedelta(days=4000))
    draft.publish("stable")
    draft.sign_targets()
    with pytest.raises(ReleaseError) as error:
        draft.commit()
    assert error.value.reason == "expired" and desk.store.tuf_paths() == before


def test_lives_of_signatures(desk):
    desk.publish(0, now=NOW, days={"targets": 30, "snapshot": 30})
    days = {"root": 730, "targets": 30, "snapshot": 30, "timestamp": 7}
    for role, path in (("targets", "1.targets.json"), ("snapshot", "1.snapshot.json"), ("timestamp", "timestamp.json")):
        signed = Metadata.from_bytes(desk.store.tuf(path)).signed
        assert signed.expires - NOW == datetime.timedelta(days=days[role])


def test_no_private_key_lies_in_the_registry(desk):
    desk.publish(0)
    desk.store.close()
    raw = b"".join(path.read_bytes() for path in desk.folder.glob("r.db*"))
    for path in (desk.folder / "keys").glob("*.pem"):
        key = signing.read_keys([path])[0]
        secret = key._private_key.private_bytes_raw()
        assert secret not in raw and secret.hex().encode() not in raw and b"PRIVATE" not in raw


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_the_user_s_alone_and_never_overwritten(tmp_path):
    signing.make_keys(tmp_path / "k", {"root": 2, "targets": 1})
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o700
    files = sorted((tmp_path / "k").iterdir())
    assert [path.name for path in files] == ["root-1.pem", "root-2.pem", "targets-1.pem"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    with pytest.raises(ReleaseError, match="exists"):
        signing.make_keys(tmp_path / "k", {"timestamp": 1, "root": 1})
    assert sorted((tmp_path / "k").iterdir()) == files, "not even the timestamp's was made"


def test_keys_that_cannot_be_used_are_named(tmp_path):
    from securesystemslib.signer import CryptoSigner

    def refused(match: str) -> None:
        with pytest.raises(ReleaseError, match=match) as error:
            signing.read_keys([tmp_path / "k"])
        assert error.value.reason == "keys"

    refused("No such file")
    (tmp_path / "k").mkdir()
    refused(r"no \*\.pem|holds no")
    path = tmp_path / "k" / "a.pem"
    path.write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    path.chmod(0o644)
    refused("chmod 600")
    path.chmod(0o600)
    assert signing.read_keys([tmp_path / "k"])
    path.write_bytes(CryptoSigner.generate_ecdsa().private_bytes)
    refused("no Ed25519 key")
    path.write_text("no key")
    refused("no unencrypted private key")


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Runs `python -m registry …` in a folder with a registry; returns the printed JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBINERY_REGISTRY", str(tmp_path / "r.db"))

    def run(*words: str, code: int = 0):
        assert main([*words, "--json"]) == code
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else printed.err

    return run


def test_the_commands(shell, tmp_path):
    first = write_registry(tmp_path / "r.db", only=ONLY[0])
    made = shell("keys", "keys", "--threshold", "root=2/3")
    assert made == {"keys": "keys", "root": "keys/root.json"}
    assert len(list((tmp_path / "keys").glob("root-*.pem"))) == 3
    assert shell("publish", "--keys", "keys")["channels"] == {"stable": first}
    assert shell("promote", "--keys", "keys", "stable", "lts")["channels"] == {"stable": first, "lts": first}
    second = write_registry(tmp_path / "r.db", only=ONLY[1])
    assert shell("publish", "--keys", "keys", "--arch", "sm_120", "--days", "90")["channels"]["stable"] == second
    assert shell("rollback", "--keys", "keys")["channels"]["stable"] == first
    assert shell("rollback", "--keys", "keys", "--to", second["sm_120"])["channels"]["stable"] == second
    assert shell("yank", "--keys", "keys", second["sm_120"])["channels"]["stable"] == first
    assert "timestamp.json" in shell("timestamp", "--keys", "keys")["signed"]
    assert "long enough" in shell("timestamp", "--keys", "keys/timestamp-1.pem", "--if-needed")["timestamp"]
    signed = shell("rotate", "--keys", "keys", "--role", "targets", "--new-keys", "new", "--threshold", "1/2")["signed"]
    assert "2.root.json" in signed and "7.targets.json" in signed
    assert "[keys]" in shell("publish", "--keys", "keys", code=2)
    assert shell("publish", "--keys", "keys", "--keys", "new")["channels"]["stable"] == first
    assert shell("rotate", "--keys", "keys")["signed"] == ["3.root.json"]
    offline = tmp_path / "offline"
    offline.mkdir()
    for name in ("root-1.pem", "root-2.pem", "snapshot-1.pem"):
        os.link(tmp_path / "keys" / name, offline / name)
    signed = shell("publish", "--keys", "offline", "--keys", "new")["signed"]
    assert signed == ["9.snapshot.json", "9.targets.json"], "the timestamp is left to who has its key"
    assert "timestamp signed" in shell("timestamp", "--keys", "keys/timestamp-1.pem", "--if-needed")["timestamp"]


def test_rotation_without_the_root_s_keys_makes_no_new_ones(shell, tmp_path):
    write_registry(tmp_path / "r.db", only=ONLY[0])
    shell("keys", "keys")
    error = shell("rotate", "--keys", "keys/targets-1.pem", "--role", "targets", "--new-keys", "new", code=2)
    assert "root: 0 of the 1 keys" in error and not (tmp_path / "new").exists()


def test_commands_that_cannot_be_served_say_why(shell, tmp_path, capsys):
    write_registry(tmp_path / "r.db", only=ONLY[0])
    assert "no such file" in shell("publish", "--keys", "keys", code=2).lower()
    shell("keys", "keys")
    assert "[missing]" in shell("publish", "--keys", "keys", "--registry", "typo.db", code=2)
    assert not (tmp_path / "typo.db").exists()
    assert "[root]" in shell("keys", "other", code=2)
    assert not (tmp_path / "other").exists()
    assert "[no_channel]" in shell("publish", "--keys", "keys", "--channel", "nightly", code=2)
    assert "[no_channel]" in shell("rollback", "--keys", "keys", code=2)
    assert "CUBINERY_TOKEN" in shell("push", "http://127.0.0.1:9", code=2)
    for words in (["publish"], ["yank", "--keys", "keys", "abc"], ["keys", "k", "--threshold", "root=3/2"],
                  ["keys", "k", "--threshold", "boss=1/1"], ["publish", "--keys", "keys", "--days", "0"],
                  ["publish", "--keys", "keys", "--arch", "sm_120a"]):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
