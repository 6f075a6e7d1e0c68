"""What one thread keeps for calls that look alike, dropped with the configuration that it was made in."""

from __future__ import annotations

import threading
from typing import Any

MAX_PLANS = 1024  # that a thread keeps; the oldest goes first
MAX_SIZES = 64  # plans of one family: calls that differ in lengths alone


class Plans(threading.local):
    """One thread's plans by a call's key. A shared parameter buffer would race: bindings drop the GIL in a launch."""

    def __init__(self) -> None:
        self.by_call: dict[Any, Any] = {}
        self.families: dict[Any, list[Any]] = {}  # the one that was made or changed longest ago comes first


plans = Plans()


def drop() -> None:
    """Forget every thread's plans; calls in flight finish with theirs."""
    global plans
    plans = Plans()
