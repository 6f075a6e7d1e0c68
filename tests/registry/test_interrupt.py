"""What Ctrl-C does to `push`, and that watching for it leaves no trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry.interrupt import ended_by_ctrl_c
from registry.store import Store
from tests.registry.releases import keys, one_index, release

# The signal is noted by another thread, and wakes the main one from nothing: as if it came right before a wait began.
PUSH = """
import signal, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
from registry.__main__ import main
sys.exit(main(["push", *sys.argv[1:]]))
"""


def test_ctrl_c_ends_a_push_to_a_server_that_is_silent(tmp_path: Path):
    with Store(tmp_path / "r.db") as store:
        keys(store, tmp_path / "keys")
        one_index(store, "a")
        release(store, tmp_path / "keys")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", PUSH, url, "--registry", tmp_path / "r.db"], stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "CUBINERY_TOKEN": "t" * 16},
        )  # fmt: skip
        server.settimeout(60)
        with server.accept()[0] as connection:
            connection.recv(1)  # it has asked
            time.sleep(0.5)  # and waits by now, in all likelihood
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            try:
                process.communicate(timeout=30)
            finally:
                process.kill()
    assert process.returncode in (130, -signal.SIGINT) and time.monotonic() - start < 5  # the latter by itself


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_what_was_is_again(handler):
    before = signal.signal(signal.SIGINT, handler)
    files = set(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(ValueError), ended_by_ctrl_c():
            watched = signal.set_wakeup_fd(-1)
            assert (watched != -1) == (handler is signal.default_int_handler)
            signal.set_wakeup_fd(watched)
            raise ValueError
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.set_wakeup_fd(-1) == -1
    end = time.monotonic() + 10
    while set(os.listdir("/proc/self/fd")) != files and time.monotonic() < end:  # the thread closes its own
        time.sleep(0.01)
    assert set(os.listdir("/proc/self/fd")) == files
