"""The cases of theupdateframework/tuf-conformance about keys, rollbacks and rotations: see test_conformance.py."""

from __future__ import annotations

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root

from runtime.errors import UntrustedError
from tests.trust.repository import ROLES, A, B, C, Looker, Repository

# -- keys -------------------------------------------------------------------------------------------------------------


def test_snapshot_does_not_meet_threshold(repository, client):
    repository.add_key("snapshot"), repository.add_key("snapshot")
    repository.root.roles["snapshot"].threshold = 3
    repository.publish(*ROLES)
    client.refresh()
    repository.signers["snapshot"].pop()
    repository.release(B)
    assert client.refused() == "signature"
    assert client.versions()["snapshot"] == 2 and client.warm() == {"sm_120": A}


def test_snapshot_has_too_few_keys(repository, client):
    for _ in range(4):
        repository.add_key("snapshot")
    repository.root.roles["snapshot"].threshold = 6
    repository.publish(*ROLES)
    assert client.refused() == "signature"
    assert client.versions() == {"root": 2, "timestamp": 2, "snapshot": 0, "targets": 0}


def test_duplicate_keys(repository, client):
    """One key that is listed, and signs, often."""
    signer = repository.add_key("snapshot")
    repository.root.roles["snapshot"].threshold = 2
    repository.signers["snapshot"] = [signer]
    repository.publish(*ROLES)
    keyids = repository.root.roles["snapshot"].keyids
    keyids[:] = [signer.public_key.keyid] * 5

    def repeat(found):
        found["signatures"] *= 5

    repository.edit("snapshot", repeat)
    repository.put("timestamp")
    assert client.refused() in ("metadata", "signature")
    assert client.versions()["snapshot"] == 0


def test_duplicate_sig_keyids(repository, client):
    def repeat(found):
        found["signatures"] *= 2

    repository.edit("snapshot", repeat)
    repository.publish("timestamp")
    assert client.refused() == "metadata"
    assert client.versions()["snapshot"] == 0


KEYTYPES = {
    "rsa": lambda: CryptoSigner.generate_rsa(scheme="rsassa-pss-sha256"),
    "ecdsa": CryptoSigner.generate_ecdsa,
    "ed25519": CryptoSigner.generate_ed25519,
}


@pytest.mark.parametrize("keytype", KEYTYPES)
def test_keytype_and_scheme(repository, client, keytype):
    """Keys that another publisher may use, good and with a wrong signature."""
    signer = repository.add_key("root", KEYTYPES[keytype]())
    repository.root.roles["root"].threshold = 2
    repository.publish("root")
    assert client.refresh() == {"sm_120": A} and client.versions()["root"] == 2
    repository.publish("root")

    def falsify(found):
        for signature in found["signatures"]:
            if signature["keyid"] == signer.public_key.keyid:
                signature["sig"] = "30" + signature["sig"][2:-2] + "00"

    repository.edit("root", falsify)
    assert client.refused() == "signature"
    assert client.versions()["root"] == 2


@pytest.mark.parametrize("bad", ["ab" * 64, "", "no hex"])
def test_invalid_sig_in_valid_metadata(repository, client, bad):
    """One good signature is enough for a threshold of one, whatever stands beside it."""
    first = repository.signers["timestamp"][0].public_key.keyid
    repository.add_key("timestamp")
    repository.publish("root", "timestamp")

    def falsify(found):
        for signature in found["signatures"]:
            if signature["keyid"] == first:
                signature["sig"] = bad

    repository.edit("timestamp", falsify)
    assert client.refresh() == {"sm_120": A}


# -- rollback ---------------------------------------------------------------------------------------------------------


def test_new_timestamp_version_rollback(repository, client):
    old = repository.files["timestamp.json"]
    repository.publish("timestamp")
    client.refresh()
    repository.files["timestamp.json"] = old
    assert client.refused() == "rollback"
    assert client.versions()["timestamp"] == 2


def test_snapshot_rollback(repository, client):
    """A new timestamp that leads to an older snapshot."""
    repository.release(B)
    client.refresh()
    repository.snapshot.version = 1
    repository.publish("timestamp")
    assert client.refused() == "rollback"
    assert client.versions()["snapshot"] == 2 and client.warm() == {"sm_120": B}


def test_targets_rollback(repository, client):
    """A new snapshot that names older targets."""
    repository.release(B)
    client.refresh()
    repository.targets.version = 1
    repository.publish("snapshot", "timestamp")
    assert client.refused() == "rollback"
    assert client.versions()["targets"] == 2 and client.warm() == {"sm_120": B}


def test_targets_role_removal(repository, client):
    client.refresh()
    repository.snapshot.version += 1
    repository.snapshot.meta = {"other.json": repository.snapshot.meta["targets.json"]}
    repository.sign("snapshot")
    repository.publish("timestamp")
    assert client.refused() == "metadata"
    assert client.versions()["snapshot"] == 1 and client.warm() == {"sm_120": A}


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_role_fast_forward_recovery(repository, client, role):
    """test_targets_fast_forward_recovery and its two sisters: somebody with the online keys signs an enormous version;
    new keys bring clients back to the real ones."""
    before = {name: getattr(repository, name).version for name in ROLES}
    getattr(repository, role).version = 99_999
    repository.release(C)
    assert client.refresh() == {"sm_120": C} and client.versions()[role] == 100_000
    if role == "targets":
        repository.replace_keys("snapshot")  # the snapshot that names the version must go
        repository.targets.version = before["targets"]
    else:
        repository.replace_keys(role)
        getattr(repository, role).version = before[role]
    repository.replace_keys("timestamp")
    repository.name("stable", B)
    repository.publish(*ROLES)
    assert client.refresh() == client.warm() == {"sm_120": B}
    assert client.versions()[role] < 10
    assert client.refresh() == {"sm_120": B}, "and they stay there"
    assert client.versions()[role] < 10


# -- rotations of keys ------------------------------------------------------------------------------------------------

POOL = [CryptoSigner.generate_ed25519() for _ in range(10)]

# Each root: (its keys, its threshold, who signs it, whether a client takes it), by numbers of POOL.
ROOT_ROTATIONS = {
    "1-of-1-key-rotation": [([1], 1, [1], True), ([2], 1, [2, 1], True), ([2], 1, [2], True)],
    "1-of-1-key-rotation-unused-signatures": [
        ([1], 1, [3, 1, 4], True), ([2], 1, [3, 2, 1, 4], True), ([2], 1, [3, 2, 4], True)],
    "3-of-5-sign-with-different-keycombos": [
        ([0, 1, 2, 3, 4], 3, combo, True) for combo in ([0, 2, 4], [0, 4, 1], [0, 1, 3], [2, 3, 4])],
    "3-of-5-one-key-rotated": [([0, 1, 2, 3, 4], 3, [0, 2, 4], True), ([0, 1, 3, 4, 5], 3, [0, 4, 1], True)],
    "3-of-5-one-key-rotated-with-intermediate-step": [
        ([0, 1, 2, 3, 4], 3, [0, 2, 4], True), ([0, 1, 3, 4, 5], 3, [0, 2, 4, 5], True),
        ([0, 1, 3, 4, 5], 3, [0, 4, 5], True)],
    "3-of-5-all-keys-rotated-with-intermediate-step": [
        ([0, 1, 2, 3, 4], 3, [0, 2, 4], True), ([5, 6, 7, 8, 9], 3, [0, 2, 4, 5, 6, 7], True),
        ([5, 6, 7, 8, 9], 3, [5, 6, 7], True)],
    "1-of-3-threshold-increase-to-2-of-3": [([1, 2, 3], 1, [1], True), ([1, 2, 3], 2, [1, 2], True)],
    "2-of-3-threshold-decrease-to-1-of-3": [
        ([1, 2, 3], 2, [1, 2], True), ([1, 2, 3], 1, [1, 2], True), ([1, 2, 3], 1, [1], True)],
    "1-of-2-threshold-increase-to-2-of-2": [([1], 1, [1], True), ([1, 2], 2, [1, 2], True)],
    "1-of-1-key-rotation-fail-not-signed-with-old-key": [([1], 1, [1], True), ([2], 1, [2, 3, 4], False)],
    "1-of-1-key-rotation-fail-not-signed-with-new-key": [([1], 1, [1], True), ([2], 1, [1, 3, 4], False)],
    "3-of-5-one-key-rotate-fails-not-signed-with-3-new-keys": [
        ([0, 1, 2, 3, 4], 3, [0, 2, 4], True), ([0, 1, 3, 4, 5], 3, [0, 2, 4], False)],
    "3-of-5-one-key-rotate-fails-not-signed-with-3-old-keys": [
        ([0, 1, 2, 3, 4], 3, [0, 2, 4], True), ([0, 1, 3, 4, 5], 3, [0, 4, 5], False)],
    "1-of-3-threshold-bump-to-2-of-3-fails-new-threshold-not-reached": [
        ([1, 2, 3], 1, [1], True), ([1, 2, 3], 2, [2], False)],
    "2-of-3-threshold-decrease-fails-old-threshold-not-reached": [
        ([1, 2, 3], 2, [1, 2], True), ([1, 2, 3], 1, [1], False)],
}  # fmt: skip

ROTATIONS = {
    "1-of-1-key-rotation": ([2], 1, [2], True),
    "1-of-1-key-rotation-unused-signatures": ([1], 1, [3, 1, 4], True),
    "1-of-1-key-rotation-fail-not-signed-with-new-key": ([2], 1, [1, 3, 4], False),
    "3-of-5-one-key-signature-wrong-not-signed-with-3-expected-keys": ([0, 1, 3, 4, 5], 3, [0, 2, 4], False),
    "2-of-5-one-key-signature-missing-threshold-not-reached": ([0, 1, 3, 4, 5], 3, [0, 4], False),
    "3-of-5-sign-first-combo": ([0, 1, 2, 3, 4], 3, [0, 2, 4], True),
    "3-of-5-sign-second-combo": ([0, 1, 2, 3, 4], 3, [0, 4, 1], True),
    "3-of-5-sign-fifth-combo": ([0, 1, 2, 3, 4], 3, [2, 3, 4], True),
}


def set_keys(root: Root, role: str, keys: list[int], threshold: int) -> None:
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for number in keys:
        root.add_key(POOL[number].public_key, role)
    root.roles[role].threshold = threshold


@pytest.mark.parametrize("roots", ROOT_ROTATIONS.values(), ids=ROOT_ROTATIONS.keys())
def test_root_rotation(repository, tmp_path, roots):
    """All of these roots are there when the client comes, which was given the first."""
    repository.root.version = 0
    accepted = 0
    for keys, threshold, signers, good in roots:
        set_keys(repository.root, "root", keys, threshold)
        repository.signers["root"] = [POOL[number] for number in signers]
        repository.publish("root")
        accepted += good
    client = Looker(repository, tmp_path / "c")
    if accepted == len(roots):
        assert client.refresh() == {"sm_120": A}
    else:
        assert client.refused() == "signature"
    assert client.versions()["root"] == accepted


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())
def test_non_root_rotations(repository, client, role, rotation):
    keys, threshold, signers, good = rotation
    client.refresh()
    set_keys(repository.root, role, keys, threshold)
    repository.signers[role] = [POOL[number] for number in signers]
    repository.name("stable", B)
    repository.publish(*ROLES)
    if good:
        assert client.refresh() == {"sm_120": B}
    else:
        assert client.refused() == "signature"
        assert client.warm() == {"sm_120": A}
    assert client.versions()["root"] == 2


def test_max_root_rotations(repository, client):
    """More roots than one refresh follows are followed by the next; what is not reached yet is not trusted."""
    for _ in range(256):
        repository.publish("root")
    repository.replace_keys("timestamp")
    repository.publish("root", "timestamp")
    assert client.refused() == "signature"
    assert client.versions()["root"] == 257
    assert client.refresh() == {"sm_120": A}
    assert client.versions()["root"] == 258


def test_unknown_keys_are_named(repository, client):
    """A repository of the same names under other keys."""
    client.refresh()
    impostor = Repository()
    impostor.release(B)
    repository.files = impostor.files
    with pytest.raises(UntrustedError, match="timestamp was signed by 0/1 keys") as error:
        client.refresh()
    assert error.value.reason == "signature" and repository.where in str(error.value)
    assert client.warm() == {"sm_120": A}
