"""Checks of many launches: the same bits each time, in captured graphs, from several threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from registry.contract import CubineryError
from tests.gpu.cases import CAUSAL, OPEN, Call, Case, Lengths, shape_of, varlen
from tests.gpu.dut import Dut
from tests.gpu.report import Report, Scale


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """The same call gives the same bits, with other work in between: dense and varlen, heads packed or not."""
    report = Report()
    dense = Case(shape_of(key, 2, (8, 2), *scale.ragged), seed=8)
    packed = varlen(key, (8, 2), Lengths(scale.entries_q, scale.entries_k), seed=8, sink="fp32")
    try:
        for pack in (False, True):
            dut.force(key, pack)
            for case in (dense, replace(dense, window=CAUSAL), packed, replace(packed, window=CAUSAL)):
                call, other = Call(case, dut.device), Call(replace(case, seed=9), dut.device)
                first = [x.clone() for x in call(dut)]
                for _ in range(4):
                    other(dut)
                    alike = all(same(a, b) for a, b in zip(first, call(dut), strict=True))
                    report.expect(alike, f"{case}, heads packed {pack}: two calls differ")
    finally:
        dut.force(key)
    report.done()


def graph_capture(dut: Dut, key: str, scale: Scale) -> None:
    """A cold call during capture is refused; a warm one is captured, and its replays see new contents and lengths."""
    report = Report()
    dense = Case(shape_of(key, 2, (4, 2), *scale.ragged), seed=9, window=CAUSAL, sink="fp32", alibi="batch")
    cold = Call(dense, dut.device)
    dut.force(key)  # forgets what was loaded
    reason = "nothing was raised"
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            cold(dut)
    except CubineryError as error:
        reason = error.reason
    report.expect(reason == "capture", f"a cold call during capture: reason {reason!r} instead of 'capture'")
    sizes = enumerate(of_one_size(scale))
    ragged = [varlen(key, (4, 2), lengths, seed=seed, window=OPEN) for seed, lengths in sizes]
    try:
        for pack in (False, True):
            dut.force(key, pack)
            _replays(report, dut, [dense, replace(dense, seed=10), replace(dense, seed=11)])
            _replays(report, dut, ragged)
            _replays(report, dut, [replace(case, window=CAUSAL) for case in ragged])
    finally:
        dut.force(key)
    report.done()


def of_one_size(scale: Scale) -> list[Lengths]:
    """Lengths that fit one pair of arrays: rearranged, fewer rows than there is room for, other rows used."""
    q, k = scale.entries_q, scale.entries_k
    fewer = tuple(n // 2 for n in q)
    made = [
        Lengths(q, k, used_k=k, told=False),
        Lengths(q[::-1], k[1:] + k[:1], used_k=tuple(n // 3 for n in k[1:] + k[:1]), told=False),
        Lengths(fewer, k, used_k=tuple(max(n - 1, 0) for n in k), spare=sum(q) - sum(fewer), told=False),
    ]
    return [replace(lengths, k=(*lengths.k[:-1], lengths.k[-1] + made[2].spare - lengths.spare)) for lengths in made]


def _replays(report: Report, dut: Dut, cases: list[Case]) -> None:
    """Capture the first case; then put each case's inputs and lengths into its arrays, replay, and judge."""
    static = Call(cases[0], dut.device)
    static(dut)
    if dut.device == "cuda":
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = static(dut)
    for case in [*cases[1:], cases[0]]:
        call = Call(case, dut.device)
        for target, source in zip(inputs_of(static), inputs_of(call), strict=True):
            target.copy_(source)
        out._base.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        report.note(f"a replay with {case}", call.problems(out, lse))
        alike = all(same(a, b) for a, b in zip((out, lse), call(dut), strict=True))
        report.expect(alike, f"a replay differs from a call: {case}")


def inputs_of(call: Call) -> list[torch.Tensor]:
    """All that a call reads: each array with what surrounds it."""
    read = [x for name, x in call.tensors.items() if name != "out"]
    read += [call.sink, call.slopes, call.q.cu_seqlens, call.k.cu_seqlens, call.q.seqused, call.k.seqused]
    read.append(call.k.leftpad)
    return [x._base for x in read if x is not None]


def streams(dut: Dut, key: str, scale: Scale) -> None:
    """Threads with a stream each, many calls in flight, four calls a thread: each result is that of a lone call.

    The varlen calls of a thread look alike: only what cu_seqlens, seqused and sink point to differs.
    """
    report = Report()
    work = []
    for i in range(scale.threads):
        shapes = [shape_of(key, 1, (4, 2), scale.ragged[0] - i, scale.ragged[1] - 9 * i - j) for j in range(2)]
        cases = [Case(shape, seed=20 + i, window=CAUSAL) for shape in shapes]
        cases += [varlen(key, (4, 2), lengths, seed=20 + i, sink="fp32") for lengths in of_one_size(scale)[:2]]
        calls = [Call(case, dut.device) for case in cases]
        right = [[x.clone() for x in call(dut)] for call in calls]
        for call, results in zip(calls, right, strict=True):
            report.note(f"alone, {call.case}", call.problems(*results))
        work.append((calls, right))
    in_threads(dut, hammer, work, scale.calls, report)


def in_threads(dut: Dut, hammer: Callable[..., None], work: list[Any], times: int, report: Report) -> None:
    """A thread for each job of `work`, all at once: hammer(dut, *job, times, faults). Ends the report."""
    if dut.device == "cuda":
        torch.cuda.synchronize()
    faults: list[str] = []
    threads = [threading.Thread(target=hammer, args=(dut, *job, times, faults)) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.note("threads", faults)
    report.done()


def hammer(dut: Dut, calls: list[Call], right: list[Any], times: int, faults: list[str]) -> None:
    """Many calls on a stream of this thread's own, in turn."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if dut.device == "cuda" else contextlib.nullcontext():
            got = [calls[i % len(calls)](dut, out=None) for i in range(times)]
            # On this stream too: elsewhere a result could be read before it is written.
            wrong = sum(
                not all(same(a, b) for a, b in zip(results, right[i % len(right)], strict=True))
                for i, results in enumerate(got)
            )
        if wrong:
            faults.append(f"{wrong} of {times} results differ from a lone call's")
    except Exception as error:  # a thread's error must reach the report
        faults.append(repr(error))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit where neither is NaN, and NaN in the same places: rows that do not count hold NaN in both."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
