"""What the GPU tests need: a CUDA device and a registry with cubins for it. Without them each is skipped, saying why.

CUBINERY_REGISTRY names the registry file; CUBINERY_GPU_RUN a ledger file to append to (tests that it already holds are
skipped), else a new one is begun under CUBINERY_LEDGER_DIR or tests/gpu/ledger. `verify` sets more: CUBINERY_GPU_RESUME
(1: tests that any run of the ledger shows as passed are skipped too), CUBINERY_GPU_OPS (only these, with commas),
CUBINERY_GPU_STOP_AT (Unix time after which no test begins) and CUBINERY_GPU_RUNNING (a file that is there while a test
runs: its row, should it hang).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure
from tests.gpu import ledger

COMPILERS = ("cutlass", "triton", "numba", "cuda.bindings.nvrtc", "cuda.bindings.nvjitlink", "cuda.bindings.nvvm")
# pytest's exit codes when it leaves tests for the next process: the CUDA context is lost; the time is over.
LOST, STOPPED = 75, 76


# No compiler can be imported in this process: what passes here passes without one. (None, and no finder that raises:
# torch itself asks whether there is a triton.)
for _name in COMPILERS:
    sys.modules[_name] = None  # type: ignore[assignment]


def why_not() -> str | None:
    """Why GPU tests cannot run here; None if they can."""
    if reason := measure.no_device():
        return reason
    path = os.environ.get("CUBINERY_REGISTRY", "")
    if not Path(path).is_file():
        return "CUBINERY_REGISTRY names no registry file"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the variants of other ops than CUBINERY_GPU_OPS out."""
    if ops := os.environ.get("CUBINERY_GPU_OPS"):
        items[:] = [item for item in items if _op(item) is None or _op(item) in ops.split(",")]


def _op(item: pytest.Item) -> str | None:
    """Of the variant that a conformance test is about."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return params["key"].split("-")[0] if "key" in params else None


@pytest.fixture(scope="session")
def dut(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The GPU behind `runtime.flash_attn`."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    from tests.gpu.dut import Gpu

    scratch = tmp_path_factory.mktemp("registry")
    scratch.chmod(0o700)  # the runtime believes only a file that nobody else can write
    return Gpu(Path(os.environ["CUBINERY_REGISTRY"]), scratch, measure.device_arch())


@pytest.fixture(scope="session")
def run(dut: Any) -> ledger.Ledger:
    """This run's ledger."""
    import torch

    named = os.environ.get("CUBINERY_GPU_RUN")
    path = Path(named) if named else ledger.new_run()
    return ledger.Ledger(path, torch.cuda.get_device_name(), ledger.driver_version())


@pytest.fixture(scope="session")
def done(run: ledger.Ledger, dut: Any) -> set[tuple[str, str]]:
    """(variant, test) that need not run, as of when this process began."""
    return ledger.done(run.path, dut.artifacts.values(), os.environ.get("CUBINERY_GPU_RESUME") == "1")


@pytest.fixture
def recorded(run: ledger.Ledger) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with recorded(artifact, test):` writes how the block ended into the ledger."""
    return lambda artifact, test: _recorded(run, artifact, test)


@contextlib.contextmanager
def _recorded(run: ledger.Ledger, artifact: Any, test: str) -> Iterator[None]:
    if time.time() >= float(os.environ.get("CUBINERY_GPU_STOP_AT", "inf")):
        pytest.exit("the time is over", returncode=STOPPED)
    with _running(run.row(artifact, test, "hang")):
        try:
            yield
        except Exception as error:
            run.add(artifact, test, "fail")
            if _context_lost():
                pytest.exit(f"the CUDA context is lost: {error}", returncode=LOST)
            raise
        run.add(artifact, test, "pass")


@contextlib.contextmanager
def _running(row: dict[str, Any]) -> Iterator[None]:
    """The file CUBINERY_GPU_RUNNING holds the row; whoever kills this process finds it there."""
    if not (name := os.environ.get("CUBINERY_GPU_RUNNING")):
        yield
        return
    path = Path(name)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(row))
    new.replace(path)
    try:
        yield
    finally:
        path.unlink()


def _context_lost() -> bool:
    """Whether the last kernel broke the context: then every later call of this process fails, whoever's fault."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
