"""A server that tests script."""

from __future__ import annotations

import json
from functools import partial

import httpx2
import pytest

from runtime.sources import remote as server_source
from runtime.sources.remote import HttpSource
from tests.runtime.fakes import toy_index

URL = "http://registry.test"


def reply(status: int, body: bytes) -> httpx2.Response:
    """As from a socket: a body that can be read once."""
    return httpx2.Response(status, stream=httpx2.ByteStream(body))


class Server:
    """A mock registry server; `answer` may be replaced to misbehave."""

    def __init__(self, **options):
        self.index, self.frames = toy_index("sm_120", **options)
        self.asked: list[str] = []
        self.down = False

    def __call__(self, request):
        path = request.url.path
        self.asked.append(path)
        if self.down:
            raise httpx2.ConnectError("refused")
        *_, digest = path.split("/")
        if path == f"/v1/indexes/sha256/{self.index.digest}":
            return reply(200, self.index.to_bytes())
        if path.startswith("/v1/blobs/sha256/") and digest in self.frames:
            return reply(200, self.frames[digest])
        if path == "/v1/channels/stable":
            body = {"name": "stable", "indexes": {"sm_120": self.index.digest}}
            return reply(200, json.dumps(body).encode())
        return httpx2.Response(404)


@pytest.fixture
def server(monkeypatch):
    """A server at URL for everything that opens an HttpSource."""
    made = Server(only="bf16-d64")
    monkeypatch.setattr(server_source, "HttpSource", partial(HttpSource, transport=httpx2.MockTransport(made)))
    monkeypatch.setattr(server_source, "BACKOFF_S", 0.001)
    return made
