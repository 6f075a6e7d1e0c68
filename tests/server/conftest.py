"""A filled registry and a client of an application that serves it."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from registry.store import Store
from server.app import create_app
from tests.registry.samples import KEYS, fill


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


@pytest.fixture
def filled(path):
    with Store(path) as store:
        fill(store, KEYS[:2])
        yield store


@pytest.fixture
def client(path):
    with TestClient(create_app(path), raise_server_exceptions=False) as client:
        yield client
