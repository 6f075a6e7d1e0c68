"""Newer releases of cuda.bindings.driver import cuda.pathfinder, which finds the libraries of CUDA toolkits and takes
longer to import than the driver module itself. That asks it for one thing, libcuda, which torch has loaded before.

So while the bindings are imported, a module stands in its place that knows libcuda, and fetches the real one for
whatever else it is asked: another library, another name, or libcuda where it is not loaded.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE, NAME = "cuda", "cuda.pathfinder"
LIBCUDA = "libcuda.so.1"


class Libcuda:
    """What pathfinder's loader returns of a library, as far as the bindings ask; the rest is pathfinder's answer."""

    def __init__(self) -> None:
        self._handle_uint = ctypes.CDLL(LIBCUDA)._handle

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(NAME).load_nvidia_dynamic_lib("cuda"), name)


class Pathfinder(ModuleType):
    """In the place of cuda.pathfinder. Who else imports that meanwhile, or keeps this, gets the real one's names."""

    def __init__(self, spec: ModuleSpec):
        super().__init__(NAME)
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations or ())

    def load_nvidia_dynamic_lib(self, libname: str) -> Any:
        if libname == "cuda":
            try:
                return Libcuda()
            except OSError:
                pass  # pathfinder says what is missing
        return _real(self).load_nvidia_dynamic_lib(libname)

    def __getattr__(self, name: str) -> Any:
        real = _real(self)
        if name == "__all__":  # of `import *`, which otherwise takes what stands here
            return getattr(real, name, [each for each in vars(real) if not each.startswith("_")])
        return getattr(real, name)


@contextmanager
def without_pathfinder() -> Iterator[None]:
    """Within, cuda.pathfinder is not imported for its own sake; afterwards whoever imports it gets the real one."""
    package = import_module(PACKAGE) if PathFinder.find_spec(PACKAGE) else None
    spec = PathFinder.find_spec(NAME, package.__path__) if package and NAME not in sys.modules else None
    if package is None or spec is None:  # of another release of the bindings, or imported already
        yield
        return
    stand_in = Pathfinder(spec)
    sys.modules[NAME] = package.pathfinder = stand_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _leave(stand_in)


def _real(stand_in: Pathfinder) -> ModuleType:
    _leave(stand_in)
    return import_module(NAME)


def _leave(stand_in: Pathfinder) -> None:
    if sys.modules.get(NAME) is stand_in:
        del sys.modules[NAME]
    package = sys.modules.get(PACKAGE)
    if getattr(package, "pathfinder", None) is stand_in:
        del package.pathfinder  # type: ignore[union-attr]
