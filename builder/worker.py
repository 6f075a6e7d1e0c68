"""The other process: PTX generation and assembly, away from the parent, so that a crash takes one variant with it.

`Pool` is the parent's side, `main` the child's. Each child serves many variants; a fresh one replaces it when it dies.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from builder import ROOT, nvjitlink
from builder.errors import AssembleError
from builder.toolchain import DSL_ARCH
from registry.contract import Variant
from registry.frames import compress

TIME_LIMIT = 600.0  # seconds that a variant may take before its worker is ended
GRACE = 5.0  # seconds that a worker which hung up may take to end
LOOK_S = 0.5  # longest wait at once: a signal that comes right before one does not wake it
_LOG_TAIL = 2000  # characters of a dead worker's output that its reason quotes


@dataclass(frozen=True)
class Task:
    """Generate (unless `ptx` is stored already) and assemble one variant. generator: 'module:function'."""

    key: str
    archs: tuple[str, ...]
    generator: str
    ptx: str | None = None


@dataclass(frozen=True)
class Cubin:
    """One assembled architecture: the cubin, its zstd frame and nvJitLink's log."""

    cubin: bytes
    frame: bytes
    log: str


@dataclass
class Answer:
    """What became of a task. error: why there is nothing more; errors: why an architecture has no cubin.
    facts: symbol, threads, smem, grid of a PTX that was generated now."""

    key: str
    ptx: str | None = None
    facts: dict[str, Any] | None = None
    cubins: dict[str, Cubin] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    error: str | None = None


# -- the child ---------------------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Serve tasks from the parent until it hangs up. Whatever is printed on the way goes to the log."""
    with Connection(fd) as parent:
        while True:
            try:
                task: Task = parent.recv()
            except EOFError:
                return
            parent.send(perform(task))


def perform(task: Task) -> Answer:
    """Generate and assemble; errors become part of the answer."""
    answer = Answer(task.key, task.ptx)
    if answer.ptx is None:
        try:
            answer.ptx, answer.facts = _generate(task)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            answer.error = f"generate: {type(error).__name__}: {str(error)[:_LOG_TAIL]} ({where})"
            return answer
    for arch in task.archs:
        try:
            assembled = nvjitlink.assemble(answer.ptx, arch)
            answer.cubins[arch] = Cubin(assembled.cubin, compress(assembled.cubin), assembled.log)
        except AssembleError as error:
            answer.errors[arch] = f"{arch}: assemble: {error}"
    return answer


def _generate(task: Task) -> tuple[str, dict[str, Any]]:
    module, function = task.generator.split(":")
    generate = getattr(importlib.import_module(module), function)
    with tempfile.TemporaryDirectory(dir=os.environ["TMPDIR"]) as dump_dir:
        made = generate(Variant.parse(task.key), dump_dir)
    grid = {"rule": made.grid.rule, "tile_m": made.grid.tile_m}
    return made.ptx, {"symbol": made.symbol, "threads": made.threads, "smem": made.smem, "grid": grid}


# -- the parent --------------------------------------------------------------------------------------------------------


class Worker:
    """One child with a folder of its own. It leads its own process group: a Ctrl-C reaches the parent alone."""

    task: Task | None

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.task, self.deadline = folder, None, 0.0
        self.connection, theirs = Pipe()
        with theirs, (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from builder.worker import main; main({theirs.fileno()})"],
                env=environment(folder),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, task: Task, time_limit: float) -> None:
        self.task, self.deadline = task, time.monotonic() + time_limit
        with contextlib.suppress(ConnectionError):  # it died just now: finish() will say how
            self.connection.send(task)

    def finish(self) -> Answer:
        """The answer, or what the worker's death says."""
        task, self.task = self.task, None
        assert task is not None
        try:
            answer: Answer = self.connection.recv()
            return answer
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE)
            self.end()  # it may have hung up and live on
            return Answer(task.key, error=f"worker: its process {_ending(self.process.wait())}{self._log()}")

    def expire(self) -> Answer:
        """Give up on a task that takes too long, and on the worker."""
        task, self.task = self.task, None
        assert task is not None
        self.end()
        return Answer(task.key, error=f"timeout: not done in time{self._log()}")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """End the process, with whatever it started, if it has not ended by itself."""
        self.connection.close()
        if self.process.poll() is None:  # else its id may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _log(self) -> str:
        text = (self.folder / "log").read_text(errors="replace").strip()
        return f"; its output ends: {text[-_LOG_TAIL:]}" if text else ""


def environment(folder: Path) -> dict[str, str]:
    """A worker's environment: ours, less every setting of the DSL but the target, with all scratch files in `folder`.

    The DSL reads its target when it is imported, and keeps its caches under TMPDIR: none outlives the build.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "CUTE_DSL_ARCH": DSL_ARCH,
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",
    }
    return kept | own


class Pool:
    """At most `jobs` workers. A context manager: leaving it, by whatever way, ends them and removes their files."""

    def __init__(self, jobs: int, time_limit: float = TIME_LIMIT):
        self.jobs, self.time_limit = jobs, time_limit
        self._workers: list[Worker] = []
        self._started = 0

    def __enter__(self) -> Pool:
        self._folder = Path(tempfile.mkdtemp(prefix="cubinery-build-"))
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """One answer for every task, as they come in."""
        waiting = list(reversed(tasks))
        while waiting or any(w.task for w in self._workers):
            while waiting and (worker := self._idle()) is not None:
                worker.start(waiting.pop(), self.time_limit)
            yield from self._collect()

    def _idle(self) -> Worker | None:
        for worker in [w for w in self._workers if w.task is None and not w.alive]:
            self._retire(worker)
        idle = next((w for w in self._workers if w.task is None), None)
        if idle is None and len(self._workers) < self.jobs:
            self._started += 1
            idle = Worker(self._folder / f"w{self._started}")
            self._workers.append(idle)
        return idle

    def _collect(self) -> Iterator[Answer]:
        busy: dict[Any, Worker] = {w.connection: w for w in self._workers if w.task}
        patience = min(w.deadline for w in busy.values()) - time.monotonic()
        ready = wait(list(busy), min(max(patience, 0), LOOK_S))
        late = [w for w in busy.values() if w.deadline <= time.monotonic() and w.connection not in ready]
        for worker, answer in [(busy[c], busy[c].finish()) for c in ready] + [(w, w.expire()) for w in late]:
            if answer.error is not None or answer.errors:
                self._retire(worker)  # whatever went wrong in it must not touch the next variant
            yield answer

    def _retire(self, worker: Worker) -> None:
        worker.end()
        self._workers.remove(worker)


def _ending(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
