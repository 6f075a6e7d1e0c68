"""Half of the time that `import cuda.bindings.driver` takes goes to cuda.pathfinder, which finds the libraries of CUDA
toolkits. The driver module asks it for one thing, libcuda, which torch has loaded long before a first call.

So while the bindings are imported, a module stands in its place that knows libcuda and fetches the real one for all
else: for another name, for another library, or where libcuda is not loaded.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

NAME = "cuda.pathfinder"
LIBCUDA = "libcuda.so.1"


class Libcuda:
    """What pathfinder's loader returns of a library, as far as the bindings ask; the rest is pathfinder's answer."""

    def __init__(self) -> None:
        self._handle_uint = ctypes.CDLL(LIBCUDA)._handle

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(NAME).load_nvidia_dynamic_lib("cuda"), name)


class Pathfinder(ModuleType):
    """In the place of cuda.pathfinder."""

    def load_nvidia_dynamic_lib(self, libname: str) -> Any:
        if libname == "cuda":
            try:
                return Libcuda()
            except OSError:
                pass  # pathfinder says what is missing
        return import_module(NAME).load_nvidia_dynamic_lib(libname)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _leave(self)
        return getattr(import_module(NAME), name)


@contextmanager
def without_pathfinder() -> Iterator[None]:
    """Within, cuda.pathfinder is not imported for its own sake; afterwards whoever imports it gets the real one."""
    stand_in = Pathfinder(NAME)
    if sys.modules.setdefault(NAME, stand_in) is not stand_in:
        yield
        return
    try:
        yield
    finally:
        _leave(stand_in)


def _leave(stand_in: Pathfinder) -> None:
    if sys.modules.get(NAME) is stand_in:
        del sys.modules[NAME]
