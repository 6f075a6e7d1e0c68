"""Ctrl-C ends a program that waits for others at once, whatever it waits in."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CODE = 128 + signal.SIGINT
PATIENCE_S = 0.25  # for the main thread to end by itself: after Ctrl-C, and once more after it was woken


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """After a Ctrl-C in this block the process ends: by itself, as KeyboardInterrupt makes it, or after PATIENCE_S
    twice over with exit code 130. For work that may be cut anywhere.

    Python only notes a signal, and its main thread raises KeyboardInterrupt when it runs next. A signal that comes
    right before that thread waits for a lock or a socket does not wake it, nothing does in the look-up of a name, and
    in a callback or a __del__ the exception is dropped. So another thread is told of signals too.

    Nothing changes outside the main thread, and where SIGINT is ignored (`nohup`) or somebody else's.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    told, tell = os.pipe()
    os.set_blocking(tell, False)  # as Python wants it
    threading.Thread(target=_watch, args=(told, threading.get_ident()), daemon=True).start()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)


def _watch(told: int, main: int) -> None:
    with open(told, "rb", buffering=0) as pipe:
        while signal.SIGINT not in (numbers := pipe.read(64)):
            if not numbers:  # the block was left
                return
        time.sleep(PATIENCE_S)
        signal.pthread_kill(main, signal.SIGINT)  # wakes what began to wait right after the first
        time.sleep(PATIENCE_S)
        os._exit(CODE)
