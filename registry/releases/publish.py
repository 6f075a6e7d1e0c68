"""Making releases: every change of what clients load is a new version of the signed targets metadata.

A Draft starts from a registry's newest release and collects a change; `commit` signs and writes it in one transaction,
which fails if somebody else committed meanwhile. Imports tuf.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterable, Mapping, Sequence

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from registry.contract import Index
from registry.errors import ReleaseError
from registry.releases.client import check_root, verify_all
from registry.releases.document import ROLE_FILE, Channel
from registry.releases.signing import can_sign, sign
from registry.store import Store, check_channel

DAYS = {"root": 730, "targets": 365, "snapshot": 365, "timestamp": 7}  # that signatures live


def versions(store: Store) -> dict[str, int]:
    """{role: highest version stored}, 0 for none; timestamp is not numbered, so it is not among them."""
    found = {"root": 0, "targets": 0, "snapshot": 0}
    for path in store.tuf_paths():
        if (match := ROLE_FILE.fullmatch(path)) and match["role"]:
            found[match["role"]] = max(found[match["role"]], int(match["version"]))
    return found


def first_root(store: Store) -> bytes:
    """The root that clients were given first. Raises ReleaseError ('root')."""
    body = store.tuf("1.root.json")
    if body is None:
        raise ReleaseError(f"{store.path}: has no root yet; `python -m registry keys DIR` makes one", reason="root")
    return body


def create_root(
    store: Store, keys: Mapping[str, Sequence[CryptoSigner]], thresholds: Mapping[str, int], now: datetime.datetime
) -> bytes:
    """The first root of a registry, signed and stored. keys: {role: its keys}; thresholds: {role: how many sign}.

    Raises ReleaseError ('root') if the registry has one.
    """
    if store.tuf("1.root.json") is not None:
        raise ReleaseError(f"{store.path}: has a root already; `python -m registry rotate` changes it", reason="root")
    root = Root(version=1, expires=end_after(now, DAYS["root"]), consistent_snapshot=True)
    for role, signers in keys.items():
        for signer in signers:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = thresholds[role]
    body = sign([root], "root", root, keys["root"])
    store.put_tuf({"1.root.json": body}, expected={"1.root.json": None})
    return body


class Draft:
    """The next release of a registry. days: {role: life of its signature}, over DAYS. now: for tests.

    Raises ReleaseError here and in every method, and ConflictError in `commit`.
    """

    def __init__(
        self,
        store: Store,
        signers: Sequence[CryptoSigner],
        days: Mapping[str, int] | None = None,
        now: datetime.datetime | None = None,
    ):
        self.store, self.signers = store, signers
        self.now = now or datetime.datetime.now(datetime.UTC)
        self.files: dict[str, bytes] = {}
        self._days = {**DAYS, **(days or {})}
        first_root(store)
        self.versions = versions(store)
        self._timestamp_before = store.tuf("timestamp.json")
        self.root: Root = check_root(self._body("root"))
        self.channels = self._channels(self.versions["targets"])

    # -- what to change -----------------------------------------------------------------------------------------------

    def publish(self, name: str, archs: Iterable[str] = ()) -> None:
        """The indexes that the registry's own channel of this name points at; of some architectures, or of all."""
        found = self.store.channel(check_channel(name))
        chosen = {arch: digest for arch, digest in found.items() if not archs or arch in archs}
        missing = sorted(set(archs) - set(found))
        if missing or not found:
            what = f"nothing for {', '.join(missing)}" if found else "nothing"
            raise ReleaseError(f"channel {name}: {self.store.path} holds {what}; build it first", reason="no_channel")
        self._set(name, {**self._indexes(name), **chosen})

    def promote(self, source: str, target: str) -> None:
        """What one signed channel stands for, under the name of another."""
        self._set(check_channel(target), self._signed(source).indexes)

    def rollback(self, name: str, archs: Iterable[str] = (), to: str | None = None) -> None:
        """Back to the index that the channel had before its present one, or to the one called `to`."""
        present = self._signed(name).indexes
        if to is not None:
            self._set(name, {**present, self._index(to).arch: to})
            return
        earlier = {arch: self._before(name, arch) for arch in archs or present}
        stuck = [arch for arch, digest in earlier.items() if digest is None]
        if stuck:
            message = f"channel {name}: no earlier index of {', '.join(stuck)} that is not yanked; name one with --to"
            raise ReleaseError(message, reason="argument")
        self._set(name, {**present, **{arch: digest for arch, digest in earlier.items() if digest}})

    def yank(self, digest: str) -> None:
        """No client may load this index any more. Channels that name it go back to what they had before; where there
        is nothing, they keep naming it and clients refuse it."""
        self._index(digest)
        if not self.channels:
            raise ReleaseError("no channel is signed yet: there is nothing to yank from", reason="no_channel")
        for name, channel in self.channels.items():
            self.channels[name] = Channel(name, channel.indexes, tuple(sorted({*channel.yanked, digest})))
        for name, channel in list(self.channels.items()):
            earlier = {arch: self._before(name, arch) for arch, d in channel.indexes.items() if d == digest}
            indexes = {**channel.indexes, **{arch: found for arch, found in earlier.items() if found}}
            self.channels[name] = Channel(name, indexes, self.channels[name].yanked)

    def rotate(self, role: str, keys: Sequence[CryptoSigner] = (), threshold: int = 1) -> None:
        """A new root, in which `keys` replace all of the role's; without keys it only lives longer."""
        before = self.root
        root = copy.deepcopy(before)
        root.version += 1
        root.expires = end_after(self.now, self._days["root"])
        if keys:
            for keyid in list(root.roles[role].keyids):
                root.revoke_key(keyid, role)
            for signer in keys:
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = threshold
        self.signers = [*self.signers, *keys]
        self.files[f"{root.version}.root.json"] = sign([before, root], "root", root, self.signers)
        self.root = root
        follow_up = {"targets": self.sign_targets, "snapshot": self.sign_snapshot, "timestamp": self.sign_timestamp}
        if keys and role != "root" and self.versions["snapshot"]:
            follow_up[role]()

    # -- signing ------------------------------------------------------------------------------------------------------

    def sign_targets(self) -> None:
        """Sign targets with the channels as they stand, and what depends on it."""
        targets = Targets(self.versions["targets"] + 1, expires=end_after(self.now, self._days["targets"]))
        for name, channel in self.channels.items():
            body = channel.to_bytes()
            info = TargetFile.from_data(f"{name}.json", body, ["sha256"])
            targets.targets[info.path] = info
            self.files[f"targets/{info.hashes['sha256']}.{name}.json"] = body
        self._sign("targets", targets)
        self.sign_snapshot()

    def sign_snapshot(self) -> None:
        """Sign snapshot, and timestamp."""
        meta = {"targets.json": self._meta("targets")}
        self._sign(
            "snapshot", Snapshot(self.versions["snapshot"] + 1, None, end_after(self.now, self._days["snapshot"]), meta)
        )
        self.sign_timestamp()

    def sign_timestamp(self) -> None:
        """Sign timestamp if its key is here; else it is left to the server, which holds it."""
        if not can_sign(self.root, "timestamp", self.signers):
            return
        end = end_after(self.now, self._days["timestamp"])
        body = next_timestamp(self.root, self._body("snapshot"), self._timestamp_before, self.signers, end)
        self.files["timestamp.json"] = body

    def _sign(self, role: str, payload: Targets | Snapshot) -> None:
        self.versions[role] = payload.version
        self.files[f"{payload.version}.{role}.json"] = sign([self.root], role, payload, self.signers)

    def _meta(self, role: str) -> MetaFile:
        return MetaFile.from_data(self.versions[role], self._body(role), ["sha256"])

    def commit(self) -> None:
        """Check the release as a client would, and store it; the registry's own channels follow the signed ones."""
        if "timestamp.json" in self.files:
            verify_all(self._read, first_root(self.store), fresh=True)
        numbered = (path for path in self.files if ROLE_FILE.fullmatch(path) and path != "timestamp.json")
        expected = {**dict.fromkeys(numbered), "timestamp.json": self._timestamp_before}
        self.store.put_tuf(self.files, expected=expected)
        follow(self.store, self.channels.values())

    # -- what is there ------------------------------------------------------------------------------------------------

    def history(self, name: str) -> list[dict[str, str]]:
        """The channel's {arch: digest} in each release that is here (an import brings one), oldest first."""
        numbers = range(1, versions(self.store)["targets"] + 1)
        found = [self._channels(n) for n in numbers if self.store.tuf(f"{n}.targets.json") is not None]
        return [channels[name].indexes for channels in found if name in channels]

    def _before(self, name: str, arch: str) -> str | None:
        """The digest that stood before the present one first did, yanked ones left out."""
        digests = [indexes[arch] for indexes in self.history(name) if arch in indexes]
        present = self._signed(name).indexes.get(arch)
        earlier = digests[: digests.index(present)] if present in digests else []
        return next((d for d in reversed(earlier) if d not in self._yanked() and self.store.get_index(d)), None)

    def _set(self, name: str, indexes: dict[str, str]) -> None:
        yanked = self._yanked()
        for arch, digest in indexes.items():
            if digest in yanked and self._indexes(name).get(arch) != digest:
                raise ReleaseError(f"channel {name}: {digest} ({arch}) was yanked", reason="yanked")
        self.channels[name] = Channel(name, dict(indexes), tuple(sorted(yanked)))

    def _indexes(self, name: str) -> dict[str, str]:
        return self.channels[name].indexes if name in self.channels else {}

    def _signed(self, name: str) -> Channel:
        if name not in self.channels:
            there = ", ".join(sorted(self.channels)) or "none"
            raise ReleaseError(f"channel {name!r:.100} is not signed (there are: {there})", reason="no_channel")
        return self.channels[name]

    def _yanked(self) -> set[str]:
        return {digest for channel in self.channels.values() for digest in channel.yanked}

    def _index(self, digest: str) -> Index:
        index = self.store.index(digest)
        if index is None:
            raise ReleaseError(f"{self.store.path}: holds no index {digest!r:.100}", reason="argument")
        return index

    def _channels(self, version: int) -> dict[str, Channel]:
        """Every channel of one version of targets; none of version 0."""
        if version == 0:
            return {}
        found = {}
        for path, info in Metadata[Targets].from_bytes(self._body("targets", version)).signed.targets.items():
            name = path.removesuffix(".json")
            found[name] = Channel.from_bytes(self._read(f"targets/{info.hashes['sha256']}.{path}") or b"", name)
        return found

    def _body(self, role: str, version: int | None = None) -> bytes:
        path = f"{version or self.versions[role]}.{role}.json"
        body = self._read(path)
        if body is None:
            message = f"{self.store.path}: lacks {path}; `python -m registry publish` makes it"
            raise ReleaseError(message, reason="missing")
        return body

    def _read(self, path: str, _: int = 0) -> bytes | None:
        return self.files.get(path) or self.store.tuf(path)


def next_timestamp(
    root: Root, snapshot: bytes, before: bytes | None, signers: Sequence[CryptoSigner], end: datetime.datetime
) -> bytes:
    """A timestamp that leads to `snapshot`, of the version after `before`'s. Raises ReleaseError ('keys')."""
    version = Metadata[Timestamp].from_bytes(before).signed.version + 1 if before else 1
    meta = MetaFile.from_data(Metadata[Snapshot].from_bytes(snapshot).signed.version, snapshot, ["sha256"])
    return sign([root], "timestamp", Timestamp(version, None, end, meta), signers)


def follow(store: Store, channels: Iterable[Channel]) -> None:
    """Point the registry's own channels where the signed ones do, for local readers and for gc."""
    for channel in channels:
        present = store.channel(channel.name)
        for arch, digest in channel.indexes.items():
            if present.get(arch) != digest and (index := store.index(digest)) is not None:
                store.put_index(index, channel.name)


def end_after(now: datetime.datetime, days: int) -> datetime.datetime:
    return (now + datetime.timedelta(days=days)).replace(microsecond=0)
