"""`Store.verify`: hash and cross-check everything that a registry file holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from registry.contract import (
    Artifact,
    ContractError,
    Index,
    IntegrityError,
    Variant,
    canonical_json,
    check_part,
    sha256_hex,
)
from registry.errors import StoreError
from registry.frames import decompress


class Blob(NamedTuple):
    """What a stored frame was found to hold."""

    frame_size: int
    size: int
    content_sha256: str


def problems(connection: Any) -> Iterator[str]:
    """One line for everything wrong in a registry file. `connection` is in a transaction: one snapshot is judged."""
    for (line,) in connection.execute("PRAGMA integrity_check").fetchall():
        if line != "ok":
            yield f"sqlite: {line}"
    for table, _, parent, _ in connection.execute("PRAGMA foreign_key_check").fetchall():
        yield f"sqlite: a row of {table} refers to a row of {parent} that does not exist"
    blobs: dict[str, Blob] = {}
    yield from _blob_problems(connection, blobs)
    texts: set[str] = set()
    yield from _ptx_problems(connection, blobs, texts)
    yield from _artifact_problems(connection, blobs, texts)
    arches: dict[str, str] = {}
    yield from _index_problems(connection, blobs, arches)
    for name, arch, digest in connection.execute("SELECT name, arch, digest FROM channels ORDER BY name, arch"):
        if arches.get(digest) != arch:
            found = f"is for {arches[digest]}" if digest in arches else "is missing or damaged"
            yield f"channel {name}/{arch}: index {digest} {found}"
    yield from _tuf_problems(connection)


def _tuf_problems(connection: Any) -> Iterator[str]:
    """Only what needs no keys: a target's name holds the hash of its bytes. What is signed, clients verify."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'tuf'").fetchall():
        return  # schema 1
    for path, body in connection.execute("SELECT path, body FROM tuf ORDER BY path"):
        if not isinstance(body, bytes):
            yield f"tuf {path}: no bytes"
        elif path.startswith("targets/") and not path.startswith(f"targets/{sha256_hex(body)}."):
            yield f"tuf {path}: the file has another hash"


def _blob_problems(connection: Any, blobs: dict[str, Blob]) -> Iterator[str]:
    """Re-hash every frame and its content; fills `blobs` with the sound ones."""
    for sha256, frame, size, content_sha256 in connection.execute(
        "SELECT sha256, frame, size, content_sha256 FROM blobs ORDER BY sha256"
    ):
        if not isinstance(frame, bytes) or sha256_hex(frame) != sha256:
            yield f"blob {sha256}: the frame has another hash"
            continue
        try:
            content = decompress(frame, size)
        except StoreError as error:
            yield f"blob {sha256}: {error}"
            continue
        if sha256_hex(content) != content_sha256:
            yield f"blob {sha256}: the content is not {content_sha256}"
            continue
        blobs[sha256] = Blob(len(frame), size, content_sha256)


def _ptx_problems(connection: Any, blobs: dict[str, Blob], texts: set[str]) -> Iterator[str]:
    """Fills `texts` with the hashes of the PTX that is there."""
    for fingerprint, variant, ptx_sha256, frame_sha256, facts in connection.execute(
        "SELECT fingerprint, variant, ptx_sha256, frame_sha256, facts FROM ptx ORDER BY fingerprint"
    ):
        blob = blobs.get(frame_sha256)
        if blob is None:
            yield f"ptx {fingerprint}: blob {frame_sha256} is missing or damaged"
        elif blob.content_sha256 != ptx_sha256:
            yield f"ptx {fingerprint}: blob {frame_sha256} holds another text than {ptx_sha256}"
        else:
            texts.add(ptx_sha256)
        try:
            Variant.parse(variant)
            if not isinstance(json.loads(facts), dict):
                yield f"ptx {fingerprint}: facts are no object"
        except ValueError as error:
            yield f"ptx {fingerprint}: {error}"


def _artifact_problems(connection: Any, blobs: dict[str, Blob], texts: set[str]) -> Iterator[str]:
    for fingerprint, variant, arch, text in connection.execute(
        "SELECT fingerprint, variant, arch, json FROM artifacts ORDER BY fingerprint"
    ):
        where = f"artifact {fingerprint}"
        try:
            artifact = Artifact.from_json(json.loads(text))
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        if canonical_json(artifact.to_json()) != text.encode():
            yield f"{where}: the JSON is not canonical"
        if (artifact.variant, artifact.arch) != (variant, arch):
            yield f"{where}: the row says {variant} {arch}, its JSON {artifact.variant} {artifact.arch}"
        if artifact.ptx_sha256 not in texts:
            yield f"{where}: PTX {artifact.ptx_sha256} is missing or damaged"
        yield from _cubin_problems(where, artifact, blobs)


def _index_problems(connection: Any, blobs: dict[str, Blob], arches: dict[str, str]) -> Iterator[str]:
    """Fills `arches` with the architecture of each sound index."""

    def read(digest: str) -> bytes | None:
        found = connection.execute("SELECT body FROM indexes WHERE digest = ?", [digest]).fetchone()
        return found[0] if found and isinstance(found[0], bytes) else None

    for digest, arch, body in connection.execute("SELECT digest, arch, body FROM indexes ORDER BY digest").fetchall():
        where = f"index {digest}"
        if not isinstance(body, bytes) or sha256_hex(body) != digest:
            yield f"{where}: the body has another hash"
            continue
        try:
            if not arch:
                check_part(body)
                continue
            index = Index.from_bytes(body, read)
        except (ContractError, IntegrityError) as error:
            yield f"{where}: {error}"
            continue
        if index.to_bytes() != body:
            yield f"{where}: the body is not canonical"
        if index.arch != arch:
            yield f"{where}: the row says {arch}, its body {index.arch}"
        arches[digest] = index.arch
        for artifact in index.artifacts:
            yield from _cubin_problems(f"{where}: {artifact.variant}", artifact, blobs)


def _cubin_problems(where: str, artifact: Artifact, blobs: dict[str, Blob]) -> Iterator[str]:
    blob = blobs.get(artifact.frame_sha256)
    if blob is None:
        yield f"{where}: blob {artifact.frame_sha256} is missing or damaged"
    elif blob != (artifact.frame_size, artifact.cubin_size, artifact.cubin_sha256):
        yield f"{where}: blob {artifact.frame_sha256} does not hold cubin {artifact.cubin_sha256}"
