"""The HTTP application: channels, indexes, blobs and signed releases of one registry file, read beside whoever builds
into it; with a token, releases can be sent to it.

`uvicorn server.app:app` serves the file that CUBINERY_REGISTRY names, or the default one; see server.upload for the
settings of uploads. Endpoints are async because
a read from SQLite takes tens of microseconds: a thread hop would cost more.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from registry import __version__
from registry.contract import canonical_json, sha256_hex
from registry.releases.document import ROLE_FILE, TARGET_FILE
from registry.store import CHANNEL, default_path
from server import batch, errors, page, upload
from server.conditional import respond
from server.metrics import Metrics, MetricsMiddleware
from server.reader import Reader

IMMUTABLE = "public, max-age=31536000, immutable"
SHORT = "public, max-age=30"
JSON, ZSTD = "application/json", "application/zstd"


def _unnamed(pattern: str) -> str:
    """A regular expression without names of groups, which OpenAPI's do not have."""
    return re.sub(r"\?P<\w+>", "", pattern)


Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256, 64 lower-case hex digits")]
RoleFile = Annotated[str, Path(pattern=f"^({_unnamed(ROLE_FILE.pattern)})$", description="e.g. 1.root.json")]
TargetFile = Annotated[
    str,
    Path(pattern=f"^{_unnamed(TARGET_FILE.pattern).removeprefix('targets/')}$", description="<SHA-256>.<channel>.json"),
]
Name = Annotated[str, Path(pattern=f"^{CHANNEL}$", description="the channel's name")]


class Channel(BaseModel):
    """Which index each architecture has on a channel. It confers no trust: clients pin an index by digest."""

    name: str
    indexes: dict[str, str]


class Health(BaseModel):
    """The server's state, 'ok'."""

    status: str


def create_app(path: FilePath | None = None, settings: upload.Settings | None = None) -> FastAPI:
    """An application that serves one registry file; it need not exist yet. path: default `default_path()`. settings:
    of uploads and the timestamp, by default the environment's."""
    path = path or default_path()
    reader, metrics = Reader(path), Metrics()
    uploads = upload.Uploads(path, settings or upload.Settings.of_environment())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(uploads.prepare)
        renewing = asyncio.create_task(uploads.keep_timestamp()) if uploads.settings.timestamp_key else None
        yield
        if renewing is not None:
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing
        reader.close()

    app = FastAPI(
        title="Cubinery",
        version=__version__,
        summary="Attention kernels for SM120, compiled ahead of time",
        lifespan=lifespan,
    )
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    errors.install(app)
    _add_registry(app, reader)
    _add_releases(app, reader)
    batch.install(app, reader)
    upload.install(app, uploads)
    _add_health(app, reader, metrics)
    return app


def _add_registry(app: FastAPI, reader: Reader) -> None:
    @_get(app, "/v1/channels/{name}", _described(None, 304, 404, 422, 503), response_model=Channel)
    async def channel(name: Name, request: Request) -> Response:
        """Which index each architecture has on a channel. Short-lived: ask again with If-None-Match."""
        indexes = reader.store().channel(name)
        if not indexes:
            return errors.problem(404, "not_found", f"no channel is called {name}")
        body = canonical_json({"name": name, "indexes": indexes})
        return respond(request, body, etag=sha256_hex(body), media_type=JSON, cache_control=SHORT)

    @_get(app, "/v1/indexes/sha256/{digest}", _described(JSON, 206, 304, 404, 416, 422, 503), response_class=Response)
    async def index(digest: Digest, request: Request) -> Response:
        """An index, byte for byte as it was hashed."""
        body = reader.store().get_index(digest)
        if body is None:
            return errors.problem(404, "not_found", f"no index has the digest {digest}")
        return respond(request, body, etag=digest, media_type=JSON, cache_control=IMMUTABLE)

    @_get(app, "/v1/blobs/sha256/{digest}", _described(ZSTD, 206, 304, 404, 416, 422, 503), response_class=Response)
    async def blob(digest: Digest, request: Request) -> Response:
        """A blob: one zstd frame, addressed by the SHA-256 of the frame."""
        body = reader.store().get_frame(digest)
        if body is None:
            return errors.problem(404, "not_found", f"no blob has the digest {digest}")
        return respond(request, body, etag=digest, media_type=ZSTD, cache_control=IMMUTABLE)

    @_get(app, "/", include_in_schema=False)
    async def home() -> Response:
        return HTMLResponse(page.render(reader.store()), headers=page.HEADERS)


def _add_releases(app: FastAPI, reader: Reader) -> None:
    def answer(request: Request, path: str) -> Response:
        body = reader.store().tuf(path)
        if body is None:
            return errors.problem(404, "not_found", f"there is no {path}")
        # What has a version or a digest in its name never changes.
        lifetime = SHORT if path == "timestamp.json" else IMMUTABLE
        return respond(request, body, etag=sha256_hex(body), media_type=JSON, cache_control=lifetime)

    statuses = (206, 304, 404, 416, 422, 503)

    @_get(app, "/v1/tuf/{name}", _described(JSON, *statuses), response_class=Response)
    async def metadata(name: RoleFile, request: Request) -> Response:
        """Signed metadata of The Update Framework."""
        return answer(request, name)

    @_get(app, "/v1/tuf/targets/{name}", _described(JSON, *statuses), response_class=Response)
    async def document(name: TargetFile, request: Request) -> Response:
        """A channel's document, which the signed targets metadata names by its hash."""
        return answer(request, f"targets/{name}")


def _add_health(app: FastAPI, reader: Reader, metrics: Metrics) -> None:
    @_get(app, "/livez", response_model=Health)
    async def livez() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"}, headers={"cache-control": "no-store"})

    @_get(app, "/readyz", _described(None, 503), response_model=Health)
    async def readyz() -> Response:
        """The registry can be read and has an index; until its first build 503 with the reason."""
        if not reader.store().indexes():
            return errors.problem(503, "empty", "the registry has no index yet", errors.RETRY)
        return JSONResponse({"status": "ok"}, headers={"cache-control": "no-store"})

    @_get(app, "/metrics", include_in_schema=False)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type, headers={"cache-control": "no-store"})


def _get(app: FastAPI, path: str, responses: dict[int | str, Any] | None = None, **documentation: Any) -> Any:
    """Register a function for GET, which the API's documentation shows, and for HEAD."""

    def register(function: Any) -> Any:
        app.head(path, include_in_schema=False)(function)
        return app.get(path, responses=responses, **documentation)(function)

    return register


def _described(media_type: str | None, *statuses: int) -> dict[int | str, Any]:
    """OpenAPI's `responses`. media_type: of 200's bytes, None where a response model says it."""
    texts = {206: "The part that Range asks for", 304: "Unchanged since If-None-Match"}
    described: dict[int | str, Any] = {
        status: {"description": texts[status]} if status in texts else {"model": errors.Problem} for status in statuses
    }
    if media_type is not None:
        schema = {"type": "object"} if media_type == JSON else {"type": "string", "format": "binary"}
        described[200] = {"description": "All of it", "content": {media_type: {"schema": schema}}}
    return described


app = create_app()
