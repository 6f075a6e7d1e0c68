"""What the GPU tests need: a CUDA device and a registry with cubins for it. Without them each is skipped, saying why.

CUBINERY_REGISTRY names the registry file; CUBINERY_GPU_RUN a ledger file to append to (tests that it already holds are
skipped), else a new one is begun under CUBINERY_LEDGER_DIR or tests/gpu/ledger.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure
from tests.gpu import ledger

COMPILERS = ("cutlass", "triton", "numba", "cuda.bindings.nvrtc", "cuda.bindings.nvjitlink", "cuda.bindings.nvvm")
LOST = 75  # pytest's exit code when the CUDA context is lost: run again to go on with the tests that are left


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


@pytest.fixture(scope="session")
def dut(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The GPU behind `runtime.flash_attn`."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    import torch

    from tests.gpu.dut import Gpu

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    scratch = tmp_path_factory.mktemp("registry")
    scratch.chmod(0o700)  # the runtime believes only a file that nobody else can write
    return Gpu(Path(os.environ["CUBINERY_REGISTRY"]), scratch, arch)


@pytest.fixture(scope="session")
def run(dut: Any) -> ledger.Ledger:
    """This run's ledger."""
    import torch

    named = os.environ.get("CUBINERY_GPU_RUN")
    path = Path(named) if named else ledger.new_run()
    return ledger.Ledger(path, torch.cuda.get_device_name(), ledger.driver_version())


@pytest.fixture(scope="session")
def done(run: ledger.Ledger) -> set[tuple[str, str]]:
    """(variant, test) that the ledger held when this process began."""
    return {(row["variant"], row["test"]) for row in ledger.read(run.path)}


@pytest.fixture
def recorded(run: ledger.Ledger) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with recorded(artifact, test):` writes how the block ended into the ledger."""
    return lambda artifact, test: _recorded(run, artifact, test)


@contextlib.contextmanager
def _recorded(run: ledger.Ledger, artifact: Any, test: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        run.add(artifact, test, False)
        if _context_lost():
            pytest.exit(f"the CUDA context is lost: {error}", returncode=LOST)
        raise
    run.add(artifact, test, True)


def _context_lost() -> bool:
    """Whether the last kernel broke the context: then every later call of this process fails, whoever's fault."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
