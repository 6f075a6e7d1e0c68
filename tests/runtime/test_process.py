"""Promises about the process: no compiler, cheap import, threads, fork, the right `registry`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import runtime
from runtime.load import plans, session
from tests.runtime.fakes import FakeBackend
from tests.support.attention import inputs, reference

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: object, path: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env=environment, cwd=path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_COMPILER = """
import sys

BLOCKED = ("cutlass", "triton", "numba", "cuda.bindings.nvrtc", "cuda.bindings.nvjitlink", "cuda.bindings.nvvm",
           "kernels", "builder", "server", "registry.store", "sqlite_utils", "fastapi")

class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ImportError(f"{name} is blocked: there is no compiler at run time")

sys.meta_path.insert(0, Block())
import contextlib, ctypes, json, struct, torch
import runtime
from runtime.load import session

from registry.frames import elf_arch

class Driver:  # not tests.runtime.fakes': that builds registries, so it imports kernels
    success, launches = 0, []
    def check(self, status, call): assert status == 0
    def version(self): return 13000
    def context(self, device): return contextlib.nullcontext()
    def load_library(self, cubin):
        assert type(cubin) is bytes and elf_arch(cubin) == "sm_120"  # a cubin, never PTX
        return json.loads(cubin[64:])
    def unload_library(self, library): raise AssertionError
    def kernel(self, library, symbol): return library
    def params(self, kernel):
        from registry.contract import Abi
        return Abi.from_json({"op": "fwd", "version": 1, "params": kernel["params"]}).layout
    def function(self, kernel): return kernel
    def allow_dynamic_smem(self, function, nbytes): pass
    def launch(self, *arguments):
        self.launches.append(arguments)
        return (0,)

class Backend:
    device_type, torch, driver = "cpu", torch, Driver()
    def raw_stream(self, device): return 0
    def current_device(self): return -1
    def capability(self, device): return (12, 0)
    def is_capturing(self): return False
    def guard(self, device): return torch.no_grad()

session.BACKEND = Backend
runtime.configure(registry=sys.argv[1])
for dtype in (torch.bfloat16, torch.float16):
    for head_dim in (64, 96, 128):
        for causal in (False, True):
            q = torch.zeros(1, 100, 2, head_dim, dtype=dtype)
            runtime.flash_attn(q, q, q, causal=causal, return_lse=True)
for blocked in ("cutlass", "kernels", "builder"):
    try:
        __import__(blocked)
    except ImportError:
        pass
    else:
        raise SystemExit(f"{blocked} was importable: the test proves nothing")
print(len(Driver.launches), [m for m in sys.modules if m.split(".")[0] in ("cutlass", "triton", "numba", "kernels")])
"""


def test_no_compiler_at_run_time(registry: Path):
    assert python(NO_COMPILER, registry) == "12 []\n"


def test_importing_costs_little_and_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import runtime;"
        "print([m for m in ('torch', 'cuda.bindings', 'httpx2', 'platformdirs', 'rich', 'argparse',"
        " 'importlib.metadata') if m in set(sys.modules) - before])"
    )
    assert python(code) == "[]\n"


def test_exports():
    assert runtime.__all__ == ["CubineryError", "configure", "fa4", "flash_attn", "flash_attn_combine",
                               "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
                               "flash_attn_varlen", "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func",
                               "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache", "ledger"]  # fmt: skip
    assert all(callable(getattr(runtime, name)) for name in runtime.__all__ if name != "fa4")
    assert callable(runtime.fa4.flash_attn_func) and callable(runtime.fa4.flash_attn_varlen_func)
    from runtime import errors

    drawn = errors.__doc__ or ""
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), runtime.CubineryError) and name in drawn


@pytest.mark.parametrize("name", ["registry/__init__.py", "registry.py", "registry/else.py"])
def test_a_registry_from_elsewhere_is_refused(tmp_path: Path, name: str):
    """A package, a module, or a mere folder, which counts only where no package is found."""
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.touch()
    if name == "registry/else.py":
        assert python("import runtime; print(runtime.__name__)", path=tmp_path).strip() == "runtime"
        return
    foreign = foreign if name == "registry.py" else foreign.parent
    code = "import sys\ntry:\n    import runtime\nexcept ImportError as error:\n    print(error.reason, error)"
    said = python(code, path=tmp_path)
    assert said.startswith("install ") and str(foreign) in said and str(ROOT / "registry") in said


def test_threads_have_their_own_parameter_buffers(backend: FakeBackend, registry: Path):
    """The driver lets every thread pass between a launch's start and its reading of the parameters."""
    barrier = threading.Barrier(4)
    plain = backend.driver.launch

    def racing(*arguments):
        barrier.wait(timeout=30)
        return plain(*arguments)

    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    backend.driver.launch = racing
    plans.drop()
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for n in range(5):
                tensors = inputs(seed=10 * seed + n)
                torch.testing.assert_close(
                    runtime.flash_attn(*tensors).double(), reference(*tensors)[0], atol=2e-2, rtol=2e-2
                )
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    before = len(backend.driver.launches)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert len(backend.driver.launches) == before + 20
    assert backend.driver.calls.count("load_library") == 1


def test_a_plan_made_while_settings_change_is_not_kept(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    plain = backend.driver.load_library

    def meanwhile(cubin):
        runtime.configure(registry=registry)
        return plain(cubin)

    backend.driver.load_library = meanwhile
    runtime.flash_attn(q, k, v)
    assert not plans.plans.by_call and len(backend.driver.launches) == 1


def test_a_session_of_replaced_settings_is_not_stored(
    backend: FakeBackend, registry: Path, tmp_path: Path, monkeypatch
):
    """configure() while another thread is between reading the settings and storing its session."""
    opening, go_on = threading.Event(), threading.Event()
    plain = session.open_source

    def slow(settings):
        opening.set()
        assert go_on.wait(30)
        return plain(settings)

    monkeypatch.setattr(session, "open_source", slow)
    first = threading.Thread(target=session.current)
    first.start()
    assert opening.wait(30)
    other = str(tmp_path / "other.db")
    second = threading.Thread(target=runtime.configure, kwargs={"registry": other})
    second.start()
    second.join(0.3)  # as far as it gets
    go_on.set()
    first.join()
    second.join()
    assert session.current().config.registry == other


def test_a_loaded_kernel_s_new_plan_waits_for_no_fetch(backend: FakeBackend, registry: Path, monkeypatch):
    runtime.flash_attn(*inputs())
    source = session.current().source
    fetching, go_on = threading.Event(), threading.Event()
    plain, fetched = source.frame, []

    def slow(artifact):
        fetched.append(artifact.variant)
        fetching.set()
        assert go_on.wait(30)
        return plain(artifact)

    monkeypatch.setattr(source, "frame", slow)
    slow_ones = [threading.Thread(target=runtime.flash_attn, args=inputs(head_dim=128)) for _ in range(2)]
    quick = threading.Thread(target=runtime.flash_attn, args=inputs(seqlen_k=3))
    try:
        slow_ones[0].start()
        assert fetching.wait(30)
        slow_ones[1].start()
        quick.start()
        quick.join(10)
        assert not quick.is_alive()
    finally:
        go_on.set()
        for thread in (*slow_ones, quick):
            thread.join()
    assert len(fetched) == 1, "one fetch serves all who wait for it"
    assert backend.driver.calls.count("load_library") == 2 and len(backend.driver.launches) == 4


def test_a_new_thread_binds_its_context(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    before = backend.driver.calls.count("context")
    thread = threading.Thread(target=runtime.flash_attn, args=(q, k, v))
    thread.start()
    thread.join()
    assert backend.driver.calls.count("context") == before + 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_afresh(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    read, write = os.pipe()
    torch.set_num_threads(1)  # torch's own pool does not outlive a fork
    child = os.fork()
    if child == 0:
        try:
            empty = not plans.plans.by_call
            runtime.flash_attn(q, k, v)
            said = {"empty": empty, "loads": backend.driver.calls.count("load_library")}
            os.write(write, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = json.load(pipe)
    os.waitpid(child, 0)
    assert said == {"empty": True, "loads": 2}
    assert plans.plans.by_call and backend.driver.calls.count("load_library") == 1


def test_a_fork_while_a_load_is_under_way(backend: FakeBackend, registry: Path):
    """The child's locks are new, though the parent's are held by another thread."""
    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with session._lock, loading:
            held.set()
            release.wait(30)

    loading = session.current()._lock
    try:
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(30)
        torch.set_num_threads(1)
        child = os.fork()
        if child == 0:
            done = threading.Event()
            threading.Thread(target=lambda: (runtime.flash_attn(q, k, v), done.set()), daemon=True).start()
            os._exit(0 if done.wait(20) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        release.set()
        thread.join()


def test_cuda_in_a_bad_fork_is_a_typed_error(monkeypatch):
    from runtime.errors import DriverError
    from runtime.load.backend import TorchBackend

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(DriverError, match="spawn") as error:
        TorchBackend()
    assert error.value.reason == "fork"


def test_configure_closes_what_the_last_settings_had_open(monkeypatch, tmp_path):
    from runtime.load import session

    closed = []
    monkeypatch.setattr(session.Session, "__init__", lambda self: setattr(self, "source", self))
    monkeypatch.setattr(session.Session, "close", lambda self: closed.append(self), raising=False)
    session.reset()
    old = session.current()
    runtime.configure(registry=tmp_path / "other.db")
    assert closed == [old]
    session.current()
    session._after_fork()  # the parent still uses its connections
    assert closed == [old]
    runtime.configure()
