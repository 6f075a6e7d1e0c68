"""Writing files that are whole or absent, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from registry.errors import StoreError

STALE_S = 86_400  # of a temporary folder whose process must be gone


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what the file system raises into StoreError."""
    try:
        yield
    except OSError as error:
        reasons = {PermissionError: "permission", FileNotFoundError: "missing"}
        reason = "full" if error.errno in (28, 122) else reasons.get(type(error), "store")  # ENOSPC, EDQUOT
        raise StoreError(f"{error.filename or path}: {error.strerror or error}", reason=reason) from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write a new file at, mode 0644, which takes the place of `path` at the end, synced, if nothing fails.

    It lies in a hidden folder beside `path`, where SQLite may put its own files too; what killed processes left of
    such folders is removed a day later.
    """
    with translated(path):
        _remove_stale(path)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.chmod(0o644)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)


def write(path: Path, data: bytes, temporary: Path) -> None:
    """Write a file, mode 0644, by way of the folder `temporary`. The caller syncs the folder when it must be there."""
    partial = temporary / path.name
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    for folder in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError):  # another process was faster
            if folder.stat().st_mtime < time.time() - STALE_S:
                shutil.rmtree(folder)
