"""Through the real client on a release of three artifacts: no flipped bit changes what is trusted or loaded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.contract import CubineryError, Index, OpenIndex
from registry.frames import unpack
from registry.releases import publish, signing
from registry.store import Store
from runtime.config import Config
from runtime.errors import SourceError
from runtime.trust import resolve
from tests.runtime.fakes import write_registry
from tests.soak.size import size

ARTIFACTS = 3
SAMPLES = 40  # of each file


class Release:
    """A source that serves what the store does, but for one file. asked: whether that file was asked for."""

    where = "https://release.test"
    anyone = "it is a server"

    def __init__(self, folder: Path):
        write_registry(folder / "r.db", only="16-d64")
        with Store(folder / "r.db") as store:
            roles = dict.fromkeys(signing.ROLES, 1)
            keys = signing.make_keys(folder / "keys", roles)
            now = publish.datetime.datetime.now(publish.datetime.timezone.utc)
            self.root = publish.create_root(store, keys, roles, now)
            whole = Index.from_bytes(store.get_index(store.channel("stable")["sm_120"]) or b"")
            kept = Index(whole.arch, whole.release, whole.artifacts[:ARTIFACTS], whole.rows, whole.abis)
            store.put_index(kept, "stable")
            draft = publish.Draft(store, signing.read_keys([folder / "keys"]))
            draft.rotate("timestamp", signing.make_keys(folder / "keys2", {"timestamp": 1})["timestamp"])
            draft.publish("stable")
            draft.sign_targets()
            draft.commit()
            self.digests = store.channel("stable")
            self.files = {path: store.tuf(path) or b"" for path in store.tuf_paths() if path != "1.root.json"}
            self.index = store.get_index(self.digests["sm_120"]) or b""
            self.blobs = {a.frame_sha256: store.get_frame(a.frame_sha256) or b"" for a in kept.artifacts}
        self.artifacts = kept.artifacts
        self.flipped: dict[str, bytes] = {}

    def check_present(self) -> None:
        pass

    def tuf(self, path: str, cap: int) -> bytes:
        if path not in self.files:
            raise SourceError(f"no {path}", reason="missing")
        return self.flipped.get(path, self.files[path])


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("release"))


def flips(body: bytes, seed: str) -> list[bytes]:
    """`body` with one bit flipped: each bit under `make soak`, else some that the seed draws."""
    bits = range(8 * len(body))
    chosen = random.Random(seed).sample(bits, min(size(SAMPLES, len(bits)), len(bits)))
    return [body[: bit // 8] + bytes([body[bit // 8] ^ 1 << bit % 8]) + body[bit // 8 + 1 :] for bit in chosen]


def settings_in(folder: Path, root: bytes) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "root.json").write_bytes(root)
    where = {"root": str(folder / "root.json"), "state": str(folder / "state")}
    return Config("https://release.test", (), str(folder / "cache"), "stable", False, **where)


def outcome(ask: Callable[[], Any]) -> Any:
    """What is returned, or the reason of a typed error; any other error passes."""
    try:
        return ask()
    except CubineryError as error:
        assert error.reason
        return error.reason


def resolved(release: Release, settings: Config) -> dict[str, str]:
    source: Any = release
    return resolve.resolve(source, "stable", (), None, settings, newest=True)


FILES = ("2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json", "targets/")


@pytest.mark.parametrize("name", FILES)
def test_metadata_as_served(release, tmp_path, name):
    """To a client that knows nothing, and to one that knows the release already."""
    (path,) = [path for path in release.files if path.startswith(name)]
    warm = settings_in(tmp_path / "warm", release.root)
    assert resolved(release, warm) == release.digests
    refused = 0
    for n, body in enumerate(flips(release.files[path], path)):
        release.flipped = {path: body}
        cold = settings_in(tmp_path / f"cold{n}", release.root)
        for settings in (cold, warm):
            found = outcome(lambda settings=settings: resolved(release, settings))
            refused += isinstance(found, str)
            assert isinstance(found, str) or found == release.digests
            source: Any = release
            kept = resolve.trusted(source, "stable", settings)
            assert kept is None or kept.indexes == release.digests
        release.flipped = {}
        assert resolved(release, cold) == release.digests, "what was refused has left nothing behind"
        shutil.rmtree(tmp_path / f"cold{n}")
    assert refused, "flips are seen"


def test_the_given_root(release, tmp_path):
    for n, body in enumerate(flips(release.root, "root")):
        settings = settings_in(tmp_path / str(n), body)
        found = outcome(lambda settings=settings: resolved(release, settings))
        assert isinstance(found, str) or found == release.digests
        shutil.rmtree(tmp_path / str(n))


def test_the_index(release):
    digest = release.digests["sm_120"]
    assert OpenIndex(release.index, digest).whole.digest == digest
    for body in flips(release.index, "index"):
        assert isinstance(outcome(lambda body=body: OpenIndex(body, digest)), str)


def test_the_blobs(release):
    assert len(release.artifacts) == ARTIFACTS
    for artifact in release.artifacts:
        frame = release.blobs[artifact.frame_sha256]
        assert unpack(frame, artifact)
        for body in flips(frame, artifact.variant):
            assert isinstance(outcome(lambda body=body, artifact=artifact: unpack(body, artifact)), str)
