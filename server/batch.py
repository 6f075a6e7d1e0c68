"""POST /v1/batch: many blobs in one streamed answer, each of which its reader can verify as it arrives."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from server import errors
from server.reader import Reader

MAX_DIGESTS = 4096
MAX_BYTES = 1 << 30  # of one answer
HEADER = struct.Struct("<32sQ")  # before each frame: its SHA-256 and its size in bytes, little-endian

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Wanted(BaseModel):
    """The SHA-256 of each wanted frame, lower-case hex."""

    digests: list[Digest] = Field(min_length=1, max_length=MAX_DIGESTS)


def install(app: FastAPI, reader: Reader) -> None:
    """Add the route."""

    @app.post("/v1/batch", response_class=Response, responses={
        200: {"description": "Frames, each behind its SHA-256 (32 bytes) and its size (8 bytes, little-endian)",
              "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        422: {"model": errors.Problem}, 503: {"model": errors.Problem},
    })  # fmt: skip
    async def batch(wanted: Wanted) -> Response:
        """The frames of these digests, in their order. What the registry lacks is left out, and what would not fit
        into 1 GiB: ask again for what is missing."""
        reader.store()  # what cannot be read is said before the answer begins
        headers = {"cache-control": "no-store"}
        return StreamingResponse(
            _frames(reader, wanted.digests), media_type="application/octet-stream", headers=headers
        )


async def _frames(reader: Reader, digests: list[str]) -> AsyncIterator[bytes]:
    left = MAX_BYTES
    for digest in dict.fromkeys(digests):
        frame = reader.store().get_frame(digest)
        if frame is None:
            continue
        left -= HEADER.size + len(frame)
        if left < 0:
            return
        yield HEADER.pack(bytes.fromhex(digest), len(frame)) + frame
