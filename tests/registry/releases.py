"""Signed releases for tests: keys in memory, one registry after the other."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from registry.contract import Index
from registry.releases import publish, signing
from registry.store import Store
from tests.registry.samples import KEYS, artifact, cubin, index, ptx


def keys(store: Store, folder: Path) -> bytes:
    """Keys in `folder`, one a role, and the registry's first root, which is returned."""
    made = signing.make_keys(folder, dict.fromkeys(signing.ROLES, 1))
    now = datetime.datetime.now(datetime.UTC)
    return publish.create_root(store, made, dict.fromkeys(signing.ROLES, 1), now)


def release(store: Store, folder: Path, channel: str = "stable", *, days: int | None = None) -> int:
    """Sign what the registry's channel points at; returns the timestamp's version."""
    lives = {"targets": days} if days else None
    draft = publish.Draft(store, signing.read_keys([folder]), lives)
    draft.publish(channel)
    draft.sign_targets()
    draft.commit()
    return int(json.loads(store.tuf("timestamp.json") or b"")["signed"]["version"])


def one_index(store: Store, seed: str, channel: str | None = "stable", *, kib: int = 3) -> Index:
    """A new artifact of its own content, stored with its PTX, and the index that holds it alone."""
    text = ptx(f"{KEYS[0]} {seed}")
    sha256 = store.put_ptx(f"ptx:{seed}", KEYS[0], text, {})
    a, frame = artifact(KEYS[0], content=cubin(seed, kib << 10), ptx_sha256=sha256)
    store.put_artifact(f"cubin:{seed}", a, frame)
    made = index([a])
    store.put_index(made, channel)
    return made
