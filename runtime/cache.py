"""The disk cache: `<cache>/v1/blobs/sha256/ab/<hex>` and `…/indexes/…`, named by the SHA-256 of the content.

Correctness never rests on it: what is read is verified again by its reader. No locks: two processes that fetch the same
entry both write it, and the second rename replaces equal bytes. A folder that cannot be written, or a full disk, means
loading from memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time

from registry.contract import sha256_hex
from runtime.errors import SourceError

STALE_S = 86_400  # of a temporary file whose process must be gone

log = logging.getLogger("cubinery")


class DiskCache:
    """root: the cache's folder; made with mode 0700 at the first write.

    Raises SourceError ('cache_owner') when the folder is a link, or belongs to or can be written by somebody else.
    """

    def __init__(self, root: str):
        self.root = root
        self._complained = False
        self._bypassed: set[str] = set()  # paths of corrupt entries that could not be moved

    def path(self, kind: str, digest: str) -> str:
        """Where an entry lies. kind: 'blobs' or 'indexes'."""
        return os.path.join(self.root, "v1", kind, "sha256", digest[:2], digest)

    def get(self, kind: str, digest: str, cap: int) -> bytes | None:
        """An entry's bytes, unverified; None where there is no regular file of at most `cap` bytes, owned by us."""
        self.check_owner()
        path = self.path(kind, digest)
        if path in self._bypassed:
            return None
        try:  # O_NONBLOCK: opening a FIFO would wait for its writer
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # absent, a link, or unreadable: all a miss
            return None
        with os.fdopen(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or _foreign(facts) or facts.st_size > cap:
                return None
            return file.read(cap + 1)

    def put(self, kind: str, digest: str, data: bytes) -> None:
        """Write an entry, whole or not at all. Bytes that do not hash to `digest` are not written."""
        if sha256_hex(data) != digest:
            return  # its reader verifies too, and says what is wrong
        self.check_owner()
        path = self.path(kind, digest)
        try:
            self._make_folder(os.path.dirname(path))
            _write_whole(path, data)
            self._bypassed.discard(path)
            _remove_stale(os.path.dirname(path))
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("cache %s cannot be written (%s): loading from memory", self.root, error.strerror)

    def set_aside(self, kind: str, digest: str) -> bool:
        """Move an entry found corrupt out of the way, or where it cannot be moved pass it over from now on.

        Whether there was one, so that the next `get` will miss.
        """
        path = self.path(kind, digest)
        try:
            os.replace(path, path + ".corrupt")
            log.warning("cache entry %s was corrupt: set aside", path)
        except FileNotFoundError:
            return False
        except OSError as error:
            if path in self._bypassed:
                return False  # the bytes did not come from it
            self._bypassed.add(path)
            log.warning("cache entry %s is corrupt and cannot be moved (%s): passed over", path, error.strerror)
        return True

    def check_owner(self) -> None:
        """SourceError if others could put files where we look; fine if the folder does not exist yet."""
        try:
            facts = os.lstat(self.root)
        except OSError:
            return
        if not stat.S_ISDIR(facts.st_mode) or _foreign(facts):
            raise SourceError(
                f"cache {self.root}: must be a folder (no link) that you or root own and nobody else can write; fix "
                "its owner and mode, or name another with runtime.configure(cache=…) or CUBINERY_CACHE",
                reason="cache_owner",
            )

    def _make_folder(self, folder: str) -> None:
        """Make what is missing, mode 0700 below and including the root. A link among ours raises OSError."""
        os.makedirs(os.path.dirname(self.root), exist_ok=True)
        path = self.root
        for part in ("", *os.path.relpath(folder, self.root).split(os.sep)):
            path = os.path.join(path, part) if part else path
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(20, "is no folder", path)


def _foreign(facts: os.stat_result) -> bool:
    return facts.st_uid not in (os.geteuid(), 0) or bool(facts.st_mode & 0o022)


def _write_whole(path: str, data: bytes) -> None:
    """Temporary file in the same folder, written and synced, then renamed; the folder is synced last."""
    temporary = f"{path}.{os.getpid()}.{os.urandom(6).hex()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_stale(folder: str) -> None:
    """Remove what killed processes left half-written."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process was faster
                if entry.name.endswith(".tmp") and entry.stat(follow_symlinks=False).st_mtime < time.time() - STALE_S:
                    os.unlink(entry.path)
