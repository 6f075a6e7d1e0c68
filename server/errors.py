"""Every error that the server answers with: {"reason", "message"}, never cached."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from registry.store import StoreError

# A StoreError's message names paths of this machine: clients get these words, the log gets the rest.
_UNREADABLE = {
    "missing": "the registry file does not exist yet",
    "empty": "the registry file has no tables yet",
    "permission": "the server may not read the registry file",
    "not_a_registry": "the registry file is not a Cubinery registry",
    "newer": "the registry file is of a newer version than the server",
    "older": "the registry file is of an older version; a writer upgrades it",
    "busy": "the registry file is busy; try again",
    "corrupt": "the registry file is damaged",
}
RETRY = {"retry-after": "5"}  # seconds


class Problem(BaseModel):
    """What went wrong. `reason` is a short stable code for programs, `message` is for people."""

    reason: str
    message: str


def problem(status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """A typed error. Not cached: what is missing now may be stored in a moment."""
    headers = {**(headers or {}), "cache-control": "no-store"}
    return JSONResponse({"reason": reason, "message": message}, status, headers)


def unreadable(error: StoreError) -> Response:
    """503: the registry file cannot be read now."""
    message = _UNREADABLE.get(error.reason, "the registry file cannot be read")
    return problem(503, error.reason, message, RETRY)


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a Problem."""

    @app.exception_handler(StoreError)
    async def on_store_error(request: Request, error: StoreError) -> Response:
        return unreadable(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = {"allow": _allowed(request)} if error.status_code == 405 else dict(error.headers or {})
        reason = HTTPStatus(error.status_code).name.lower()
        return problem(error.status_code, reason, str(error.detail), headers)

    @app.exception_handler(RequestValidationError)
    async def on_bad_request(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
        return problem(422, "argument", told)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return problem(500, "internal", "an error in the server; its log says more")


def _allowed(request: Request) -> str:
    """Starlette allows only the methods of the first route of a path, and each method has its own route here."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return ", ".join(sorted(found))
