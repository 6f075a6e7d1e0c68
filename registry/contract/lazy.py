"""Packages that import a file when one of its names is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def hand_on(package: str, files: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package whose files define these names: {file: 'Name other_name'}."""
    file_of = {name: file for file, names in files.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in file_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{file_of[name]}")
        value = vars(import_module(package))[name] = getattr(module, name)
        return value

    return sorted(file_of), get
