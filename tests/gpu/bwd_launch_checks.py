"""Checks of gradients over many launches, beyond 2³¹ elements, in captured graphs, threads and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from registry.contract import CubineryError
from tests.gpu.bwd_cases import BwdCall, BwdCase, Gradients, dense, dims_of, reseeded, same, varlen
from tests.gpu.cases import CAUSAL, OPEN, Lengths, Side
from tests.gpu.dut import Dut, poisoned_allocations
from tests.gpu.inputs import DTYPES
from tests.gpu.launch_checks import in_threads, inputs_of, of_one_size
from tests.gpu.report import Report, Scale


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """deterministic=True gives the same bits over a thousand runs, small and larger; a tenth of that for others.

    So does PyTorch's own switch.
    """
    report = Report()
    several = varlen(key, (8, 2), Lengths(scale.entries_q, scale.entries_k), dims_of(key, 0), seed=8, alibi="batch",
                     sink="fp32", dlse=True, deterministic=True)  # fmt: skip
    cases = {
        dense(key, 2, (4, 2), scale.near, dims_of(key, 1), seed=8, window=CAUSAL, deterministic=True): scale.bwd_runs,
        dense(
            key, 1, (8, 2), (scale.bwd_seqlens[-1],) * 2, dims_of(key, 2), seed=8, deterministic=True
        ): scale.bwd_runs,
        dense(key, 1, (8, 1), scale.bwd_ragged, dims_of(key, 3), seed=8, deterministic=True): scale.bwd_runs // 10 + 3,
        several: scale.bwd_runs // 10 + 3,
    }
    for case, runs in cases.items():
        call, other = BwdCall(case, dut.device), BwdCall(reseeded(case, 9), dut.device)
        leaves = call.leaves()
        outputs = call.forward(dut, leaves)
        first = call.backward(outputs, leaves, retain_graph=True)
        report.note(f"{case}", call.problems(first))
        alike = torch.ones((), dtype=torch.bool, device=dut.device)
        for run in range(1, runs):
            if run % 100 == 1:
                other(dut)  # and leaves NaN in free memory
            alike &= same(first, call.backward(outputs, leaves, retain_graph=True))
        report.expect(bool(alike), f"{case}: not the same bits in {runs} runs")
        with poisoned_allocations():  # which is that switch
            (switched,) = BwdCall(replace(case, deterministic=False), dut.device)(dut)
        report.expect(bool(same(first, switched)), f"{case}: other bits under use_deterministic_algorithms")
    report.done()


def large(dut: Dut, key: str, scale: Scale) -> None:
    """Arrays and workspaces of more than 2³¹ elements, and strides beyond: addresses need 64 bits."""
    report = Report()
    _many_alike(report, dut, key, scale)
    _far_apart(report, dut, key, scale)
    report.done()
    if dut.device == "cuda":
        torch.cuda.empty_cache()


def _many_alike(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """The same two heads over and over: judged where they come first, and everywhere else for the same bits."""
    (seqlen, heads), dims = scale.bwd_long, dims_of(key, 2)
    batch = scale.beyond // (seqlen * heads * dims[0]) + 1
    one = BwdCall(dense(key, 1, (2, 2), (seqlen, seqlen), dims, seed=5, window=CAUSAL), dut.device)
    leaves = {name: x.repeat(batch, 1, heads // 2, 1).requires_grad_() for name, x in one.inputs.items()}
    out = dut.attn(**leaves, causal=True, deterministic=True)
    dout = one.dout.repeat(batch, 1, heads // 2, 1)
    dut.poison()
    found = dict(zip(leaves, torch.autograd.grad(out, tuple(leaves.values()), dout), strict=True))
    del out, dout, leaves
    report.note("of many alike, the first", one.problems({name: x[:1, :, :2] for name, x in found.items()}))
    for name, x in found.items():
        first = x[:1, :, :2].clone()
        alike = all(torch.equal(part, first.expand_as(part)) for entry in x.split(1) for part in entry.split(2, 2))
        report.expect(alike, f"d{name}: {batch} · {heads} heads alike have different gradients")


def _far_apart(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """Strides beyond 2³¹ elements along the batch, and along dense and packed tokens, of q, k, v and dout."""
    rows, dims = 64, dims_of(key, 2)
    row = 6 * max(dims)
    far, longer = max(scale.beyond + 64, rows * row), max(scale.beyond // 32, row)
    steps = {"the batch": (far, 0), "the seqlen": (0, longer), "packed tokens": (0, longer)}
    elements = max(far, (rows - 1) * longer) + rows * row
    buffer = torch.full((elements,), float("nan"), dtype=DTYPES[key.split("-")[1]], device=dut.device)
    for name, (step_b, step_s) in steps.items():
        batch, packed = 2 if step_b else 1, name == "packed tokens"
        case = dense(key, batch, (2, 1), (rows, rows), dims, seed=6, window=CAUSAL)
        call = BwdCall(case, dut.device)
        parts = {**call.inputs, "dout": call.dout}
        views = {}
        # They share the rows of one buffer: heads 0-1 of q, 2 of k, 3 of v, 4-5 of dout.
        for (part, x), offset in zip(parts.items(), (0, 2, 3, 4), strict=True):
            stride = (step_b, step_s or row, row // 6, 1)
            views[part] = buffer.as_strided(x.shape, stride, offset * row // 6).copy_(x)
        call.dout = views.pop("dout")
        call.inputs = views
        got = _one_packed_entry(dut, call) if packed else call(dut)[0]
        report.note(f"strides beyond 2^31 along {name}", call.problems(got))


def _one_packed_entry(dut: Dut, call: BwdCall) -> Gradients:
    """A batch of one as a packed array; its gradients as those of a batch."""
    leaves = {name: x[0].detach().requires_grad_() for name, x in call.inputs.items()}
    side = Side((leaves["q"].shape[0],), None, True, 0, leaves["q"].shape[0], dut.device)
    out = dut.varlen(**leaves, cu_seqlens_q=side.cu_seqlens, cu_seqlens_k=side.cu_seqlens, causal=True)
    dut.poison()
    found = torch.autograd.grad(out, tuple(leaves.values()), call.dout[0])
    return {name: x[None] for name, x in zip(leaves, found, strict=True)}


def graph_capture(dut: Dut, key: str, scale: Scale) -> None:
    """A backward that is cold is not captured; a warm one is, and its replays see new contents and lengths."""
    report = Report()
    modified = {"sink": "fp32", "alibi": "batch", "dlse": True, "window": CAUSAL}
    one = dense(key, 2, (4, 2), scale.bwd_ragged, dims_of(key, 1), seed=9, **modified)
    cold = BwdCall(one, dut.device)
    dut.force(key)  # forgets what was loaded
    with torch.no_grad():
        cold.forward(dut, cold.inputs)  # the forward's kernel is warm
    reason = "nothing was raised"
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            cold(dut)
    except CubineryError as error:
        reason = error.reason
    report.expect(reason == "capture", f"a cold backward during capture: reason {reason!r} instead of 'capture'")
    ragged = [
        varlen(key, (4, 2), lengths, dims_of(key, 3), seed=seed, dlse=True, alibi="batch", sink="fp32")
        for seed, lengths in enumerate(of_one_size(scale))
    ]
    for deterministic, several in product((False, True), ([one, reseeded(one, 10)], ragged)):
        _replays(report, dut, [replace(case, deterministic=deterministic) for case in several])
    report.done()


def _replays(report: Report, dut: Dut, cases: list[BwdCase]) -> None:
    """Capture the first case; then put each case's inputs and lengths into its arrays, replay, and judge."""
    static = BwdCall(cases[0], dut.device)
    static(dut)
    if dut.device == "cuda":
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (found,) = static(dut)
    for case in [*cases[1:], cases[0]]:
        call = BwdCall(case, dut.device)
        with torch.no_grad():
            for target, source in zip(_read(static), _read(call), strict=True):
                target.copy_(source)
            for x in found.values():
                x.fill_(float("nan"))
            graph.replay()
        report.note(f"a replay with {case}", call.problems(found))


def _read(call: BwdCall) -> list[torch.Tensor]:
    """All that a call and its backward read, each array with what surrounds it."""
    outer = [x._base for x in (call.dout, call.dlse) if x is not None]
    return [*inputs_of(call.call), *outer]


def streams(dut: Dut, key: str, scale: Scale) -> None:
    """Threads with a stream each, many backwards in flight: each gives what it gives alone, to the bit."""
    report = Report()
    short, long = scale.bwd_ragged
    work = []
    for i in range(scale.threads):
        cases = [dense(key, 1, (4, 2), (short - i, long - 9 * i - j), dims_of(key, j), seed=20 + i, window=CAUSAL,
                       deterministic=True, dlse=True) for j in range(2)]  # fmt: skip
        cases += [
            varlen(key, (4, 2), lengths, dims_of(key, 2), seed=20 + i, sink="fp32", deterministic=True)
            for lengths in of_one_size(scale)[:2]
        ]
        calls = [BwdCall(case, dut.device) for case in cases]
        right = [call(dut)[0] for call in calls]
        for call, gradients in zip(calls, right, strict=True):
            report.note(f"alone, {call.case}", call.problems(gradients))
        work.append((calls, right))
    in_threads(dut, _hammer, work, scale.calls, report)


def _hammer(dut: Dut, calls: list[BwdCall], right: list[Gradients], times: int, faults: list[str]) -> None:
    """Many calls and backwards on a stream of this thread's own, in turn: forwards first, then all backwards."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if dut.device == "cuda" else contextlib.nullcontext():
            begun = []
            for i in range(times):
                leaves = calls[i % len(calls)].leaves()
                begun.append((leaves, calls[i % len(calls)].forward(dut, leaves)))
            got = [calls[i % len(calls)].backward(out, leaves) for i, (leaves, out) in enumerate(begun)]
            # On this stream too: elsewhere a result could be read before it is written.
            wrong = sum(not bool(same(x, right[i % len(right)])) for i, x in enumerate(got))
        if wrong:
            faults.append(f"{wrong} of {times} gradients differ from a lone call's")
    except Exception as error:  # a thread's error must reach the report
        faults.append(repr(error))


def autograd(dut: Dut, key: str, scale: Scale) -> None:
    """Two calls in one graph, plain and under both kinds of activation checkpointing; some of the inputs alone, and
    each of the outputs."""
    report = Report()
    modified: dict[str, Any] = {"sink": "fp32", "alibi": "heads", "deterministic": True}
    for window, dlse in ((OPEN, False), (CAUSAL, True)):
        case = dense(key, 2, (4, 2), scale.bwd_ragged, dims_of(key, 1), seed=3, window=window, dlse=dlse, **modified)
        call, other = BwdCall(case, dut.device), BwdCall(reseeded(case, 4), dut.device)
        plain = _both(dut, call, other, lambda function, *given: function(*given))
        for reentrant in (False, True):
            kept = _both(dut, call, other, lambda f, *given, r=reentrant: checkpoint(f, *given, use_reentrant=r))
            report.expect(bool(same(plain, kept)), f"{case}: differs when checkpointed, reentrant {reentrant}")
        (alone,) = call(dut)
        report.note(f"{case}", call.problems(alone))
        for names in (("q",), ("k", "v"), ("sink",), ("slopes", "v")):
            some = {name: x.requires_grad_(name in names) for name, x in call.leaves().items()}
            outputs = call.forward(dut, some)
            found = call.backward(outputs, {name: some[name] for name in names})
            alike = bool(same(found, {name: alone[name] for name in names}))
            report.expect(alike, f"{case}: gradients of {', '.join(names)} alone differ")
    _each_output(report, dut, call)
    report.done()


def _each_output(report: Report, dut: Dut, call: BwdCall) -> None:
    """The output's gradient without the LSE's is that of a call that returns no LSE; the other way it is as with 0."""
    leaves = call.leaves()
    outputs = call.forward(dut, leaves)
    for i, given in enumerate((call.dout, call.dlse)):
        found = torch.autograd.grad(outputs[i], tuple(leaves.values()), given, retain_graph=True)
        right = BwdCall(replace(call.case, dlse=bool(i)), dut.device)
        if i:
            right.dout = torch.zeros_like(right.dout)
        alike = bool(same(dict(zip(leaves, found, strict=True)), right(dut)[0]))
        report.expect(alike, f"{call.case}: gradients of {('out', 'lse')[i]} alone differ")


def _both(dut: Dut, call: BwdCall, other: BwdCall, through: Callable[..., Any]) -> Gradients:
    """The gradients of two calls that share k and v and differ in q, each made by `through`."""
    leaves = call.leaves()
    second = {**leaves, "q": other.leaves()["q"]}

    def attend(*given: torch.Tensor) -> Any:
        return call.forward(dut, dict(zip(leaves, given, strict=True)))

    outputs = [x for given in (leaves, second) for x in through(attend, *given.values())]
    wanted = [x for x in (call.dout, call.dlse) if x is not None]
    dut.poison()
    torch.autograd.backward(outputs, [*wanted, *wanted])
    made = {**leaves, "other q": second["q"]}
    return {name: x.grad for name, x in made.items()}
