"""The variants' PTX, built once through the builder, and which tests of it this run needs (`executed.py`).

CUBINERY_TEST_BUILD names a folder that keeps the registry from one test run to the next: the builder is incremental,
so that an unchanged variant is not compiled again. Without it the registry lives and dies with the test run.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from registry.contract import Index
from registry.store import Store
from tests.kernels import executed
from tests.kernels.launch import Compiled

ARCH, CHANNEL = "sm_120", "stable"
ROOT = Path(__file__).parents[2]
NEEDED = pytest.StashKey[frozenset[str]]()
LEDGER = pytest.StashKey[executed.Ledger]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "variants(*variants): what a test needs that has no parameter `variant`")
    config.stash[LEDGER] = executed.Ledger.read()
    config.stash[NEEDED] = frozenset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has a record, unless all is to be executed or the commit picks the variant."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    if config.option.executed == "new":
        known = {id(item) for item in ours if _has_record(config.stash[LEDGER], item)}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in known])
        items[:] = [item for item in items if id(item) not in known]
        ours = [item for item in ours if id(item) not in known]
    config.stash[NEEDED] = frozenset(key for item in ours for key in _needs(item))


def variant_key(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    variant = callspec.params.get("variant") if callspec else None
    return variant.key if variant is not None else None


def _needs(item: pytest.Item) -> Iterator[str]:
    """Keys of the variants that a test runs. One of a variant that asks for no kernel needs none compiled."""
    if (key := variant_key(item)) and "variant_of" in getattr(item, "fixturenames", ()):
        yield key
    for mark in item.iter_markers("variants"):
        yield from (variant.key for variant in mark.args)


def _has_record(ledger: executed.Ledger, item: pytest.Item) -> bool:
    key = variant_key(item)
    if key is None or not isinstance(item, pytest.Function) or executed.is_picked(key, executed.commit()):
        return False
    ptx = ledger.ptx(key, executed.fingerprints()[key])
    return ptx is not None and ledger.has(ptx, item.module.__name__)


@pytest.fixture(scope="session")
def variant_of(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """A function from a variant's key to what the builder made of it. It fails where the ledger says that the same
    sources made something else."""
    path = build_folder(tmp_path_factory) / "registry.db"
    needed, ledger = pytestconfig.stash[NEEDED], pytestconfig.stash[LEDGER]

    @lru_cache(maxsize=8)  # a parsed kernel with its register banks takes tens of megabytes
    def compiled(key: str) -> Compiled:
        found = _stored(path, key)
        if found is None:
            with open(path.with_suffix(".lock"), "w") as lock:  # one worker of pytest-xdist builds, the others wait
                fcntl.flock(lock, fcntl.LOCK_EX)
                if _stored(path, key) is None:
                    build(path, needed | {key})
            found = _stored(path, key)
        assert found is not None, key
        recorded = ledger.ptx(key, executed.fingerprints()[key])
        made = found.artifact.ptx_sha256
        assert recorded in (None, made), f"{key}: the ledger says that its sources give PTX {recorded}, it is {made}"
        return found

    return compiled


def _stored(path: Path, key: str) -> Compiled | None:
    if not path.exists():
        return None
    with Store(path, readonly=True) as store:
        digest = store.channel(CHANNEL).get(ARCH)
        body = store.get_index(digest) if digest else None
        artifact = Index.from_bytes(body).by_variant.get(key) if body else None
        return Compiled(artifact, store.ptx_text(artifact.ptx_sha256)) if artifact else None


@pytest.fixture(autouse=True)
def _without_record(request: pytest.FixtureRequest) -> None:
    """A changed fingerprint that still gives PTX which has a record needs no execution either. Notes what the record of
    this test would be."""
    key = variant_key(request.node)
    if key is None or "variant_of" not in request.fixturenames:
        return
    module, made = request.module.__name__, request.getfixturevalue("variant_of")(key).artifact
    is_left_out = request.config.option.executed == "new" and not executed.is_picked(key, executed.commit())
    if is_left_out and request.config.stash[LEDGER].has(made.ptx_sha256, module):
        pytest.skip("executed before: tests/kernels/executed.jsonl has this PTX")
    record = executed.Record(key, executed.fingerprints()[key], made.ptx_sha256, module, executed.suite(module))
    request.node.user_properties.append(("executed", list(record)))


def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of this run share."""
    if named := os.environ.get("CUBINERY_TEST_BUILD"):
        folder = Path(named)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def build(path: Path, keys: frozenset[str]) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile", str(path), *sorted(keys)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}", pytrace=False)
