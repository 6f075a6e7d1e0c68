"""The cases of theupdateframework/tuf-conformance that apply, by their names there, through the runtime's client.

Left out: delegations (`test_updater_delegation_graphs`, `test_delegated_expiration`, `test_unusual_role_name`), which
this client never follows, as `test_delegations_are_not_followed` shows; targets in sub-folders and the download cache
(`test_client_downloads_expected_file_in_sub_dir`, `test_artifact_cache`), which releases do not have;
`test_static_repositories`, `test_faketime`, `test_implicit_refresh`, which are about that suite's own programs.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, TargetFile

from tests.trust.repository import FAR, PAST, ROLES, A, B, C, Looker, Repository

FIRST = {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}


# -- basic ------------------------------------------------------------------------------------------------------------


def test_basic_refresh_requests(repository, client):
    """Four requests when nothing is known, two when nothing has changed."""
    client.refresh()
    document = next(path for path in repository.files if path.startswith("targets/"))
    assert repository.asked == ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json", document]
    repository.asked.clear()
    client.refresh()
    assert repository.asked == ["2.root.json", "timestamp.json", document]


def test_basic_refresh_trusted_data(repository, client):
    assert client.refresh() == client.warm() == {"sm_120": A}
    assert client.versions() == FIRST
    repository.release(B)
    assert client.warm() == {"sm_120": A}, "only a refresh asks"
    assert client.refresh() == client.warm() == {"sm_120": B}
    assert client.versions() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}


@pytest.mark.parametrize("root", [b"", b"{}", b"not json", b"\xff\xfe", b'{"signed": {}, "signatures": []}'])
def test_invalid_initial_root(repository, tmp_path, root):
    client = Looker(repository, tmp_path / "c", root=root or b" ")
    assert client.refused() == "metadata"
    assert repository.asked == []


def test_unsigned_initial_root(repository, tmp_path):
    unsigned = json.loads(repository.files["1.root.json"])
    unsigned["signatures"] = []
    client = Looker(repository, tmp_path / "c", root=json.dumps(unsigned).encode())
    assert client.refused() == "signature"
    assert repository.asked == []


@pytest.mark.parametrize("role", ROLES)
def test_unsigned_metadata(repository, client, role):
    client.refresh()
    repository.name("stable", B)
    repository.publish(*ROLES)
    repository.sign(role, [])
    if role == "targets":
        repository.put("snapshot"), repository.put("timestamp")
    if role == "snapshot":
        repository.put("timestamp")
    assert client.refused() == "signature"
    assert client.versions()[role] == 1
    assert client.warm() == {"sm_120": A}


@pytest.mark.parametrize("role", ROLES)
def test_url_and_metadata_version_mismatch(repository, client, role):
    """A file of one version under the name of another."""
    client.refresh()
    repository.name("stable", B)
    repository.publish(*ROLES)
    path = repository.path(role)
    getattr(repository, role).version += 1
    repository.sign(role)
    if role != "timestamp":  # which has no version in its name
        repository.files[path] = repository.files[repository.path(role)]
    getattr(repository, role).version -= 1
    if role == "targets":
        repository.put("snapshot"), repository.put("timestamp")
    if role == "snapshot":
        repository.put("timestamp")
    if role == "timestamp":
        assert client.refresh() == {"sm_120": B}
    else:
        assert client.refused() == "rollback"
        assert client.warm() == {"sm_120": A}


def test_timestamp_content_changes(repository, client):
    """Another timestamp of the same version is not taken over."""
    client.refresh()
    before = client.state.metadata()
    repository.timestamp.expires -= datetime.timedelta(days=1)
    repository.put("timestamp")
    assert client.refresh() == {"sm_120": A}
    assert client.state.metadata() == before


def test_basic_metadata_hash_support(repository, client):
    assert repository.timestamp.snapshot_meta.hashes and repository.snapshot.meta["targets.json"].hashes
    repository.timestamp.snapshot_meta.hashes = repository.timestamp.snapshot_meta.length = None
    repository.sign("timestamp")
    assert client.refresh() == {"sm_120": A}


def test_targets_hash_mismatch(repository, client):
    """Mix and match: a snapshot that names other targets than are served."""
    client.refresh()
    repository.release(B)
    repository.snapshot.meta["targets.json"].hashes = {"sha256": "0" * 64}
    repository.sign("snapshot"), repository.put("timestamp")
    assert client.refused() == "mismatch"
    assert client.versions()["targets"] == 1 and client.warm() == {"sm_120": A}


def test_snapshot_hash_mismatch(repository, client):
    client.refresh()
    repository.release(B)
    repository.timestamp.snapshot_meta.hashes = {"sha256": "0" * 64}
    repository.sign("timestamp")
    assert client.refused() == "mismatch"
    assert client.versions()["snapshot"] == 1 and client.warm() == {"sm_120": A}


def test_mix_and_match_of_two_releases(repository, client):
    """Each file is signed and unexpired, but they belong to different releases."""
    repository.release(B)
    second = dict(repository.files)
    repository.release(C)
    client.refresh()
    for served, reason in (("2.snapshot.json", "3.snapshot.json"), ("2.targets.json", "3.targets.json")):
        kept = repository.files[reason]
        repository.files[reason] = second[served]
        assert Looker(repository, Path(client.settings.state_folder).parent / served).refused() == "mismatch"
        repository.files[reason] = kept


def test_metadata_bytes_match(repository, client):
    """The state holds the bytes that were served, not another serialization of them."""
    repository.edit("timestamp", lambda found: None)  # other spaces
    client.refresh()
    stored = json.loads(client.state.metadata() or b"")
    assert stored["timestamp"].encode() == repository.files["timestamp.json"]


@pytest.mark.parametrize("role", ROLES)
def test_custom_fields(repository, client, role):
    repository.edit(role, lambda found: found.update(unsigned="x"))
    getattr(repository, role).unrecognized_fields["signed-field"] = {"x": 1}
    repository.publish(*ROLES)
    assert client.refresh() == {"sm_120": A}


def test_deprecated_keyid_hash_algorithms(repository, client):
    key = repository.root.keys[repository.root.roles["snapshot"].keyids[0]]
    key.unrecognized_fields = {"keyid_hash_algorithms": "md5"}
    repository.publish(*ROLES)
    assert client.refresh() == {"sm_120": A} and client.versions()["root"] == 2


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_role_404(repository, client, role):
    """test_snapshot_404, test_targets_404 and test_timestamp_404."""
    client.refresh()
    repository.release(B)
    del repository.files[repository.path(role)]
    assert client.refused() == "missing"
    assert client.warm() == {"sm_120": A}


@pytest.mark.parametrize("role", ROLES)
def test_incorrect_metadata_type(repository, client, role):
    """Snapshot metadata, well signed, where another role's belongs, and targets where snapshot belongs."""
    client.refresh()
    repository.release(B)
    repository.publish("root")
    other = "targets" if role == "snapshot" else "snapshot"
    repository.files[repository.path(role)] = repository.files[repository.path(other)]
    if role == "targets":
        repository.put("snapshot"), repository.put("timestamp")
    if role == "snapshot":
        repository.put("timestamp")
    assert client.refused() in ("metadata", "signature")
    assert client.warm() == {"sm_120": A}


def test_delegations_are_not_followed(repository, client):
    """A delegated role that names a channel is not even asked for."""
    signer = CryptoSigner.generate_ed25519()
    role = DelegatedRole("other", [signer.public_key.keyid], 1, True, paths=["*"])
    repository.targets.delegations = Delegations({signer.public_key.keyid: signer.public_key}, {"other": role})
    repository.release()
    assert client.refused("nightly") == "no_channel"
    assert not [path for path in repository.asked if "other" in path]


# -- expiration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_role_expired(repository, client, role):
    """test_root_expired, test_timestamp_expired, test_snapshot_expired, test_targets_expired."""
    client.refresh()
    getattr(repository, role).expires = PAST
    repository.name("stable", B)
    repository.publish(*ROLES)
    assert client.refused() == "expired"
    assert client.versions()["root"] == 2, "a new root counts at once"
    assert client.versions()["targets"] == 1 and client.warm() == {"sm_120": A}
    getattr(repository, role).expires = FAR
    repository.publish(*ROLES)
    assert client.refresh() == {"sm_120": B}


def test_expired_local_root(repository, tmp_path):
    """The given root may have expired long ago, as may those between."""
    repository.root.expires = PAST
    repository.publish("root")
    client = Looker(repository, tmp_path / "c", root=repository.files["2.root.json"])
    assert client.refused() == "expired"
    repository.publish("root")
    repository.root.expires = FAR
    repository.publish("root")
    assert client.refresh() == {"sm_120": A}
    assert client.versions()["root"] == 4


def test_expired_local_timestamp(repository, client, monkeypatch):
    """Freeze: a timestamp that was good when it was stored does not go on being good; a new one heals that."""
    repository.timestamp.expires = FAR - datetime.timedelta(days=2)
    repository.publish("timestamp")
    client.refresh()
    at(monkeypatch, FAR - datetime.timedelta(days=1))
    assert client.refused() == "expired"
    repository.timestamp.expires = FAR
    repository.release(B)
    assert client.refresh() == {"sm_120": B}


def test_freeze_with_an_expired_timestamp(repository, client, monkeypatch):
    """A source that goes on serving what it once had is found out when that expires; warm loads are not disturbed."""
    repository.timestamp.expires = FAR - datetime.timedelta(days=2)
    repository.publish("timestamp")
    frozen = dict(repository.files)
    repository.timestamp.expires = FAR
    repository.release(B)
    repository.files = frozen
    assert client.refresh() == {"sm_120": A}
    at(monkeypatch, FAR - datetime.timedelta(days=1))
    assert client.refused() == "expired"
    assert client.warm() == {"sm_120": A}


def at(monkeypatch: pytest.MonkeyPatch, now: datetime.datetime) -> None:
    """Let TUF's client believe that it is now."""
    from tuf.ngclient._internal import trusted_metadata_set

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return now

    monkeypatch.setattr(trusted_metadata_set.datetime, "datetime", Clock)


# -- channel documents ------------------------------------------------------------------------------------------------


def document_path(repository: Repository) -> str:
    return f"targets/{repository.targets.targets['stable.json'].hashes['sha256']}.stable.json"


def test_client_downloads_expected_file(repository, client):
    repository.name("nightly", B)
    repository.release()
    assert (client.refresh(), client.refresh("nightly")) == ({"sm_120": A}, {"sm_120": B})
    assert client.refused("weekly") == "no_channel"


def test_repository_substitutes_target_file(repository, client):
    """Another channel's document in place of the one that was asked for."""
    repository.name("nightly", B)
    repository.release()
    nightly = f"targets/{repository.targets.targets['nightly.json'].hashes['sha256']}.nightly.json"
    repository.files[document_path(repository)] = repository.files[nightly]
    assert client.refused() == "mismatch"
    repository.targets.targets["stable.json"] = TargetFile.from_data(
        "stable.json", repository.files[nightly], ["sha256"]
    )
    repository.files[document_path(repository)] = repository.files[nightly]
    repository.release()
    assert client.refused() == "metadata", "signed under the wrong name"


def test_multiple_changes_to_target(repository, client):
    client.refresh()
    good = repository.files[document_path(repository)]
    for bad in (good + b" ", good[:-1], b"", good.replace(b"a", b"b")):
        repository.files[document_path(repository)] = bad
        assert client.refused() == "mismatch"
        assert client.warm() == {"sm_120": A}
    repository.release(B)
    assert client.refresh() == {"sm_120": B}


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_download_with_hash_algorithms(repository, client, algorithm):
    body = repository.files[document_path(repository)]
    info = TargetFile.from_data("stable.json", body, [algorithm])
    repository.targets.targets["stable.json"] = info
    repository.files[f"targets/{info.hashes[algorithm]}.stable.json"] = body
    repository.release()
    assert client.refresh() == {"sm_120": A}


def test_download_with_unknown_hash_algorithm(repository, client):
    repository.targets.targets["stable.json"].hashes = {"sha999": "0" * 64}
    repository.files[f"targets/{'0' * 64}.stable.json"] = repository.files[next(iter(repository.files))]
    repository.release()
    assert client.refused() in ("mismatch", "metadata")
