"""What the checks of every op do with calls: hold many to the yardstick, capture them, run them in threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from registry.contract import CubineryError
from tests.gpu.appending_run import AppendingRun
from tests.gpu.cached_run import CachedRun
from tests.gpu.dut import Dut
from tests.gpu.gradient_run import GradientRun
from tests.gpu.report import Report
from tests.gpu.run import Run
from tests.support.call import Call


def made(call: Call, device: Any) -> Any:
    """The call made real."""
    kind = GradientRun if call.grad else AppendingRun if call.append else CachedRun if call.cache else Run
    return kind(call, device)


def hold(report: Report, dut: Dut, call: Call, how: str = "") -> None:
    """One call on NaN-surrounded inputs into NaN-poisoned outputs, held to the yardstick."""
    run = made(call, dut.device)
    report.note(f"{how}{call}", run.problems(*run(dut)))


def hold_all(dut: Dut, calls: list[Call]) -> None:
    """Hold each to the yardstick, and say what is wrong."""
    report = Report()
    for call in calls:
        hold(report, dut, call)
    report.done()


@contextlib.contextmanager
def forced(dut: Dut, key: str) -> Any:
    """Afterwards the variant is in force as it was, whatever is forced within."""
    try:
        yield
    finally:
        dut.force(key)


def both_ways(dut: Dut, key: str, calls: list[Call], done: bool = True) -> Report:
    """Hold each call to the yardstick, every other one with packed heads."""
    report = Report()
    with forced(dut, key):
        for pack in (False, True):
            dut.force(key, pack)
            for call in calls[pack::2]:
                hold(report, dut, call, "heads packed, " * pack)
    if done:
        report.done()
    return report


def refused(work: Callable[[], Any]) -> str:
    """Why a call is refused; '' if it is served."""
    try:
        work()
    except CubineryError as error:
        return error.reason
    return ""


# ---- graphs ----


def captured(dut: Dut, work: Callable[[], Any]) -> tuple[Any, Any]:
    """A graph of the work, and what the work returned."""
    if dut.device == "cuda":
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def cold_capture(report: Report, dut: Dut, cold: Run) -> None:
    """A call whose kernel is not loaded is refused during capture."""

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            cold(dut)

    reason = refused(capture)
    report.expect(reason == "capture", f"a cold call during capture: reason {reason!r} instead of 'capture'")


def replays(report: Report, dut: Dut, calls: list[Call]) -> None:
    """Capture the first call; then put each one's inputs and lengths into its arrays, replay, and judge."""
    static = made(calls[0], dut.device)
    static(dut)
    graph, results = captured(dut, lambda: static(dut))
    for call in [*calls[1:], calls[0]]:
        run = made(call, dut.device)
        with torch.no_grad():
            for target, source in zip(static.read(), run.read(), strict=True):
                target.copy_(source)
            for x in run.written(*results):
                x.fill_(float("nan"))
            graph.replay()
        report.note(f"a replay with {call}", run.problems(*results))
        if not call.grad:
            report.expect(run.alike(results, run(dut)), f"a replay differs from a call: {call}")


# ---- threads ----


def in_threads(dut: Dut, work: list[list[Call]], times: int) -> None:
    """A thread with a stream for each list of calls, all at once: every result is that of a lone call."""
    report, jobs = Report(), []
    for calls in work:
        runs = [made(call, dut.device) for call in calls]
        right = [_kept(run(dut)) for run in runs]
        for run, results in zip(runs, right, strict=True):
            report.note(f"alone, {run.call}", run.problems(*results))
        jobs.append((runs, right))
    if dut.device == "cuda":
        torch.cuda.synchronize()
    faults: list[str] = []
    threads = [threading.Thread(target=_hammer, args=(dut, *job, times, faults)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.note("threads", faults)
    report.done()


def _kept(results: Any) -> Any:
    return [x.clone() if torch.is_tensor(x) else x for x in results]


def _hammer(dut: Dut, runs: list[Run], right: list[Any], times: int, faults: list[str]) -> None:
    """Many calls on a stream of this thread's own, in turn; of gradients all forwards first, then all backwards."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if dut.device == "cuda" else contextlib.nullcontext():
            turn = [i % len(runs) for i in range(times)]
            begun = [(i, runs[i].begin(dut)) for i in turn]
            got = [(i, runs[i].end(started)) for i, started in begun]
            # On this stream too: elsewhere a result could be read before it is written.
            wrong = sum(not runs[i].alike(results, right[i]) for i, results in got)
        if wrong:
            faults.append(f"{wrong} of {times} results differ from a lone call's")
    except Exception as error:  # a thread's error must reach the report
        faults.append(repr(error))


def repeated(report: Report, dut: Dut, call: Call, other: Call, how: str = "") -> None:
    """The same call gives the same bits, with another in between."""
    run, beside = made(call, dut.device), made(other, dut.device)
    first = _kept(run(dut))
    for _ in range(4):
        beside(dut)
        report.expect(run.alike(first, run(dut)), f"{call}{how}: two calls differ")
