"""A process that must make progress: one that makes none for too long is killed, with all that it started.

A kernel that never ends, or C code that keeps the interpreter's lock, cannot be interrupted from within its process.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu.ledger import CONFORMANCE

OPS = CONFORMANCE["ops"]
UNFINISHED = 3  # exit code of `verify` and `sanitize` when --stop-after ended them
HANG_AFTER = 120.0  # s: the longest conformance test takes 16 s on an H200
SLOWER = 2.0  # times as long for a variant under a sanitizer: there all variants together took 96 s at most
POLL = 0.25  # s
KILLED = 60.0  # s that a killed process may take to be gone: the driver has to stop its kernels first


def options(hang_after: float) -> argparse.ArgumentParser:
    """What the command lines of `verify` and `sanitize` have in common. hang_after: the default of --hang-after."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--hang-after",
        type=_seconds,
        default=hang_after,
        metavar="SECONDS",
        help="kill a process that has made no progress for so long, record `hang` for the test that it was in, and go "
        f"on without that test (default {hang_after:.0f})",
    )
    parser.add_argument(
        "--stop-after",
        type=_seconds,
        default=float("inf"),
        metavar="SECONDS",
        help=f"begin no further test after so long; exit code {UNFINISHED} says that some are left",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what any run of the ledger shows as passed, for the same PTX, suite and architecture",
    )
    parser.add_argument("--ops", type=_ops, default=tuple(OPS), metavar="OP,OP", help="only variants of these ops")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _ops(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in OPS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: the ops are {', '.join(OPS)}")
    return names


def watch(command: Sequence[str], hang_after: float, *progress: Path, **how: Any) -> int | None:
    """Run a command to its end. Its exit code, or None if it was killed, because none of the files of `progress` had
    changed, appeared or gone for `hang_after` seconds. how: of subprocess.Popen.

    It runs in a process group of its own, which ends with this call, also when that is interrupted or terminated.
    """
    with _terminable():
        process = subprocess.Popen(command, start_new_session=True, **how)
        try:
            before, since = _state(progress), time.monotonic()
            while process.poll() is None and time.monotonic() - since <= hang_after:
                time.sleep(POLL)
                if (now := _state(progress)) != before:
                    before, since = now, time.monotonic()
            return process.poll()
        finally:
            _kill(process)


def _state(paths: Sequence[Path]) -> list[tuple[int, int, int] | None]:
    found = []
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _kill(process: subprocess.Popen[Any]) -> None:
    """The whole group, what outlived its first process too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(KILLED)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} is killed, and still there after {KILLED:.0f} s", file=sys.stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, as of `timeout`, raises SystemExit: the group below would not get it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
