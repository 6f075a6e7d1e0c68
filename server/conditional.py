"""HTTP preconditions and ranges over bytes in memory (RFC 9110): pure, no I/O."""

from __future__ import annotations

import re

from fastapi import Request, Response

from server.errors import problem

_RANGE = re.compile(r"bytes=\s*(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))\s*", re.ASCII)


def respond(request: Request, body: bytes, *, etag: str, media_type: str, cache_control: str) -> Response:
    """The answer to a GET or HEAD of `body`: 200, 206, 304, 412 or 416.

    etag: the strong validator, without quotes. Several ranges in one request are answered with the whole body, as RFC
    9110 allows: assembling them costs memory and time that a client can multiply.
    """
    tag = f'"{etag}"'
    headers = {
        "etag": tag,
        "cache-control": cache_control,
        "accept-ranges": "bytes",
        "x-content-type-options": "nosniff",
    }
    if_match = request.headers.get("if-match")
    if if_match is not None and not _names(if_match, tag, weak=False):
        return problem(412, "precondition_failed", f"If-Match does not name {tag}")
    if_none_match = request.headers.get("if-none-match")
    if if_none_match is not None and _names(if_none_match, tag, weak=True):
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return Response(headers={**headers, "content-length": str(len(body))}, media_type=media_type)
    wanted = None
    if request.headers.get("if-range", tag) == tag:  # else the client's part is of something older: send all
        wanted = _range(request.headers.get("range"), len(body))
    if wanted is None:
        return Response(body, headers=headers, media_type=media_type)
    first, end = wanted
    if first >= end:
        refused = problem(416, "range", f"the range lies outside of the {len(body)} bytes")
        refused.headers["content-range"] = f"bytes */{len(body)}"
        return refused
    headers["content-range"] = f"bytes {first}-{end - 1}/{len(body)}"
    return Response(body[first:end], status_code=206, headers=headers, media_type=media_type)


def _names(header: str, tag: str, *, weak: bool) -> bool:
    """Whether an If-Match or If-None-Match header names `tag`; with `weak`, W/"x" is as good as "x"."""
    if header.strip() == "*":
        return True
    tags = (part.strip() for part in header.split(","))
    return any((part.removeprefix("W/") if weak else part) == tag for part in tags)


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first, end) of a single byte range, empty when nothing satisfies it; None when the header is to be ignored."""
    match = _RANGE.fullmatch(header) if header else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix:
        return (max(0, size - int(suffix)), size)
    if last and int(last) < int(first):
        return None
    return (int(first), min(size, int(last) + 1) if last else size)
