"""POST /v1/batch: many blobs in one answer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from registry.contract import sha256_hex
from registry.store import Store
from server import batch
from server.app import create_app
from server.upload import Settings
from tests.runtime.fakes import write_registry

GONE = "0" * 64


@pytest.fixture
def frames(tmp_path: Path) -> dict[str, bytes]:
    """Every frame of the registry that is served."""
    write_registry(tmp_path / "r.db", only="16-d64")
    with Store(tmp_path / "r.db", readonly=True) as store:
        return {a.frame_sha256: store.get_frame(a.frame_sha256) or b"" for a in store.artifacts().values()}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(tmp_path / "r.db", Settings())) as client:
        yield client


def frames_of(body: bytes) -> dict[str, bytes]:
    found, rest = {}, body
    while rest:
        digest, length = struct.unpack_from("<32sQ", rest)
        assert len(rest) >= 40 + length
        found[digest.hex()], rest = rest[40 : 40 + length], rest[40 + length :]
    return found


def test_it_streams_what_is_there_once_and_in_order(frames, client):
    wanted = [*reversed(frames), GONE, next(iter(frames))]
    answer = client.post("/v1/batch", json={"digests": wanted})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    found = frames_of(answer.content)
    assert found == frames and list(found) == list(reversed(frames))
    assert all(sha256_hex(frame) == digest for digest, frame in found.items())


def test_what_does_not_fit_is_asked_for_again(frames, client, monkeypatch):
    sizes = [40 + len(frame) for frame in frames.values()]
    monkeypatch.setattr(batch, "MAX_BYTES", sizes[0] + sizes[1] + sizes[2] - 1)
    wanted, rounds = list(frames), 0
    while wanted:
        found = frames_of(client.post("/v1/batch", json={"digests": wanted}).content)
        wanted = [digest for digest in wanted if digest not in found]
        rounds += 1
    assert rounds == 2


def test_questions_are_bounded(frames, client):
    assert client.post("/v1/batch", json={"digests": [GONE] * 4096}).content == b""
    for body in ({}, {"digests": []}, {"digests": [GONE] * 4097}, {"digests": ["x"]}, {"digests": ["A" * 64]}):
        answer = client.post("/v1/batch", json=body)
        assert (answer.status_code, answer.json()["reason"]) == (422, "argument")
    assert client.get("/v1/batch").headers["allow"] == "POST"


def test_an_absent_registry_is_a_503(client):
    answer = client.post("/v1/batch", json={"digests": [GONE]})
    assert (answer.status_code, answer.json()["reason"]) == (503, "missing")
