"""Reading what anybody may have written: files and databases, bounded in bytes and time. Standard library only."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

from registry.contract.storage import SCHEMA
from registry.errors import StoreError

if TYPE_CHECKING:
    import sqlite3

# Whether there is the table of TUF's files, and no view in its place: a file of schema 1 has none.
HAS_TUF = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND rootpage > 0 AND name = 'tuf'"


def read_file(path: str | os.PathLike[str], cap: int) -> bytes | None:
    """A regular file's bytes, or None where there is none. Links are followed.

    Raises StoreError: 'too_long' for more than `cap` bytes, 'permission' or 'store' for what cannot be read.
    """
    try:  # O_NONBLOCK: opening a FIFO would wait for its writer
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreError(f"{path}: is no regular file", reason="store")
            data = file.read(cap + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = "permission" if isinstance(error, PermissionError) else "store"
        raise StoreError(f"{path}: cannot be read: {error.strerror}", reason=reason) from error
    if len(data) > cap:
        raise StoreError(f"{path}: longer than the {cap} bytes that it may have", reason="too_long")
    return data


def connect(uri: str, path: str, longest: int, busy_s: float, seconds: float) -> sqlite3.Connection:
    """A read-only connection to a registry file: its version, and tables where views or virtual tables could be.

    uri: the file, with mode=ro. path: its name for messages. No value that is read is longer than `longest` bytes,
    and nothing runs for longer than `seconds` after it has waited `busy_s` for a writer. Raises sqlite3.Error, and
    StoreError ('newer', 'not_a_registry').
    """
    import sqlite3  # here: clients of a server read files alone

    db = sqlite3.connect(uri, uri=True, timeout=busy_s)
    end = time.monotonic() + busy_s + seconds
    try:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)
        db.set_progress_handler(lambda: time.monotonic() > end, 1000)  # instructions
        db.execute("PRAGMA trusted_schema = OFF")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        # The first real read: it fails where mode=ro cannot work.
        (tables,) = db.execute(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND rootpage > 0 "
            "AND name IN ('blobs', 'channels', 'indexes')"
        ).fetchone()
        if not 1 <= version <= SCHEMA or tables != 3:
            newer = version > SCHEMA
            hint = "update the client" if newer else "it is no registry, or an unfinished one"
            message = f"{path}: registry schema {version}, this client reads 1 to {SCHEMA}: {hint}"
            raise StoreError(message, reason="newer" if newer else "not_a_registry")
    except BaseException:
        db.close()
        raise
    return db
