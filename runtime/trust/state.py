"""What was trusted last: `<state>/trusted.json`, and beside it the metadata that guards against rollbacks.

A source is known by its URL or path together with the SHA-256 of the given root. Reading a channel costs one small
file: no TUF, no network. The folder is this user's alone (0700); a folder that cannot be written means refreshing anew
in each process. Writers merge under a lock; where locks do not work, the last of two that meet wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from registry.contract import check_arch, check_digest, sha256_hex
from runtime.config import read_trusted
from runtime.errors import SourceError

FORMAT = 1
MAX_ROOT = 512_000  # bytes
MAX_FILE = 64 << 20  # bytes; a longer file counts as damaged
STALE_S = 86_400  # of a temporary file whose process must be gone

_TIMES = ("checked_at", "expires", "timestamp_expires")

log = logging.getLogger("cubinery")


class Trusted(NamedTuple):
    """One channel as it was last verified. version: of the targets metadata. indexes: {arch: digest}.

    checked_at, expires, timestamp_expires: Unix seconds of the last refresh, and of the end of the targets' and of the
    timestamp's life. yanked: digests that must not be loaded.
    """

    version: int
    indexes: dict[str, str]
    checked_at: float
    expires: float
    timestamp_expires: float
    yanked: tuple[str, ...] = ()


class State:
    """The state of one source under one root. folder: made with mode 0700 at the first write.

    Raises SourceError ('state_owner') when the folder is a link, or belongs to or can be written by somebody else.
    """

    def __init__(self, folder: str, where: str, root: bytes):
        self.folder = folder
        self._source, self._root = normalised(where), sha256_hex(root)

    def read(self, channel: str) -> Trusted | None:
        """What is trusted of a channel; None where nothing is known of it, or the file is damaged."""
        return _trusted(self._load().get(self._source, {}).get(self._root, {}).get(channel))

    def metadata(self) -> bytes | None:
        """The metadata that `merge` stored last; None where there is none."""
        return self._read(self._metadata_name)

    def merge(
        self, combine: Callable[[bytes | None], tuple[bytes, int]], channel: str, found: Trusted | None
    ) -> Trusted | None:
        """Alone with the folder, as far as locks work here: store metadata, and a channel unless a newer one is there.

        combine: from the stored metadata to what is to be stored, and its targets' version. Returns what is trusted of
        the channel now: `found`, or what another process found meanwhile; None if `found` is.
        """
        with self._alone() as writable:
            stored = self.metadata()
            metadata, version = combine(stored)
            if writable and metadata != stored:
                self._write(self._metadata_name, metadata)
            if found is None:
                return None
            sources = self._load()
            channels = sources.setdefault(self._source, {}).setdefault(self._root, {})
            other = _trusted(channels.get(channel))
            # Above the metadata's own version stands only what a replaced key has signed.
            if other is not None and found.version < other.version <= version:
                return other
            if writable:
                channels[channel] = found._asdict()
                self._write("trusted.json", json.dumps({"format": FORMAT, "sources": sources}, indent=1).encode())
            return found

    @property
    def _metadata_name(self) -> str:
        return "tuf-" + sha256_hex(f"{self._source}\n{self._root}".encode())[:32] + ".json"

    def _load(self) -> dict[str, dict[str, dict[str, Any]]]:
        """trusted.json: source -> SHA-256 of its root -> channel -> the fields of a Trusted."""
        text = self._read("trusted.json")
        if text is None:
            return {}
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r:.20}")
            sources = found["sources"].items()
            return {source: {root: dict(channels) for root, channels in roots.items()} for source, roots in sources}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s/trusted.json is damaged (%s): asking again", self.folder, error)
            return {}

    # -- files --------------------------------------------------------------------------------------------------------

    def _check_owner(self) -> None:
        try:
            facts = os.lstat(self.folder)
        except OSError:
            return
        if not stat.S_ISDIR(facts.st_mode) or _foreign(facts):
            raise SourceError(
                f"state {self.folder}: must be a folder (no link) that you or root own and nobody else can write; fix "
                "its owner and mode, or name another with runtime.configure(state=…) or CUBINERY_STATE",
                reason="state_owner",
            )

    def _read(self, name: str) -> bytes | None:
        self._check_owner()
        try:  # O_NONBLOCK: opening a FIFO would wait for its writer
            fd = os.open(os.path.join(self.folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or _foreign(facts) or facts.st_size > MAX_FILE:
                return None
            return file.read(MAX_FILE + 1)

    def _write(self, name: str, data: bytes) -> None:
        """Whole or not at all: a temporary file in the folder, synced and renamed."""
        path = os.path.join(self.folder, name)
        temporary = f"{path}.{os.getpid()}.{os.urandom(6).hex()}.tmp"
        try:
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
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            log.warning("state %s cannot be written (%s): not kept", path, error.strerror)

    def _remove_stale(self) -> None:
        """Remove what killed processes left half-written."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".tmp") and entry.stat(follow_symlinks=False).st_mtime < time.time() - STALE_S:
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Holds the folder's lock where locks work; yields whether the folder can be written at all."""
        self._check_owner()
        try:
            os.makedirs(os.path.dirname(self.folder), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder, 0o700)
            path = os.path.join(self.folder, "lock")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("state %s cannot be written (%s): not kept", self.folder, error.strerror)
            yield False
            return
        self._check_owner()
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            self._remove_stale()
            yield True
        finally:
            os.close(fd)


def normalised(where: str) -> str:
    """A source's name as a key: a URL with its scheme and host in lower case, or a path."""
    if "://" not in where:
        return os.path.abspath(where)
    parts = urllib.parse.urlsplit(where)
    return parts._replace(scheme=parts.scheme.lower(), netloc=parts.netloc.lower()).geturl().rstrip("/")


def _trusted(found: Any) -> Trusted | None:
    try:
        indexes = {check_arch(arch): check_digest(digest) for arch, digest in found["indexes"].items()}
        yanked = tuple(check_digest(digest) for digest in found["yanked"])
        checked_at, expires, timestamp_expires = (float(found[name]) for name in _TIMES)
        return Trusted(int(found["version"]), indexes, checked_at, expires, timestamp_expires, yanked)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _foreign(facts: os.stat_result) -> bool:
    return facts.st_uid not in (os.geteuid(), 0) or bool(facts.st_mode & 0o022)


def read_root(path: str) -> bytes:
    """The given root's bytes, unverified. ConfigError if it cannot be read or others could have written it."""
    return read_trusted(path, "root", MAX_ROOT)
