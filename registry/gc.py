"""What a registry file may forget, and forgetting it.

Kept are the indexes that any channel, signed or not, named in its last 10 moves, what the builder's sources stand for
now, and everything younger than a day; and of each the cubins, artifacts and PTX that belong to it.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any

from registry.contract import ContractError
from registry.releases.document import ROLE_FILE, TARGET_FILE, Channel
from registry.store import Store

KEEP_INDEXES = 10  # of each channel and architecture
KEEP_S = 86_400.0  # seconds: what is younger stays, named or not
DIGEST = re.compile(r'"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Plan:
    """Primary keys of what nothing keeps. parts: of indexes. bytes: of the frames among them."""

    indexes: tuple[str, ...]
    parts: tuple[str, ...]
    artifacts: tuple[str, ...]
    ptx: tuple[str, ...]
    blobs: tuple[str, ...]
    bytes: int

    def counts(self) -> dict[str, int]:
        names = ("indexes", "parts", "artifacts", "ptx", "blobs")
        return {**{name: len(getattr(self, name)) for name in names}, "bytes": self.bytes}


def collect(
    store: Store,
    *,
    keep_indexes: int = KEEP_INDEXES,
    keep_s: float = KEEP_S,
    now: float | None = None,
    dry_run: bool = False,
) -> Plan:
    """Forget what nothing keeps, in one transaction; with `dry_run` only find it. now: Unix seconds.

    Readers go on undisturbed, writers wait. The file does not shrink: what comes next fills the free pages.
    """
    since = (time.time() if now is None else now) - keep_s
    if dry_run:
        with store.snapshot():
            return _plan(store, keep_indexes, since)
    with store.transaction() as db:
        plan = _plan(store, keep_indexes, since)
        for table, key, gone in (
            ("indexes", "digest", plan.indexes + plan.parts),
            ("artifacts", "fingerprint", plan.artifacts),
            ("ptx", "fingerprint", plan.ptx),
            ("blobs", "sha256", plan.blobs),
        ):
            db.conn.executemany(f"DELETE FROM {table} WHERE {key} = ?", [(value,) for value in gone])
        db.execute("DELETE FROM history WHERE digest NOT IN (SELECT digest FROM indexes)")
    return plan


def signed_channels(store: Store) -> dict[str, list[dict[str, str]]]:
    """What the signed releases in the store say of each channel: {arch: index digest}, newest version first.

    A document that cannot be read counts as naming every digest in it.
    """
    targets = {int(m["version"]): path for path in store.tuf_paths()
               if (m := ROLE_FILE.fullmatch(path)) and m["role"] == "targets"}  # fmt: skip
    found: dict[str, list[dict[str, str]]] = {}
    for version in sorted(targets, reverse=True):
        for path in _documents(store.tuf(targets[version]) or b""):
            name = TARGET_FILE.fullmatch(path)["channel"]  # type: ignore[index]
            body = store.tuf(path) or b""
            try:
                indexes = Channel.from_bytes(body, name).indexes
            except ContractError:
                indexes = {digest: digest for digest in _digests_in(body)}
            found.setdefault(name, []).append(indexes)
    return found


def _documents(targets: bytes) -> list[str]:
    """Paths of the channel documents that a targets file names; none if it cannot be read."""
    try:
        named = json.loads(targets)["signed"]["targets"]
        paths = [f"targets/{target['hashes']['sha256']}.{path}" for path, target in named.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [path for path in paths if TARGET_FILE.fullmatch(path)]


def _plan(store: Store, keep_indexes: int, since: float) -> Plan:
    everything = {table: store.ages(table) for table in ("indexes", "artifacts", "ptx")}
    young = {table: {key for key, added in rows.items() if added >= since} for table, rows in everything.items()}
    indexes = (_named(store, keep_indexes) & everything["indexes"].keys()) | young["indexes"]
    frames = set()
    for digest in tuple(indexes):
        found = frames_of(store, digest)
        indexes |= found & everything["indexes"].keys()  # its parts
        frames |= found
    wanted = store.wanted()
    artifacts, texts = set(), set()
    for fingerprint, artifact in store.artifacts().items():
        if fingerprint in wanted or fingerprint in young["artifacts"] or artifact.frame_sha256 in frames:
            artifacts.add(fingerprint)
            frames.add(artifact.frame_sha256)
            texts.add(artifact.ptx_sha256)
    ptx = set()
    for fingerprint, ptx_sha256, frame_sha256 in store.ptx_rows():
        if fingerprint in wanted or fingerprint in young["ptx"] or ptx_sha256 in texts:
            ptx.add(fingerprint)
            frames.add(frame_sha256)
    blobs = store.unnamed_blobs(frames, since)
    gone, parts = everything["indexes"].keys() - indexes, store.parts()
    return Plan(
        tuple(sorted(gone - parts)),
        tuple(sorted(gone & parts)),
        tuple(sorted(everything["artifacts"].keys() - artifacts)),
        tuple(sorted(everything["ptx"].keys() - ptx)),
        tuple(sorted(blobs)),
        sum(blobs.values()),
    )


def _named(store: Store, keep: int) -> set[str]:
    """Indexes that a channel names, or named in its last `keep` moves."""
    named: set[str] = set()
    for name, current in store.channels().items():
        named |= set(current.values())
        named |= _last([{move.arch: move.digest} for move in store.history(name)], keep)
    for signed in signed_channels(store).values():
        named |= _last(signed, keep)
    return named


def _last(moves: list[dict[str, str]], keep: int) -> set[str]:
    """The last `keep` different digests of each architecture. moves: newest first."""
    found: dict[str, dict[str, None]] = {}
    for move in moves:
        for arch, digest in move.items():
            of_arch = found.setdefault(arch, {})
            if len(of_arch) < keep:
                of_arch[digest] = None
    return {digest for of_arch in found.values() for digest in of_arch}


def frames_of(store: Store, digest: str) -> set[str]:
    """Every digest in an index, whatever its format, and in its parts: these and its frames are among them."""
    found = _digests_in(store.get_index(digest))
    for part in found & store.parts():
        found |= _digests_in(store.get_index(part))
    return found


def _digests_in(body: bytes | None) -> set[str]:
    return set(DIGEST.findall((body or b"").decode(errors="replace")))


def to_json(store: Store, plan: Plan, dry_run: bool) -> dict[str, Any]:
    """What `gc --json` prints."""
    return {"path": str(store.path), "dry_run": dry_run, "deleted": plan.counts(), "indexes": list(plan.indexes)}
