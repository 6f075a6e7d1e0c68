"""Checks of gradients over many launches, beyond 2³¹ elements, in captured graphs, threads and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tests.gpu.calls import dense, dims_of, of_one_size, varlen
from tests.gpu.dut import Dut, poisoned_allocations
from tests.gpu.gradient_run import GradientRun, Gradients, gradients, same_bits
from tests.gpu.harness import cold_capture, in_threads, made, replays
from tests.gpu.inputs import DTYPES, integers
from tests.gpu.report import Report, Scale
from tests.support.call import CAUSAL, OPEN, lengths


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """deterministic=True gives the same bits over a thousand runs, small and larger; a tenth of that for others.

    So does PyTorch's own switch.
    """
    report = Report()
    several = varlen(key, (8, 2), lengths(scale.entries_q, scale.entries_k), dims_of(key, 0), seed=8, alibi="batch",
                     sink="fp32", dlse=True, deterministic=True)  # fmt: skip
    calls = {
        dense(key, 2, (4, 2), scale.near, dims_of(key, 1), seed=8, window=CAUSAL, deterministic=True): scale.bwd_runs,
        dense(
            key, 1, (8, 2), (scale.bwd_seqlens[-1],) * 2, dims_of(key, 2), seed=8, deterministic=True
        ): scale.bwd_runs,
        dense(key, 1, (8, 1), scale.bwd_ragged, dims_of(key, 3), seed=8, deterministic=True): scale.bwd_runs // 10 + 3,
        several: scale.bwd_runs // 10 + 3,
    }
    for call, times in calls.items():
        run, other = made(call, dut.device), made(call.but(seed=9), dut.device)
        leaves = run.leaves()
        outputs = run.forward(dut, leaves)
        first = run.backward(outputs, leaves, retain_graph=True)
        report.note(f"{call}", run.problems(first))
        alike = torch.ones((), dtype=torch.bool, device=dut.device)
        for i in range(1, times):
            if i % 100 == 1:
                other(dut)  # and leaves NaN in free memory
            alike &= same_bits(first, run.backward(outputs, leaves, retain_graph=True))
        report.expect(bool(alike), f"{call}: not the same bits in {times} runs")
        with poisoned_allocations():  # which is that switch
            (switched,) = made(call.but(deterministic=False), dut.device)(dut)
        report.expect(bool(same_bits(first, switched)), f"{call}: other bits under use_deterministic_algorithms")
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
    one = made(dense(key, 1, (2, 2), (seqlen, seqlen), dims, seed=5, window=CAUSAL), dut.device)
    leaves = {name: x.repeat(batch, 1, heads // 2, 1).requires_grad_() for name, x in one.inputs.items()}
    out = dut.attn(**leaves, causal=True, deterministic=True)
    dout = one.dout.repeat(batch, 1, heads // 2, 1)
    dut.poison()
    found = gradients(out, leaves, dout)
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
        run = made(dense(key, batch, (2, 1), (rows, rows), dims, seed=6, window=CAUSAL), dut.device)
        parts = {**run.inputs, "dout": run.dout}
        views = {}
        # They share the rows of one buffer: heads 0-1 of q, 2 of k, 3 of v, 4-5 of dout.
        for (part, x), offset in zip(parts.items(), (0, 2, 3, 4), strict=True):
            stride = (step_b, step_s or row, row // 6, 1)
            views[part] = buffer.as_strided(x.shape, stride, offset * row // 6).copy_(x)
        run.dout = views.pop("dout")
        run.inputs = views
        got = _one_packed_entry(dut, run) if packed else run(dut)[0]
        report.note(f"strides beyond 2^31 along {name}", run.problems(got))


def _one_packed_entry(dut: Dut, run: GradientRun) -> Gradients:
    """A batch of one as a packed array; its gradients as those of a batch."""
    leaves = {name: x[0].detach().requires_grad_() for name, x in run.inputs.items()}
    cu = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), integers((0, len(leaves["q"])), dut.device))
    out = dut.varlen(**leaves, **cu, causal=True)
    dut.poison()
    return {name: x[None] for name, x in gradients(out, leaves, run.dout[0]).items()}


def graph_capture(dut: Dut, key: str, scale: Scale) -> None:
    """A backward that is cold is not captured; a warm one is, and its replays see new contents and lengths."""
    report = Report()
    modified = {"sink": "fp32", "alibi": "batch", "dlse": True, "window": CAUSAL}
    one = dense(key, 2, (4, 2), scale.bwd_ragged, dims_of(key, 1), seed=9, **modified)
    cold = made(one, dut.device)
    dut.force(key)  # forgets what was loaded
    with torch.no_grad():
        cold.forward(dut, cold.inputs)  # the forward's kernel is warm
    cold_capture(report, dut, cold)
    ragged = [
        varlen(key, (4, 2), entries, dims_of(key, 3), seed=seed, dlse=True, alibi="batch", sink="fp32")
        for seed, entries in enumerate(of_one_size(scale.entries_q, scale.entries_k))
    ]
    for deterministic, several in product((False, True), ([one, one.but(seed=10)], ragged)):
        replays(report, dut, [call.but(deterministic=deterministic) for call in several])
    report.done()


def streams(dut: Dut, key: str, scale: Scale) -> None:
    """Threads with a stream each, many backwards in flight: each gives what it gives alone, to the bit."""
    short, long = scale.bwd_ragged
    sizes = of_one_size(scale.entries_q, scale.entries_k)[:2]
    work = []
    for i in range(scale.threads):
        calls = [dense(key, 1, (4, 2), (short - i, long - 9 * i - j), dims_of(key, j), seed=20 + i, window=CAUSAL,
                       deterministic=True, dlse=True) for j in range(2)]  # fmt: skip
        more = {"seed": 20 + i, "sink": "fp32", "deterministic": True}
        work.append(calls + [varlen(key, (4, 2), entries, dims_of(key, 2), **more) for entries in sizes])
    in_threads(dut, work, scale.calls)


def autograd(dut: Dut, key: str, scale: Scale) -> None:
    """Two calls in one graph, plain and under both kinds of activation checkpointing; some of the inputs alone, and
    each of the outputs."""
    report = Report()
    modified: dict[str, Any] = {"sink": "fp32", "alibi": "heads", "deterministic": True}
    for window, dlse in ((OPEN, False), (CAUSAL, True)):
        call = dense(key, 2, (4, 2), scale.bwd_ragged, dims_of(key, 1), seed=3, window=window, dlse=dlse, **modified)
        run, other = made(call, dut.device), made(call.but(seed=4), dut.device)
        plain = _both(dut, run, other, lambda function, *given: function(*given))
        for reentrant in (False, True):
            kept = _both(dut, run, other, lambda f, *given, r=reentrant: checkpoint(f, *given, use_reentrant=r))
            report.expect(bool(same_bits(plain, kept)), f"{call}: differs when checkpointed, reentrant {reentrant}")
        (alone,) = run(dut)
        report.note(f"{call}", run.problems(alone))
        for names in (("q",), ("k", "v"), ("sink",), ("slopes", "v")):
            some = {name: x.requires_grad_(name in names) for name, x in run.leaves().items()}
            outputs = run.forward(dut, some)
            found = run.backward(outputs, {name: some[name] for name in names})
            alike = bool(same_bits(found, {name: alone[name] for name in names}))
            report.expect(alike, f"{call}: gradients of {', '.join(names)} alone differ")
    _each_output(report, dut, run)
    report.done()


def _each_output(report: Report, dut: Dut, run: GradientRun) -> None:
    """The output's gradient without the LSE's is that of a call that returns no LSE; the other way it is as with 0."""
    leaves = run.leaves()
    outputs = run.forward(dut, leaves)
    for i, given in enumerate((run.dout, run.dlse)):
        found = gradients(outputs[i], leaves, given, retain_graph=True)
        right = made(run.call.but(dlse=bool(i)), dut.device)
        if i:
            right.dout = torch.zeros_like(right.dout)
        alike = bool(same_bits(found, right(dut)[0]))
        report.expect(alike, f"{run.call}: gradients of {('out', 'lse')[i]} alone differ")


def _both(dut: Dut, run: GradientRun, other: GradientRun, through: Callable[..., Any]) -> Gradients:
    """The gradients of two calls that share k and v and differ in q, each made by `through`."""
    leaves = run.leaves()
    second = {**leaves, "q": other.leaves()["q"]}

    def attend(*given: torch.Tensor) -> Any:
        return run.forward(dut, dict(zip(leaves, given, strict=True)))

    outputs = [x for given in (leaves, second) for x in through(attend, *given.values())]
    wanted = [x for x in (run.dout, run.dlse) if x is not None]
    dut.poison()
    torch.autograd.backward(outputs, [*wanted, *wanted])
    every = {**leaves, "other q": second["q"]}
    return {name: x.grad for name, x in every.items()}
