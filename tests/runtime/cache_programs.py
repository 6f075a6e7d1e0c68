"""Programs that use one disk cache: each forks many processes from one that has imported all, and reports as JSON.

    python -m tests.runtime.cache_programs crash|cold '<options as JSON>'

A client here is what the runtime does from an index's artifact to verified bytes; only its server is replaced.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import runtime.sources.cache
from benchmarks.warm_load import ABI, made_up
from registry.contract import Artifact, Index, OpenIndex
from registry.frames import unpack
from runtime.errors import IntegrityError
from runtime.sources.cache import DiskCache
from runtime.sources.remote import CachedSource

PLANTED = 10  # bytes of an entry that was cut off on purpose
SYSCALLS = ("open", "mkdir", "makedirs", "write", "fsync", "close", "rename", "replace", "unlink", "utime", "fstat",
            "read", "lstat", "stat", "scandir", "fwalk")  # fmt: skip


def release(n: int, nbytes: int = 20_000) -> tuple[Index, dict[str, bytes]]:
    """An index of n kernels for sm_120 of nbytes each, and all bodies by digest."""
    made = [made_up(i, nbytes, 4) for i in range(n)]
    index = Index("sm_120", "0.1", tuple(artifact for artifact, _ in made), (), (ABI,))
    return index, {index.digest: index.to_bytes()} | {artifact.frame_sha256: frame for artifact, frame in made}


class Bodies:
    """A server that gives what it has, and writes the digest of each answer to a pipe."""

    where = "bodies"

    def __init__(self, bodies: dict[str, bytes], answered: int | None = None):
        self.bodies, self.answered = bodies, answered

    def _give(self, digest: str) -> bytes:
        if self.answered is not None:
            os.write(self.answered, digest.encode() + b"\n")  # one write below PIPE_BUF: never torn
            time.sleep(0.002)  # so that others get as far as to wait
        return self.bodies[digest]

    def channel(self, name: str) -> dict[str, str]:
        raise AssertionError("nobody asks for a channel")

    def tuf(self, path: str, cap: int) -> bytes:
        raise AssertionError("nobody asks for metadata")

    def index(self, digest: str) -> bytes:
        return self._give(digest)

    def frame(self, artifact: Artifact) -> bytes:
        return self._give(artifact.frame_sha256)

    def discard(self, kind: str, digest: str) -> bool:
        return False

    def close(self) -> None:
        pass


class Steps:
    """`os` as runtime.sources.cache sees it, with something done before, in the middle of, or after its k-th call."""

    def __init__(self, hit: Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]):
        self._hit = hit

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in SYSCALLS:
            return real
        return lambda *args, **kwargs: self._hit(name, real, args, kwargs)


def crash(options: dict[str, Any]) -> dict[str, Any]:
    """`count` clients, each killed at one system call of its writing: before it, after it, or in the middle of a write.

    Every one loads all kernels and acknowledges each; what was acknowledged must be there for the next. Returns where
    they were killed, and problems.
    """
    draw = random.Random(options["seed"])
    index, bodies = release(options["kernels"])
    killed: dict[str, int] = {}
    problems: list[str] = []
    for life in range(options["count"]):
        if life % options["lives"] == 0:  # so many use one cache, one after the other
            folder, acknowledged = os.path.join(options["folder"], str(life)), set()
        client = partial(_live_until_killed, folder, index, bodies, random.Random(draw.getrandbits(32)))
        said = _one_life(client, problems)
        acknowledged |= {word for word in said if ":" not in word}
        for word in said:
            what, _, rest = word.partition(":")
            if what == "at":
                killed[rest] = killed.get(rest, 0) + 1
            elif what == "planted":
                acknowledged.discard(rest)
        problems += [f"life {life}: {text}" for text in _check(folder, index, bodies, acknowledged)]
    return {"killed": killed, "problems": problems}


def _one_life(live: Callable[[int], None], problems: list[str]) -> list[str]:
    """The words that a forked client wrote to its pipe before it was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        live(writer)
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = lines.read().split()
    status = os.waitpid(pid, 0)[1]
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        problems.append(f"a client ended with status {status}")
    return said


def _live_until_killed(folder: str, index: Index, bodies: dict[str, bytes], draw: random.Random, said: int) -> None:
    """Loads kernels, and dies at some call after the temporary file of one was opened. Does not return."""
    try:
        cache = DiskCache(folder)
        source = CachedSource(Bodies(bodies), cache)
        chosen = draw.sample(index.artifacts, len(index.artifacts))
        missing = [a.frame_sha256 for a in chosen if cache.get("blobs", a.frame_sha256, a.frame_size) is None]
        if not missing:  # all are there: kill it while it mends one
            missing = [chosen[0].frame_sha256]
            os.truncate(cache.path("blobs", missing[0]), PLANTED)
            os.write(said, f"planted:{missing[0]}\n".encode())
        victim, before = draw.choice(missing), draw.random() < 0.5
        left = draw.randrange(8)  # calls after the temporary file's opening: up to the folder's fsync, and tidying

        def die(name: str) -> None:
            os.write(said, f"at:{name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

        def hit(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal armed, left
            armed = armed or (name == "open" and str(args[0]).startswith(victim) and args[0].endswith(".tmp"))
            now = armed and left == 0
            left -= armed
            if now and name == "write":  # some of it
                real(args[0], args[1][: draw.randrange(len(args[1]))])
                die(name)
            if now and before:
                die(name)
            result = real(*args, **kwargs)
            if now:
                die(name)
            return result

        armed = False
        runtime.sources.cache.os = Steps(hit)
        for artifact in chosen:
            try:
                unpack(source.frame(artifact), artifact)
            except IntegrityError:
                source.discard("blobs", artifact.frame_sha256)
                unpack(source.frame(artifact), artifact)
            os.write(said, artifact.frame_sha256.encode() + b"\n")
    finally:
        os._exit(1)


def _check(folder: str, index: Index, bodies: dict[str, bytes], acknowledged: set[str]) -> list[str]:
    """What is wrong with a cache after a kill: an entry that is not whole, or one that was acknowledged and is gone."""
    cache, problems = DiskCache(folder), []
    for artifact in index.artifacts:
        digest = artifact.frame_sha256
        found = cache.get("blobs", digest, artifact.frame_size)
        if found is None and digest in acknowledged:
            problems.append(f"{digest} was acknowledged and is gone")
        if found not in (None, bodies[digest]) and len(found) != PLANTED:
            problems.append(f"{digest} has {len(found)} bytes of something else")
    return problems


def cold(options: dict[str, Any]) -> dict[str, Any]:
    """`processes` clients that start at the same moment on one empty cache and each load all kernels.

    Returns {"downloads": {digest: how often}, "failed": exit codes that are not 0, "seconds"}.
    """
    index, bodies = release(options["kernels"])
    reader, writer = os.pipe()
    gate, opened = os.pipe()
    pids = []
    for _ in range(options["processes"]):
        pid = os.fork()
        if pid == 0:
            os.close(opened)
            _start_cold(options, index, bodies, gate, writer)
        pids.append(pid)
    for fd in (writer, gate):
        os.close(fd)
    started = time.monotonic()
    os.close(opened)  # all of them read its end now
    downloads: dict[str, int] = {}
    with os.fdopen(reader) as lines:
        for line in lines:
            downloads[line.strip()] = downloads.get(line.strip(), 0) + 1
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    seconds = round(time.monotonic() - started, 2)
    return {"downloads": downloads, "failed": [status for status in statuses if status], "seconds": seconds}


def _start_cold(options: dict[str, Any], index: Index, bodies: dict[str, bytes], gate: int, answered: int) -> None:
    code = 1
    try:
        if options["locks"] == "refused":
            runtime.sources.cache.fcntl = _NoLocks(37)  # ENOLCK
        elif options["locks"] == "ignored":
            runtime.sources.cache.fcntl = _NoLocks(0)
        os.read(gate, 1)
        cache = DiskCache(options["folder"], options.get("limit", runtime.sources.cache.LIMIT))
        source = CachedSource(Bodies(bodies, answered), cache)
        OpenIndex(source.index(index.digest), index.digest)
        for artifact in index.artifacts:
            unpack(source.frame(artifact), artifact)
        code = 0
    finally:
        os._exit(code)


class _NoLocks:
    """fcntl on a file system whose locks fail with an error, or seem to work and exclude nobody."""

    LOCK_EX, LOCK_NB, LOCK_UN = 2, 4, 8

    def __init__(self, error: int):
        self.error = error

    def flock(self, fd: int, operation: int) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


if __name__ == "__main__":
    program = {"crash": crash, "cold": cold}[sys.argv[1]]
    print(json.dumps(program(json.loads(sys.argv[2]))))
