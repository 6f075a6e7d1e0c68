from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from runtime.load import session
from tests.runtime.backward_kernels import write_backward_registry
from tests.runtime.cache_kernels import write_cache_registry
from tests.runtime.fakes import FakeBackend, write_registry


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
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """CPU tensors and a fake driver, in place of torch's CUDA."""
    made = FakeBackend()
    monkeypatch.setattr(session, "BACKEND", lambda: made)
    return made


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of the whole table for sm_120, built once."""
    path = tmp_path_factory.mktemp("template") / "registry.db"
    write_registry(path)
    return path


@pytest.fixture
def registry(tmp_path: Path, template: Path) -> Path:
    """A test's own local registry; the settings name it."""
    folder = tmp_path / "registry"
    folder.mkdir(mode=0o755)
    path = folder / "registry.db"
    shutil.copy(template, path)
    runtime.configure(registry=path)
    return path


@pytest.fixture(scope="session")
def backward_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of the table and the backward's kernels, built once."""
    path = tmp_path_factory.mktemp("backward") / "registry.db"
    write_backward_registry(path)
    path.parent.chmod(0o755)
    return path


@pytest.fixture
def backward_registry(backward_template: Path) -> Path:
    """The settings name it; nobody writes it."""
    runtime.configure(registry=backward_template)
    return backward_template


@pytest.fixture(scope="session")
def cache_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of the table and a cache's kernels, built once."""
    path = tmp_path_factory.mktemp("cache") / "registry.db"
    write_cache_registry(path)
    path.parent.chmod(0o755)
    return path


@pytest.fixture
def cache_registry(cache_template: Path) -> Path:
    """The settings name it; nobody writes it."""
    runtime.configure(registry=cache_template)
    return cache_template
