"""The process of benchmarks/held.py, in which benchmarks/held.c is preloaded: it serves its parent until that hangs up.

A message is (method, arguments by name), its answer (value, error): the error is '' where there is a value.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import backward, forward, measure
from benchmarks.cases import Case, dense

MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # of cudaDeviceAttr
ASKS = dense("probe", 64, False, 1, 1, 64, 1)  # a call whose backward depends on the answer
WARMUP = 3


class Child:
    """What the parent can ask for."""

    def proof(self) -> dict[str, int]:
        """bytes: of shared memory that a block may have, as the CUDA runtime answers here, −1 if it fails; asked: how
        often FlashAttention-2 asked for that in one backward."""
        preloaded, value = ctypes.CDLL(None), ctypes.c_int(-1)
        preloaded.cudaDeviceGetAttribute(ctypes.byref(value), MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0)
        answers = ctypes.c_uint.in_dll(preloaded, "held_answers")
        calls = backward.peer(ASKS, *backward.draw(ASKS, "bf16"))
        measure.synchronize()
        before = answers.value
        calls[0]()
        measure.synchronize()
        return {"bytes": value.value, "asked": answers.value - before}

    def prepare(self, what: str, case: Case, dtype: str) -> None:
        self._calls: Any = None  # the case before
        if what == "backward":
            self._calls = backward.peer(case, *backward.draw(case, dtype))
        else:
            self._calls = forward.peer(case, measure.make_inputs(case, dtype))
        for i in range(WARMUP):
            measure.call(self._calls, i)
        measure.synchronize()

    def round(self, repeat: int) -> list[float]:
        run = partial(measure.call, self._calls)
        return list(measure.one_round({"first": run, "second": run}, repeat, len(self._calls)).values())


def main(fd: int, device: str) -> None:
    measure.DEVICE = device
    child = Child()
    methods: dict[str, Callable[..., Any]] = {"proof": child.proof, "prepare": child.prepare, "round": child.round}
    with Connection(fd) as parent, measure.flash_backend():
        while True:
            try:
                method, given = parent.recv()
            except EOFError:
                return
            try:
                parent.send((methods[method](**given), ""))
            except Exception as error:
                parent.send((None, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
