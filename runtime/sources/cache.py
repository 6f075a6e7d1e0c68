"""The disk cache: `<cache>/v1/blobs/sha256/ab/<hex>` and `…/indexes/…`, named by the SHA-256 of the content.

Correctness never rests on it: what is read is verified again by its reader, and an entry appears whole or not at all.
Locks (`<cache>/v1/locks/ab`) only save downloads: where they do not work, everybody fetches for itself, and the last
rename replaces equal bytes. A folder that cannot be written, or a full disk, means loading from memory. An entry's time
of modification is that of its last use; above the limit, what was used longest ago goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from registry.contract import sha256_hex
from runtime.config import CACHE_LIMIT as LIMIT
from runtime.errors import SourceError

KEPT = 0.9  # of the limit, after making room
STRIDE = 64  # the room left is measured again when this part of it has been written: many processes write at once
KINDS = ("blobs", "indexes")
LONGEST = 64 << 20  # bytes of any entry
STALE_S = 86_400  # of a temporary file whose process must be gone, or a corrupt entry that nobody looked at
TOUCH_S = 600  # a use is noted once in so many seconds
LOCK_WAIT_S = 30.0  # for another's download of the same entry; then it is fetched once more
POLL_S = 0.002, 0.05  # shortest and longest pause between two looks at a lock

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTRY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # or opening a FIFO would wait for its writer

log = logging.getLogger("cubinery")


class Usage(NamedTuple):
    """What a cache holds. nbytes: of all files; corrupt: entries that were set aside."""

    entries: int
    corrupt: int
    nbytes: int


class DiskCache:
    """root: the cache's folder; made with mode 0700 at the first write. limit: bytes that it may hold.

    Raises SourceError ('cache_owner') when the folder is a link, or belongs to or can be written by somebody else.
    """

    def __init__(self, root: str, limit: int = LIMIT):
        self.root = root
        self.limit = limit
        self._unmeasured = 0  # bytes that may be written before the folder is measured again
        self._complained = False
        self._bypassed: set[str] = set()  # paths of corrupt entries that could not be moved

    def path(self, kind: str, digest: str) -> str:
        """Where an entry lies. kind: 'blobs' or 'indexes'."""
        return os.path.join(self.root, "v1", kind, "sha256", digest[:2], digest)

    def fetch(self, kind: str, digest: str, cap: int, download: Callable[[], bytes]) -> bytes:
        """An entry's bytes, unverified; where it is missing, what `download` returns, which is kept if it hashes right.

        Among all processes and threads one downloads and the others wait for it, as far as locks work here.
        """
        data = self.get(kind, digest, cap)
        if data is None:
            with self._turn(digest, lambda: self.get(kind, digest, cap) is not None):
                data = self.get(kind, digest, cap)
                if data is None:
                    data = download()
                    self.put(kind, digest, data)
        return data

    def get(self, kind: str, digest: str, cap: int) -> bytes | None:
        """An entry's bytes, unverified; None where there is no regular file of at most `cap` bytes, owned by us."""
        if self.path(kind, digest) in self._bypassed:
            return None
        try:
            with self._folder(kind, "sha256", digest[:2]) as folder:
                fd = os.open(digest, _ENTRY, dir_fd=folder)
                try:
                    return _read_entry(fd, cap)
                finally:
                    os.close(fd)
        except SourceError:
            raise
        except OSError:  # absent, a link, or unreadable: all a miss
            return None

    def put(self, kind: str, digest: str, data: bytes) -> None:
        """Write an entry, whole or not at all. Bytes that do not hash to `digest` are not written."""
        if sha256_hex(data) != digest or len(data) > self.limit:
            return  # its reader verifies too, and says what is wrong
        try:
            with self._folder(kind, "sha256", digest[:2], make=True) as folder:
                _write_whole(folder, digest, data)
                self._bypassed.discard(self.path(kind, digest))
                _remove_stale(folder)
            self._make_room(len(data))
        except SourceError:
            raise
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("cache %s cannot be written (%s): loading from memory", self.root, error.strerror)

    def set_aside(self, kind: str, digest: str) -> bool:
        """Move an entry found corrupt out of the way, or where it cannot be moved pass it over from now on.

        Whether asking again may give other bytes: there was one, or another process has mended it meanwhile.
        """
        path = self.path(kind, digest)
        with self._turn(digest):
            data = self.get(kind, digest, LONGEST)
            if data is not None and sha256_hex(data) == digest:
                return True
            try:
                os.replace(path, path + ".corrupt")
                log.warning("cache entry %s was corrupt: set aside", path)
                with contextlib.suppress(OSError):
                    os.utime(path + ".corrupt")  # its age counts from now
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
        self._check_owner(facts)

    def usage(self) -> Usage:
        """What is there now. Raises OSError where it cannot be read."""
        files = list(self._files())
        corrupt = sum(path.endswith(".corrupt") for _, _, path in files)
        entries = sum(len(os.path.basename(path)) == 64 for _, _, path in files)
        return Usage(entries, corrupt, sum(size for _, size, _ in files))

    def _check_owner(self, facts: os.stat_result) -> None:
        if not stat.S_ISDIR(facts.st_mode) or _foreign(facts):
            raise SourceError(
                f"cache {self.root}: must be a folder (no link) that you or root own and nobody else can write; fix "
                "its owner and mode, or name another with runtime.configure(cache=…) or CUBINERY_CACHE",
                reason="cache_owner",
            )

    @contextlib.contextmanager
    def _folder(self, *parts: str, make: bool = False) -> Iterator[int]:
        """A descriptor of `<root>/v1/<parts>`. Each step is opened from the last and examined once it is open, so a
        link put there meanwhile is not followed. OSError if one is missing, a link, or not ours alone."""
        self.check_owner()
        if make:
            os.makedirs(os.path.dirname(self.root), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.root, 0o700)
        fd = os.open(self.root, _FOLDER)
        try:
            self._check_owner(os.fstat(fd))
            for part in ("v1", *parts):
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=fd)
                fd, outer = os.open(part, _FOLDER, dir_fd=fd), fd
                os.close(outer)
                if _foreign(os.fstat(fd)):
                    raise PermissionError(errno.EPERM, f"others can write its folder {part}")
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _turn(self, digest: str, done: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Alone with a digest, as far as locks work here; waits until then, until `done()`, or for LOCK_WAIT_S."""
        lock = self._lock_file(digest)
        end, pause = time.monotonic() + LOCK_WAIT_S, POLL_S[0]
        try:
            while lock is not None and not _try_lock(lock) and not done() and time.monotonic() < end:
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
            yield
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):  # said, not left to close: a forked child has the descriptor too
                    fcntl.flock(lock, fcntl.LOCK_UN)
                with contextlib.suppress(OSError):
                    os.close(lock)

    def _lock_file(self, digest: str) -> int | None:
        """The open lock file of a digest, which it shares with others; None where there can be none."""
        try:
            with self._folder("locks", make=True) as folder:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                return os.open(digest[:2], flags, 0o600, dir_fd=folder)
        except SourceError:
            raise
        except OSError:
            return None

    def _make_room(self, written: int) -> None:
        """Remove what was used longest ago if there is more than the limit."""
        self._unmeasured -= written
        if self._unmeasured >= 0:
            return
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total > self.limit:
            for _, size, path in files[:-1]:  # what was just written stays
                if total <= KEPT * self.limit:
                    break
                if not path.endswith(".tmp"):  # somebody is writing it
                    with contextlib.suppress(FileNotFoundError):  # another process was faster
                        os.unlink(path)
                    total -= size
        self._unmeasured = int(max(0, self.limit - total) / STRIDE)

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last use, size in bytes, path) of every file of every entry."""
        for kind in KINDS:
            with contextlib.suppress(FileNotFoundError):  # nothing of this kind yet
                for where, _, names, folder in os.fwalk(os.path.join(self.root, "v1", kind)):
                    for name in names:
                        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                            facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
                            yield facts.st_mtime, facts.st_size, os.path.join(where, name)


def _foreign(facts: os.stat_result) -> bool:
    return facts.st_uid not in (os.geteuid(), 0) or bool(facts.st_mode & 0o022)


def _try_lock(fd: int) -> bool:
    """False while somebody else has the lock. A file system without locks keeps nobody waiting."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _read_entry(fd: int, cap: int) -> bytes | None:
    """All of a regular file of ours of at most `cap` bytes; notes that it was used."""
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or _foreign(facts) or facts.st_size > cap:
        return None
    parts, left = [], cap + 1  # one more than may be: a file that grows is seen to
    while left > 0 and (part := os.read(fd, min(left, facts.st_size + 1))):
        parts.append(part)
        left -= len(part)
    if abs(time.time() - facts.st_mtime) > TOUCH_S:
        with contextlib.suppress(OSError):  # a read-only file system
            os.utime(fd)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_whole(folder: int, name: str, data: bytes) -> None:
    """Temporary file in the same folder, written and synced, then renamed; the folder is synced last."""
    temporary = f"{name}.{os.getpid()}.{os.urandom(6).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        _rename(folder, temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    os.fsync(folder)


def _rename(folder: int, temporary: str, name: str) -> None:
    """A folder that lies where the entry belongs is moved aside."""
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except IsADirectoryError:
        os.rename(name, name + ".corrupt", src_dir_fd=folder, dst_dir_fd=folder)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def _remove_stale(folder: int) -> None:
    """Remove what killed processes left half-written, and old corrupt entries."""
    before = time.time() - STALE_S
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".tmp", ".corrupt")):
                with contextlib.suppress(OSError):  # another process was faster
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.name, dir_fd=folder)
