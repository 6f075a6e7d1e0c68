"""Ctrl-C ends `python -m runtime prefetch` at once, at moments that it seldom comes at: each is made by statements that
the program runs first."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cli import holding_server, program

# The signal is noted by another thread, and wakes the main one from nothing: as if it came right before a wait began.
UNNOTICED = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
"""
# An exception that is raised in a __del__ is dropped.
DROPPED = """
import socket, time
class Dropping:
    def __del__(self):
        print("here", file=sys.stderr, flush=True)
        time.sleep(600)
def connect(*_, **__):
    Dropping()
    time.sleep(600)
socket.create_connection = connect
"""
# As the look-up of a name: C that no signal ends.
LOOKUP = """
import ctypes, socket
def look_up(*_, **__):
    mutex = ctypes.create_string_buffer(64)
    print("here", file=sys.stderr, flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
socket.getaddrinfo = look_up
"""
# The interrupt comes in the first event of a kind that Python's audit tells of, or as the n-th thread starts.
AT_EVENT = """
import os
def audit(event, arguments, seen=[]):
    if event == {!r} and {!r} in map(str, arguments) and not seen:
        seen.append(event)
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(audit)
"""
AT_THREAD = """
import os, threading
def start(thread, real=threading.Thread.start, started=[]):
    started.append(thread)
    if len(started) == {}:
        os.kill(os.getpid(), signal.SIGINT)
    real(thread)
threading.Thread.start = start
"""


def end_of(process: subprocess.Popen) -> tuple[str, float]:
    """What a program said that is to end now, and after how many seconds; of some only SIGKILL would make an end."""
    start = time.monotonic()
    try:
        return process.communicate(timeout=30)[1], time.monotonic() - start
    finally:
        process.kill()


@pytest.mark.parametrize(("held", "first"), [
    ("/blobs/", UNNOTICED), ("/indexes/", UNNOTICED), ("/indexes/", DROPPED), ("/indexes/", LOOKUP),
], ids=["unnoticed-pool", "unnoticed-read", "dropped", "lookup"])  # fmt: skip
def test_ctrl_c_ends_what_no_signal_wakes(tmp_path: Path, held: str, first: str):
    """Each of these would last for as long as the server is waited for."""
    with (
        holding_server(held) as (given, asked),
        program("prefetch", *given, "--cache", tmp_path / "c", first=first, stdout=subprocess.DEVNULL) as process,
    ):
        if first is UNNOTICED:
            assert asked.wait(60)
        else:
            assert process.stderr is not None and process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, spent = end_of(process)
    assert process.returncode == 130 and spent < 5


@pytest.mark.parametrize("first", [
    AT_EVENT.format("import", "httpx2"), AT_EVENT.format("socket.getaddrinfo", "127.0.0.1"),
    *map(AT_THREAD.format, range(1, 7)),
], ids=["import", "connect", *map("thread-{}".format, range(1, 7))])  # fmt: skip
def test_ctrl_c_ends_a_prefetch_however_far_it_has_come(tmp_path: Path, first: str):
    """Threads: of Ctrl-C itself, of the index' deadline, of the pool, of two kernels' deadlines."""
    with (
        holding_server("/blobs/") as (given, _),
        program("prefetch", *given, "--cache", tmp_path / "c", first=first, stdout=subprocess.DEVNULL) as process,
    ):
        errors, spent = end_of(process)
    assert process.returncode == 130 and errors == "" and spent < 15  # from the start on
