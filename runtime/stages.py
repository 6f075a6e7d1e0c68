"""Where the time of first calls goes: one record a stage, kept for `runtime.ledger()` and doctor."""

from __future__ import annotations

from collections import deque
from time import perf_counter

# Only first calls write here: some eight records a kernel, so that the bound is never near in practice.
_records: deque[tuple[str, str, float]] = deque(maxlen=4096)


class stage:  # lower case: it reads as a statement, `with stage("verify", key):`
    """Times a block and records it, also when the block raises. Stages may nest; each counts its own whole time."""

    def __init__(self, name: str, what: str = ""):
        self._name, self._what = name, what

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        record((self._name, self._what, (perf_counter() - self._start) * 1e3))


record = _records.append  # of (stage, what, milliseconds)


def ledger() -> list[dict[str, str | float]]:
    """What each first call in this process spent: [{'stage', 'what', 'ms'}, …] in the order in which stages ended.

    Stages: import runtime, import bindings, resolve, index, select, fetch, verify, load, plan, first launch.
    """
    return [{"stage": name, "what": what, "ms": round(ms, 3)} for name, what, ms in list(_records)]
