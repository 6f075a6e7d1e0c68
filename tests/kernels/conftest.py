"""The variants' PTX, built once through the builder.

CUBINERY_TEST_BUILD names a folder that keeps the registry from one test run to the next: the builder is incremental,
so that an unchanged variant is not compiled again. Without it the registry lives and dies with the test run.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from registry.contract import Index
from registry.store import Store
from tests.kernels.launch import Compiled

ARCH, CHANNEL = "sm_120", "stable"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def variant_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """A function from a variant's key to what the builder made of it."""
    path = build_folder(tmp_path_factory) / "registry.db"
    with open(path.with_suffix(".lock"), "w") as lock:  # one worker of pytest-xdist builds, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(path)

    @lru_cache(maxsize=8)  # a parsed kernel with its register banks takes tens of megabytes
    def compiled(key: str) -> Compiled:
        with Store(path, readonly=True) as store:
            body = store.get_index(store.channel(CHANNEL)[ARCH])
            assert body is not None
            artifact = Index.from_bytes(body).by_variant[key]
            return Compiled(artifact, store.ptx_text(artifact.ptx_sha256))

    return compiled


def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of this run share."""
    if named := os.environ.get("CUBINERY_TEST_BUILD"):
        folder = Path(named)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def build(path: Path) -> None:
    command = [sys.executable, "-m", "builder", "--arch", ARCH, "--registry", str(path), "--channel", CHANNEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}", pytrace=False)
