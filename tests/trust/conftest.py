from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from tests.trust.repository import Looker, Repository


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the user's folders or settings, nor what another test has loaded."""
    for name in [name for name in os.environ if name.startswith("CUBINERY_") and name != "CUBINERY_SOAK"]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / "home" / name.lower()))
    runtime.configure()
    yield
    runtime.configure()


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def client(repository: Repository, tmp_path: Path) -> Looker:
    return Looker(repository, tmp_path / "client")
