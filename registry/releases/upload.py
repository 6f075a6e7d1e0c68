"""What a server does with metadata that is sent to it, and how it keeps the timestamp alive. Imports tuf.

A token alone never changes what clients load: an upload is taken in only if it follows on what is there, version by
version, and if a client that holds what is there now would accept it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Timestamp

from registry.errors import ConflictError, ReleaseError
from registry.releases.client import Client, Known, check_root, signed_by
from registry.releases.document import ROLE_FILE, TARGET_FILE, Channel
from registry.releases.publish import DAYS, Draft, end_after, first_root, follow, next_timestamp, versions
from registry.store import Store

MAX_FILES = 4096  # of one upload
RENEW_S = 6 * 86_400  # a timestamp that lives for less is renewed


def accept(store: Store, files: Mapping[str, bytes], signers: Sequence[CryptoSigner] = ()) -> list[str]:
    """Take in metadata and channel documents, all of them or none; returns the paths that are new.

    Numbered files must continue what is there without a gap, a timestamp must be of a higher version; without one,
    `signers` sign it. What is there already with the same bytes is passed over. Raises ConflictError for a path that
    holds other bytes or a version that does not follow ('conflict', 'version'), ReleaseError for what does not verify.
    """
    new = _new_files(store, files)
    if not new:
        return []
    before, timestamp = versions(store), store.tuf("timestamp.json")
    try:
        channels = _verified(store, new, before, timestamp, signers)
    except ReleaseError as error:  # one release's files may have been read beside another's
        if (versions(store), store.tuf("timestamp.json")) != (before, timestamp):
            raise ConflictError(f"another release came meanwhile: {error}", reason="version") from None
        raise
    numbered = [path for path in new if path != "timestamp.json"]
    store.put_tuf(new, expected={**dict.fromkeys(numbered), "timestamp.json": timestamp})
    follow(store, channels)
    return sorted(new)


def _verified(store: Store, new: dict[str, bytes], before: dict[str, int], timestamp: bytes | None,
              signers: Sequence[CryptoSigner]) -> list[Channel]:  # fmt: skip
    """The channels of a release that holds with these new files; a timestamp that is lacking is made and put among
    them. before, timestamp: what is stored."""
    _check_numbers(new, before)
    root = new.get("1.root.json") or first_root(store)
    roots = _roots(store, new, before["root"])
    _check_signatures(new, roots)
    if "timestamp.json" not in new and (number := _highest(new, "snapshot")):
        if not signers:
            raise ReleaseError("timestamp.json is lacking, and this server has no key to sign one", reason="keys")
        end = end_after(datetime.datetime.now(datetime.UTC), DAYS["timestamp"])
        new["timestamp.json"] = next_timestamp(roots[-1], new[f"{number}.snapshot.json"], timestamp, signers, end)
    _check_timestamp(new.get("timestamp.json"), timestamp)

    def overlay(path: str, _: int = 0) -> bytes | None:
        return new.get(path) or store.tuf(path)

    channels: list[Channel] = []
    if overlay("timestamp.json") is not None:
        with Client(overlay, root, _known(store, before)) as client:
            client.refresh()
            channels = [client.channel(name) for name in client.channels()]
            if client.known.versions()["targets"] != max(before["targets"], _highest(new, "targets")):
                raise ReleaseError("targets: the newest is not the one that the timestamp leads to", reason="version")
    _check_indexes(store, channels)
    return channels


def renew(store: Store, signers: Sequence[CryptoSigner], now: datetime.datetime | None = None) -> bool:
    """Sign the timestamp anew if it lives for less than RENEW_S, or does not lead to the newest snapshot; whether it
    was. Nothing happens before the first release. Raises ReleaseError, ConflictError."""
    newest = versions(store)
    if not newest["snapshot"]:
        return False
    now = now or datetime.datetime.now(datetime.UTC)
    body = store.tuf("timestamp.json")
    if body is not None:
        timestamp = Metadata[Timestamp].from_bytes(body).signed
        left = (timestamp.expires - now).total_seconds()
        if timestamp.snapshot_meta.version == newest["snapshot"] and left > RENEW_S:
            return False
    draft = Draft(store, signers, now=now)
    draft.sign_timestamp()
    if not draft.files:
        raise ReleaseError("timestamp: the key at hand is not the one that the root names", reason="keys")
    draft.commit()
    return True


def _new_files(store: Store, files: Mapping[str, bytes]) -> dict[str, bytes]:
    if len(files) > MAX_FILES:
        raise ReleaseError(f"{len(files)} files; at most {MAX_FILES} at once", reason="argument")
    new = {}
    for path, body in files.items():
        if not (ROLE_FILE.fullmatch(path) or TARGET_FILE.fullmatch(path)):
            raise ReleaseError(f"{path!r:.200} is no name of a metadata file or channel document", reason="argument")
        stored = store.tuf(path)
        if stored is not None and stored != body and path != "timestamp.json":
            raise ConflictError(f"{path} is there already with other content: somebody else has published")
        if stored != body:
            new[path] = body
    return new


def _check_numbers(new: Mapping[str, bytes], before: Mapping[str, int]) -> None:
    """ConflictError unless each role's new versions continue the stored ones, and say so themselves."""
    for role, highest in before.items():
        found = sorted(int(m["version"]) for path in new if (m := ROLE_FILE.fullmatch(path)) and m["role"] == role)
        if found != list(range(highest + 1, highest + 1 + len(found))):
            message = (
                f"{role}: versions {found} do not continue {highest}: another release came first, or one is lacking"
            )
            raise ConflictError(message, reason="version")
        for version in found:
            if (stated := _version(new[f"{version}.{role}.json"])) != version:
                raise ReleaseError(f"{version}.{role}.json is of version {stated}", reason="version")


def _check_timestamp(new: bytes | None, before: bytes | None) -> None:
    if new is not None and before is not None and _version(new) <= _version(before):
        message = f"timestamp: version {_version(new)} is not above the present {_version(before)}"
        raise ConflictError(message, reason="version")


def _version(body: bytes) -> int:
    try:
        return int(Metadata.from_bytes(body).signed.version)
    except Exception as error:  # tuf's DeserializationError hides what it found
        raise ReleaseError(f"no TUF metadata: {error}", reason="metadata") from None


def _highest(new: Mapping[str, bytes], role: str) -> int:
    return max((int(m["version"]) for path in new if (m := ROLE_FILE.fullmatch(path)) and m["role"] == role), default=0)


def _roots(store: Store, new: Mapping[str, bytes], newest: int) -> list[Root]:
    """The root in force and those that are new, each signed by the one before."""
    present = store.tuf(f"{newest}.root.json")
    roots = [check_root(present)] if present is not None else []
    for number in range(newest + 1, max(newest, _highest(new, "root")) + 1):
        body = new[f"{number}.root.json"]
        if roots and not signed_by(roots[-1], "root", body):
            raise ReleaseError(f"{number}.root.json: not signed by the root before it", reason="signature")
        roots.append(check_root(body))
    return roots


def _check_signatures(new: Mapping[str, bytes], roots: Sequence[Root]) -> None:
    """ReleaseError unless one of the roots names the keys of all new targets and snapshots, also of those that the
    timestamp does not lead to."""
    for path, body in new.items():
        match = ROLE_FILE.fullmatch(path)
        role = match["role"] if match else None
        if role in ("targets", "snapshot") and not any(signed_by(root, role, body) for root in roots):
            raise ReleaseError(f"{path}: not signed by the keys that the root names", reason="signature")


def _check_indexes(store: Store, channels: Iterable[Channel]) -> None:
    there = store.indexes()
    for channel in channels:
        for digest in channel.indexes.values():
            if digest not in there:
                message = f"channel {channel.name}: index {digest} is not here; send it first"
                raise ReleaseError(message, reason="missing")


def _known(store: Store, before: Mapping[str, int]) -> Known:
    """What a client holds that has seen everything that is there now."""
    roots = tuple(store.tuf(f"{n}.root.json") or b"" for n in range(2, before["root"] + 1))
    snapshot, targets = (store.tuf(f"{before[role]}.{role}.json") for role in ("snapshot", "targets"))
    return Known(roots, store.tuf("timestamp.json"), snapshot, targets)
