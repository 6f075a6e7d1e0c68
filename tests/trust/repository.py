"""A repository in memory that signs whatever it is told to, and our client looking at it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from registry.releases.client import Known
from registry.releases.document import Channel
from runtime.config import Config
from runtime.errors import SourceError, UntrustedError
from runtime.trust import resolve
from runtime.trust.state import State

ROLES = ("root", "targets", "snapshot", "timestamp")
A, B, C = "a" * 64, "b" * 64, "c" * 64  # index digests
FAR = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)
PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


class Repository:
    """Payloads to change at will, and `publish`, which numbers and signs them. It is a source too.

    files: what is served, by path below v1/tuf/. asked: every path that a client asked for, in order.
    """

    anyone = "it is a server"

    def __init__(self, where: str = "https://repository.test") -> None:
        self.where = where
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.before_answer: Callable[[str], None] = lambda path: None
        self.signers = {role: [CryptoSigner.generate_ed25519()] for role in ROLES}
        self.root = Root(expires=FAR, consistent_snapshot=True)
        for role in ROLES:
            self.root.add_key(self.signers[role][0].public_key, role)
        self.targets, self.snapshot = Targets(expires=FAR), Snapshot(expires=FAR)
        self.timestamp = Timestamp(expires=FAR)
        for payload in (self.root, self.targets, self.snapshot, self.timestamp):
            payload.version = 0  # `publish` counts from here
        self.name("stable", A)
        self.publish(*ROLES)

    def name(self, channel: str, digest: str, yanked: tuple[str, ...] = ()) -> None:
        """Let the next targets say that a channel's index for sm_120 is this one."""
        body = Channel(channel, {"sm_120": digest}, yanked).to_bytes()
        self.add_target(f"{channel}.json", body)

    def add_target(self, path: str, body: bytes) -> None:
        info = TargetFile.from_data(path, body, ["sha256"])
        self.targets.targets[path] = info
        self.files[f"targets/{info.hashes['sha256']}.{path}"] = body

    def publish(self, *roles: str) -> None:
        """Number these roles anew and sign them, each with all of its `signers`."""
        for role in sorted(roles, key=ROLES.index):
            payload = getattr(self, role)
            payload.version += 1
            self.put(role)

    def release(self, digest: str = "") -> None:
        """New targets, snapshot and timestamp; `stable` names `digest`, if one is given."""
        if digest:
            self.name("stable", digest)
        self.publish("targets", "snapshot", "timestamp")

    def put(self, role: str) -> None:
        """Sign a payload as it stands and serve it."""
        if role == "snapshot":
            self.snapshot.meta["targets.json"] = self._meta("targets")
        if role == "timestamp":
            self.timestamp.snapshot_meta = self._meta("snapshot")
        self.sign(role)

    def sign(self, role: str, signers: list[CryptoSigner] | None = None) -> None:
        """Sign and serve, without filling in what it says of others."""
        metadata: Metadata[Any] = Metadata(getattr(self, role))
        for signer in self.signers[role] if signers is None else signers:
            metadata.sign(signer, append=True)
        self.files[self.path(role)] = metadata.to_bytes()

    def path(self, role: str, version: int = 0) -> str:
        return "timestamp.json" if role == "timestamp" else f"{version or getattr(self, role).version}.{role}.json"

    def edit(self, role: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change a file's JSON after it was signed."""
        found = json.loads(self.files[self.path(role)])
        change(found)
        self.files[self.path(role)] = json.dumps(found).encode()

    def add_key(self, role: str, signer: CryptoSigner | None = None) -> CryptoSigner:
        signer = signer or CryptoSigner.generate_ed25519()
        self.root.add_key(signer.public_key, role)
        self.signers[role].append(signer)
        return signer

    def replace_keys(self, role: str) -> list[CryptoSigner]:
        """One new key for a role; returns the old ones."""
        old = self.signers[role]
        for signer in old:
            self.root.revoke_key(signer.public_key.keyid, role)
        self.signers[role] = []
        self.add_key(role)
        return old

    def _meta(self, role: str) -> MetaFile:
        return MetaFile.from_data(getattr(self, role).version, self.files[self.path(role)], ["sha256"])

    # -- the source ---------------------------------------------------------------------------------------------------

    def check_present(self) -> None:
        pass

    def tuf(self, path: str, cap: int) -> bytes:
        self.asked.append(path)
        self.before_answer(path)
        if path not in self.files:
            raise SourceError(f"{self.where}: no {path}", reason="missing")
        return self.files[path]


class Looker:
    """One client of a repository, by its given root and its state folder, as the runtime is one."""

    def __init__(self, repository: Repository, folder: Path, root: bytes | None = None, **settings: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.repository, self.root = repository, root or repository.files["1.root.json"]
        (folder / "root.json").write_bytes(self.root)
        fields = {"registry": repository.where, "pins": (), "cache": str(folder / "cache"), "channel": "stable",
                  "offline": False, "root": str(folder / "root.json"), "state": str(folder / "state")}  # fmt: skip
        self.settings = Config(**{**fields, **settings})

    def refresh(self, channel: str = "stable") -> dict[str, str]:
        """{arch: digest} as the repository has it now."""
        source: Any = self.repository
        return resolve.resolve(source, channel, (), None, self.settings, newest=True)

    def digests(self) -> dict[str, str]:
        """{arch: digest} as a process would have it: asked for only if it must be."""
        source: Any = self.repository
        return resolve.resolve(source, "stable", (), None, self.settings)

    def refused(self, channel: str = "stable") -> str:
        """The reason for which a refresh fails; fails itself if it does not."""
        try:
            found = self.refresh(channel)
        except UntrustedError as error:
            return error.reason
        raise AssertionError(f"accepted: {found}")

    def warm(self) -> dict[str, str]:
        """What is trusted without asking."""
        asked = list(self.repository.asked)
        found = self.digests()
        assert self.repository.asked == asked, "the warm path asks nobody"
        return found

    @property
    def state(self) -> State:
        return State(self.settings.state_folder, self.repository.where, self.root)

    def versions(self) -> dict[str, int]:
        """What the state holds, 0 for nothing; root is its real version."""
        found = Known.from_bytes(self.state.metadata() or b"").versions()
        return {**found, "root": found["root"] + Metadata[Root].from_bytes(self.root).signed.version}
