"""The driver's bindings are imported without cuda.pathfinder, and nobody else notices."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.load import bindings

PROGRAM = """
import ctypes, sys
from runtime.load import bindings
with bindings.without_pathfinder():
    import cuda.bindings.driver
    {within}
    within = [name for name in sys.modules if name.startswith("cuda.pathfinder")]
{after}
"""


def run(within: str = "pass", after: str = "") -> str:
    """In a process that has imported none of it."""
    code = PROGRAM.format(within=within, after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_pathfinder_is_not_imported_and_afterwards_is_the_real_one():
    after = """
import cuda
assert set(within) <= {"cuda.pathfinder"} and "cuda.pathfinder" not in sys.modules and not hasattr(cuda, "pathfinder")
import cuda.pathfinder
assert type(cuda.pathfinder) is type(sys) and cuda.pathfinder.__file__ and sys.modules["cuda.pathfinder"].__version__
assert cuda.bindings.driver.cuInit
print("fine")
"""
    assert run(after=after) == "fine"


@pytest.mark.parametrize(
    "within",
    [
        "import cuda.pathfinder; cuda.pathfinder.DynamicLibNotFoundError",
        "import cuda.pathfinder as p; p.__version__",
        "from cuda.pathfinder import __version__",
        "from cuda.pathfinder import *; load_nvidia_dynamic_lib, DynamicLibNotFoundError",
        "from cuda.pathfinder._version import __version__",
        "import importlib.util; assert importlib.util.find_spec('cuda.pathfinder').origin",
        "import threading; t = threading.Thread(target=lambda: __import__('cuda.pathfinder').pathfinder.__version__);"
        " t.start(); t.join()",
    ],
)
def test_who_imports_it_meanwhile_gets_its_names(within: str):
    assert run(within, "import cuda.pathfinder; print(cuda.pathfinder.__version__[0] in '0123456789')") == "True"


def test_libcuda_is_what_is_loaded_and_all_else_is_pathfinders(monkeypatch: pytest.MonkeyPatch):
    with bindings.without_pathfinder():
        pass
    pathfinder = pytest.importorskip("cuda.pathfinder")
    asked: list[str] = []
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", lambda name: asked.append(name) or "theirs")
    monkeypatch.setattr(bindings, "LIBCUDA", "libc.so.6")  # one that is loaded here
    stand_in = bindings.Pathfinder(pathfinder.__spec__)
    assert stand_in.load_nvidia_dynamic_lib("cuda")._handle_uint
    assert stand_in.load_nvidia_dynamic_lib("nvrtc") == "theirs" and asked == ["nvrtc"]
    monkeypatch.setattr(bindings, "LIBCUDA", "libno-such-library.so")
    assert stand_in.load_nvidia_dynamic_lib("cuda") == "theirs" and asked == ["nvrtc", "cuda"]


def test_an_error_while_importing_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="of the import"), bindings.without_pathfinder():
        raise RuntimeError("of the import")
    assert not isinstance(sys.modules.get(bindings.NAME), bindings.Pathfinder)
