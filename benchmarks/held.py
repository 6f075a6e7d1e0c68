"""FlashAttention-2 with the tiles that it takes on SM120, timed in a process of its own.

It chooses tiles by how much shared memory a block may have, which is 99 KB on SM120 and 227 KB on an H200. In that
process benchmarks/held.c is preloaded, so that the CUDA runtime answers 99 KB. In PyTorch's copy of it the forward has
other tiles for that at head_dim 224 alone, the backward at nearly all head dims. Nothing is padded: as many blocks
share an SM as fit.

The process has the inputs and the graphs of one case at a time. It times rounds when it is asked to, between those of
the process that asks, so that only one of them uses the GPU and clocks drift alike for both.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError
from registry.contract import MAX_SMEM

SOURCE = Path(__file__).with_name("held.c")
ANSWER_S = 300.0  # seconds in which the other process answers, the import of torch included


class HeldPeer:
    """The process. It starts again for the case after the one in which it died.

    proof: what it found when it started; empty before. Raises BenchmarkError where the process fails or cannot be
    started, and where the CUDA runtime answers something else than 99 KB in it.
    """

    def __init__(self) -> None:
        self.proof: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HeldPeer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Start the process if it does not run."""
        if self._process is None:
            self._start()

    def prepare(self, what: str, case: Case, dtype: str) -> None:
        """Make the inputs of a dense case, run it for the first times, and let go of the case before.

        what: 'forward' or 'backward'.
        """
        self.start()
        self._ask("prepare", what=what, case=case, dtype=dtype)

    def round(self, repeat: int) -> list[float]:
        """Milliseconds of two calls of the case that was prepared, the first and the second of a round."""
        found: list[float] = self._ask("round", repeat=repeat)
        return found

    def _start(self) -> None:
        preload = build(Path(self._folder.name))
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.held_child", str(theirs.fileno()), measure.DEVICE]
            path = os.pathsep.join([str(measure.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            preloads = " ".join([str(preload), *filter(None, [os.environ.get("LD_PRELOAD")])])
            env = {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": preloads}
            self._process = subprocess.Popen(command, cwd=measure.ROOT, env=env, pass_fds=[theirs.fileno()])
        self.proof = self._ask("proof")
        if problem := unproven(self.proof):
            self._stop()
            raise BenchmarkError(f"the held peer: {problem}")

    def _ask(self, method: str, **given: Any) -> Any:
        try:
            self._pipe.send((method, given))
            if not self._pipe.poll(ANSWER_S):
                self._stop()
                raise BenchmarkError(f"the held peer: no answer to {method} within {ANSWER_S:.0f} s")
            value, error = self._pipe.recv()
        except (EOFError, OSError):
            raise BenchmarkError(f"the held peer: its process ended with {self._stop()}") from None
        if error:
            raise BenchmarkError(f"the held peer: {error}")
        return value

    def _stop(self) -> int | None:
        """End the process, if there is one; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._pipe.close()
        try:
            return process.wait(timeout=10)  # it ends when the pipe does
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def unproven(proof: dict[str, int]) -> str | None:
    """Why the process does not hold FlashAttention-2; None if it does.

    proof: bytes: what the CUDA runtime answers; asked: how often FlashAttention-2 asked for that in one backward.
    """
    if proof["bytes"] != MAX_SMEM:
        return f"the CUDA runtime says that a block may have {proof['bytes']} bytes, not {MAX_SMEM}"
    if measure.DEVICE == "cuda" and not proof["asked"]:
        return "FlashAttention-2 does not ask the CUDA runtime that is preloaded: this torch has one linked in"
    return None


def build(folder: Path) -> Path:
    """Compile the preload into `folder` with $CC, by default cc. BenchmarkError, with what the compiler says."""
    target = folder / "held.so"
    options = ["-shared", "-fPIC", "-O1", f"-DHELD={MAX_SMEM}", "-o", str(target), str(SOURCE), "-ldl"]
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        done = subprocess.run([*compiler, *options], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BenchmarkError(f"CC: {compiler[0]} cannot be run ({error.strerror}); name a C compiler") from None
    if done.returncode:
        raise BenchmarkError(f"CC: {compiler[0]} does not compile {SOURCE.name}: {done.stderr.strip()[-2000:]}")
    return target
