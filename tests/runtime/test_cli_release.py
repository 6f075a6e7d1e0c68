"""refresh, doctor, prefetch and lock with a signed registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from registry.contract import Artifact, Index
from runtime.cli import commands as cli
from runtime.errors import UntrustedError
from runtime.load import session
from tests.runtime.fakes import FakeBackend, toy_index
from tests.support.cli import run
from tests.trust.repository import FAR, PAST, Repository

URL = "https://repository.test"
Q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)


class Registry(Repository):
    """Signed releases of toy indexes."""

    def __init__(self) -> None:
        super().__init__(URL)
        first, self.frames = toy_index()
        self.indexes: dict[str, Index] = {}
        self.release_index(first)

    def release_index(self, index: Index) -> str:
        self.indexes[index.digest] = index
        self.release(index.digest)
        return index.digest

    def index(self, digest: str) -> bytes:
        return self.indexes[digest].to_bytes()

    def frame(self, artifact: Artifact) -> bytes:
        return self.frames[artifact.frame_sha256]

    def discard(self, kind: str, digest: str) -> bool:
        return False

    anyone = "it is a server"

    def check_present(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The settings name it by environment variables, as a service's would."""
    made = Registry()
    (tmp_path / "root.json").write_bytes(made.files["1.root.json"])
    for name, value in (("REGISTRY", URL), ("ROOT", tmp_path / "root.json"), ("STATE", tmp_path / "state")):
        monkeypatch.setenv(f"CUBINERY_{name}", str(value))
    monkeypatch.setattr(session, "open_source", lambda settings: made)
    return made


def said(capsys, *argv: str) -> str:
    assert cli.main([*argv]) == 0
    return capsys.readouterr().out


def newest(repository: Registry) -> str:
    """The digest of an index that is released now."""
    index, _ = toy_index()
    return repository.release_index(index.replace(release=f"0.{len(repository.indexes) + 1}"))


def test_refresh_says_what_is_trusted_now(repository: Registry, capsys):
    code, report = run(capsys, "refresh")
    assert code == 0 and report["indexes"] == {"sm_120": toy_index()[0].digest}
    assert report["where"] == URL and report["release"]["version"] == repository.targets.version
    digest = newest(repository)
    assert f"sm_120 {digest}\nrelease {repository.targets.version} verified" in said(capsys, "refresh")


def test_refresh_without_signatures(registry: Path, capsys):
    assert "not signed here: nothing to refresh" in said(capsys, "refresh", "--registry", str(registry))


def test_a_refresh_that_fails_is_an_error(repository: Registry, capsys):
    repository.edit("timestamp", lambda value: value["signed"].update(version=99))
    code, report = run(capsys, "refresh")
    assert code == 1 and report["error"]["type"] == "UntrustedError" and report["error"]["reason"] == "signature"


def test_doctor_shows_the_age_of_a_release(repository: Registry, tmp_path: Path, capsys):
    code, report = run(capsys, "doctor")
    assert code == 0 and report["release"]["root"] == str(tmp_path / "root.json")
    assert report["release"]["version"] == repository.targets.version and report["release"]["age_s"] < 60
    text = said(capsys, "doctor")
    assert f"release   version {repository.targets.version}, verified 0 s ago, ends {FAR:%Y-%m-%d}" in text
    assert "a newer release may exist" not in text


def test_doctor_shows_that_a_timestamp_has_ended(repository: Registry, tmp_path: Path, capsys):
    """As with a bundle, which claims no freshness."""
    said(capsys, "refresh")
    (path,) = (tmp_path / "state").rglob("trusted.json")
    text = json.dumps(_with(json.loads(path.read_text()), "timestamp_expires", 1e9))
    path.write_text(text)
    assert "timestamp ended" in said(capsys, "doctor") and "a newer release may exist" in said(capsys, "doctor")


def _with(value: Any, name: str, given: float) -> Any:
    """A JSON value in which each member of this name is `given`."""
    if isinstance(value, dict):
        return {key: given if key == name else _with(item, name, given) for key, item in value.items()}
    return value


def test_doctor_says_why_a_release_is_refused(repository: Registry, capsys):
    repository.targets.expires = PAST
    repository.publish("targets", "snapshot", "timestamp")
    code, report = run(capsys, "doctor")
    assert code == 1 and "expired" in report["problems"][0]
    assert cli.main(["doctor"]) == 1
    assert "nothing verified yet" in capsys.readouterr().out


def test_prefetch_asks_for_the_newest_release_and_a_call_does_not(repository: Registry, backend: FakeBackend, capsys):
    said(capsys, "prefetch")
    digest = newest(repository)
    asked = len(repository.asked)
    runtime.configure()
    runtime.flash_attn(Q, Q, Q)
    assert session.current().digests() != {"sm_120": digest} and len(repository.asked) == asked
    code, report = run(capsys, "prefetch")
    assert code == 0 and report["indexes"] == {"sm_120": digest} and len(repository.asked) > asked


def test_threat_a_yank_spares_what_a_lock_file_names(repository: Registry, backend, tmp_path: Path, capsys):
    lock, first = tmp_path / "cubinery.lock", toy_index()[0].digest
    said(capsys, "lock", "--lock", str(lock))
    repository.name("stable", first, yanked=(first,))
    repository.publish("targets", "snapshot", "timestamp")
    code, report = run(capsys, "refresh")
    assert code == 1 and report["error"]["reason"] == "yanked"
    runtime.configure()
    with pytest.raises(UntrustedError) as error:
        runtime.flash_attn(Q, Q, Q)
    assert error.value.reason == "yanked"
    runtime.configure(lock=lock)
    runtime.flash_attn(Q, Q, Q)


def test_a_newer_release_does_not_load_under_a_lock_file(repository: Registry, backend, tmp_path: Path, capsys):
    lock, first = tmp_path / "cubinery.lock", toy_index()[0].digest
    said(capsys, "lock", "--lock", str(lock))
    digest = newest(repository)
    text = said(capsys, "refresh", "--lock", str(lock))
    assert digest in text and f"{lock} says what is loaded" in text
    asked = len(repository.asked)
    assert first in said(capsys, "prefetch", "--lock", str(lock)) and len(repository.asked) == asked
    runtime.configure(lock=lock)
    now = session.current()
    assert now.refresh() == {"sm_120": digest} and now.digests() == {"sm_120": first}
    runtime.flash_attn(Q, Q, Q)
