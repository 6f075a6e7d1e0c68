"""Taking in releases: PUT of blobs, then indexes, then metadata, by whoever has the token; and renewing the timestamp.

CUBINERY_TOKEN is the token (without one nothing is taken in), CUBINERY_TIMESTAMP_KEY the file of the timestamp key, the
only one that a server may hold. The token alone never changes what clients load: metadata must verify as theirs does.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from registry.contract import ContractError, CubineryError, is_part, sha256_hex
from registry.errors import ConflictError, ReleaseError
from registry.store import Store, StoreError
from server import errors

MAX_BLOB, MAX_INDEX, MAX_METADATA = 64 << 20, 64 << 20, 32 << 20  # bytes
RENEW_EVERY_S = 3600.0
MIN_TOKEN = 16  # characters

log = logging.getLogger("uvicorn.error.cubinery")

Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256, 64 lower-case hex digits")]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """token: what a sender must know, '' for nobody. timestamp_key: the key's file, if the server signs."""

    token: str = ""
    timestamp_key: FilePath | None = None

    @classmethod
    def of_environment(cls) -> Settings:
        """A token that is too short to be secret counts as none."""
        token, key = os.environ.get("CUBINERY_TOKEN", ""), os.environ.get("CUBINERY_TIMESTAMP_KEY", "")
        if token and len(token) < MIN_TOKEN:
            log.error("CUBINERY_TOKEN has fewer than %d characters: nothing is taken in", MIN_TOKEN)
            token = ""
        return cls(token, FilePath(key) if key else None)


class Metadata(BaseModel):
    """files: {path below /v1/tuf/: text} of metadata and channel documents, taken in all together or not at all."""

    files: dict[str, str]


class Taken(BaseModel):
    """new: what was not there before."""

    new: list[str]


class Uploads:
    """What writes the registry file; each call has a connection of its own, in a thread of its own."""

    def __init__(self, path: FilePath, settings: Settings):
        self.path, self.settings = path, settings

    def prepare(self) -> None:
        """Make the registry if it is to take uploads and is not there yet."""
        if self.settings.token:
            try:
                Store(self.path).close()
            except StoreError as error:
                log.error("nothing can be taken in: %s [%s]", error, error.reason)

    def blob(self, digest: str, frame: bytes) -> bool:
        """Whether it is new. Raises StoreError."""
        with Store(self.path) as store:
            stored = store.get_frame(digest)
            _check_digest(frame, digest, stored is not None)
            store.put_blobs([frame])  # also what is there: gc then leaves it for a day
            return stored is None

    def index(self, digest: str, body: bytes) -> bool:
        """Whether it is new. Raises StoreError, ContractError."""
        with Store(self.path) as store:
            stored = store.get_index(digest)
            _check_digest(body, digest, stored is not None)
            _put_document(store, digest, body)  # also what is there: gc then leaves it for a day
            return stored is None

    def metadata(self, files: dict[str, bytes]) -> list[str]:
        """The paths that are new. Raises ReleaseError, StoreError."""
        from registry.releases.upload import accept

        with Store(self.path) as store:
            return accept(store, files, self._signers())

    def renew(self) -> bool:
        """Whether the timestamp was signed anew. Raises ReleaseError, StoreError."""
        from registry.releases.upload import renew

        if not self.path.exists():
            return False
        with Store(self.path) as store:
            return renew(store, self._signers())

    async def keep_timestamp(self) -> None:
        """Renew the timestamp whenever it needs it, until cancelled."""
        while True:
            try:
                if await run_in_threadpool(self.renew):
                    log.info("timestamp signed")
            except (CubineryError, ImportError) as error:
                log.error("the timestamp was not renewed: %s", error)
            await asyncio.sleep(RENEW_EVERY_S)

    def _signers(self) -> Any:
        if self.settings.timestamp_key is None:
            return ()
        from registry.releases.signing import read_keys

        return read_keys([self.settings.timestamp_key])


def install(app: FastAPI, uploads: Uploads) -> None:
    """Add the routes."""
    refusals: dict[int | str, Any] = {n: {"model": errors.Problem} for n in (401, 403, 409, 411, 413, 422, 503)}

    @app.put("/v1/blobs/sha256/{digest}", status_code=201, response_model=Taken, responses=refusals)
    async def put_blob(digest: Digest, request: Request) -> Response:
        """Store a blob: one zstd frame, addressed by its SHA-256. 201 if it is new, 200 if it was there."""
        return await _take(request, uploads, MAX_BLOB, lambda body: [digest] * uploads.blob(digest, body))

    @app.put("/v1/indexes/sha256/{digest}", status_code=201, response_model=Taken, responses=refusals)
    async def put_index(digest: Digest, request: Request) -> Response:
        """Store an index, whose blobs must be there, and its parts if it has any; or a part."""
        return await _take(request, uploads, MAX_INDEX, lambda body: [digest] * uploads.index(digest, body))

    @app.put("/v1/tuf", status_code=201, response_model=Taken, responses=refusals)
    async def put_metadata(request: Request) -> Response:
        """Store a release's metadata: JSON `{"files": {path: text}}`. It must verify, follow on the versions that are
        there, and name indexes that are there."""

        def take(body: bytes) -> list[str]:
            try:
                files = Metadata.model_validate_json(body).files
            except ValidationError as error:
                message = f"no {{'files': {{path: text}}}}: {error.errors()[0]['msg']}"
                raise ReleaseError(message, reason="argument") from None
            return uploads.metadata({path: text.encode() for path, text in files.items()})

        return await _take(request, uploads, MAX_METADATA, take)


async def _take(request: Request, uploads: Uploads, cap: int, store: Callable[[bytes], list[str]]) -> Response:
    """Check who sends, read at most `cap` bytes, and store them in a thread."""
    refusal = _unauthorized(request, uploads.settings.token)
    if refusal is not None:
        return refusal
    body = await _body(request, cap)
    if isinstance(body, Response):
        return body
    try:
        new = await run_in_threadpool(store, body)
    except CubineryError as error:
        return _refused(error)
    return JSONResponse({"new": new}, 201 if new else 200, {"cache-control": "no-store"})


def _unauthorized(request: Request, token: str) -> Response | None:
    if not token:
        return errors.problem(403, "read_only", "this server takes nothing in: it has no CUBINERY_TOKEN")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        message = "needs the header 'Authorization: Bearer <token>'"
        return errors.problem(401, "unauthorized", message, {"www-authenticate": "Bearer"})
    return None


async def _body(request: Request, cap: int) -> bytes | Response:
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdecimal()):
        return errors.problem(411, "length_required", "Content-Length is required")
    too_long = errors.problem(413, "too_long", f"longer than the {cap} bytes that it may have")
    if int(length[:20]) > cap:
        return too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > cap:
            return too_long
    return bytes(body)


def _put_document(store: Store, digest: str, body: bytes) -> None:
    """An index, whose blobs and parts must be there, or a part."""
    if is_part(body):
        store.put_part(body)
        return
    index = store.read_index(body)
    if index.to_bytes() != body:
        raise ContractError(f"index {digest}: not in its canonical form")
    store.put_index(index, None)


def _check_digest(body: bytes, digest: str, stored: bool) -> None:
    """ConflictError for other bytes under a name that is taken, else StoreError ('integrity')."""
    if sha256_hex(body) != digest:
        message = f"the body's SHA-256 is {sha256_hex(body)}, not {digest}"
        raise ConflictError(message) if stored else StoreError(message, reason="integrity")


def _refused(error: CubineryError) -> Response:
    if isinstance(error, (ConflictError, ReleaseError, ContractError)):
        return errors.problem(409 if isinstance(error, ConflictError) else 422, error.reason, str(error))
    if isinstance(error, StoreError) and error.reason in ("integrity", "not_found", "argument"):
        # Its message may name the registry's path, which is none of the sender's business.
        message = str(error).split(": ", 1)[-1]
        return errors.problem(409 if error.reason == "not_found" else 422, error.reason, message)
    log.error("an upload failed: %s [%s]", error, error.reason)
    return errors.unreadable(error) if isinstance(error, StoreError) else errors.problem(500, "internal", "see the log")
