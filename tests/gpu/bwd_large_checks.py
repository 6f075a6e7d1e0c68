"""Gradients at the largest legal numbers of heads, entries and tokens that fit into 60 GB and take seconds."""

from __future__ import annotations

from typing import Any

import torch

from registry.contract import Variant
from registry.ops.workspaces import ROWS
from tests.gpu import bwd_yardstick
from tests.gpu.calls import dense, dims_of
from tests.gpu.dut import Dut
from tests.gpu.gradient_run import gradients
from tests.gpu.harness import hold, made
from tests.gpu.inputs import DTYPES
from tests.gpu.large_checks import HEAD_DIM, PLACE, release, repeats
from tests.gpu.report import Report, Scale
from tests.gpu.yardstick import Rule
from tests.support.call import CAUSAL

SMALL = (HEAD_DIM, HEAD_DIM)
NEAR = 40  # keys that a query sees before its own
LEAST_ACCUM = 64  # columns of dQ's accumulator, of a variant for the smallest heads


def largest(dut: Dut, key: str, scale: Scale) -> None:
    """The most heads, in groups that are split and not; as many tokens, and entries, as the workspaces of 2³³ elements
    have rows for; heads beyond 2³¹ elements apart."""
    report = Report()
    release(dut)
    for check in (_most_heads, _most_tokens, _most_entries, _far_heads):
        check(report, dut, key, scale)
        release(dut)
    report.done()


def _rows(key: str, scale: Scale) -> int:
    """Of workspaces whose accumulator has four times as many elements as 32 bits count."""
    variant = Variant.parse(key)
    return 4 * scale.beyond // (variant.head_dim if variant.op == "bwd" else LEAST_ACCUM)


def _most_heads(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    n = scale.most_heads
    more: dict[str, Any] = {"alibi": "batch", "sink": "fp32", "dlse": True}
    for seed, heads in enumerate(((n, n), (n, 1), (n // 3 * 3, n // 3))):
        dims = tuple(min(16, dim) for dim in dims_of(key, 0))
        asked = more if seed % 2 == 0 else {"deterministic": True}
        hold(report, dut, dense(key, 1, heads, (20, 20), (dims[0], dims[1]), seed=seed, window=CAUSAL, **asked))


def _most_tokens(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """One sequence with a window. dout is 0 but for three places; there gradients are judged, elsewhere they are 0."""
    n, generator = _rows(key, scale), torch.Generator(dut.device).manual_seed(7)
    dtype = DTYPES[Variant.parse(key).dtype]
    rows = torch.empty(n + 2, 1, HEAD_DIM, dtype=dtype, device=dut.device).normal_(generator=generator)
    leaves = {name: rows[i : i + n][None].requires_grad_() for i, name in enumerate("qkv")}
    out = dut.attn(**leaves, window=(NEAR, 0), deterministic=True)
    dout = torch.zeros_like(out)
    places = [slice(at, at + PLACE) for at in (0, (n - PLACE) // 2, n - PLACE)]
    for place in places:
        dout[:, place].normal_(generator=generator)
    dut.poison()
    found = gradients(out, leaves, dout)
    del out
    for place in places:
        keys = slice(max(place.start - NEAR, 0), place.stop)
        part = {name: x.detach()[:, place if name == "q" else keys] for name, x in leaves.items()}
        right = bwd_yardstick.expected(**part, dout=dout[:, place], rule=Rule(HEAD_DIM**-0.5, (NEAR, 0)))
        for name, gradient in right.items():
            judged = found[name][:, place if name == "q" else keys]
            wrong = bwd_yardstick.problems(name, judged, gradient)
            report.note(f"{n} tokens, from {place.start}", wrong)
            judged.zero_()
    for name, x in found.items():
        report.expect(not bool(x.any()), f"{n} tokens: d{name} is not 0 where dout is")


def _most_entries(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """The same sixteen entries over and over."""
    count = 16
    batch = max(_rows(key, scale) // ROWS // count, 2) * count
    one = made(dense(key, count, (1, 1), (5, 9), SMALL, seed=6, window=CAUSAL), dut.device)
    leaves = {name: x.repeat(batch // count, 1, 1, 1).requires_grad_() for name, x in one.inputs.items()}
    out = dut.attn(**leaves, causal=True)
    dut.poison()
    dout = one.dout.repeat(batch // count, 1, 1, 1)
    found = gradients(out, leaves, dout)
    report.note(f"of {batch} entries, the first", one.problems({name: x[:count] for name, x in found.items()}))
    for name, x in found.items():
        report.expect(repeats(x, count), f"d{name}: not the same again and again in {batch} entries")


def _far_heads(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """Heads beyond 2³¹ elements apart, of q, k, v and dout."""
    rows, dims = 64, dims_of(key, 2)
    run = made(dense(key, 1, (3, 3), (rows, rows), dims, seed=6, window=CAUSAL), dut.device)
    parts = {**run.inputs, "dout": run.dout}
    dim = max(dims)
    step = max(scale.beyond // 2 + 64, 4 * dim * rows)
    buffer = torch.full((3 * step,), float("nan"), dtype=run.dout.dtype, device=dut.device)
    views = {
        name: buffer.as_strided(x.shape, (3 * step, 4 * dim, step, 1), i * dim).copy_(x)
        for i, (name, x) in enumerate(parts.items())
    }
    run.dout = views.pop("dout")
    run.inputs = views
    report.note("heads beyond 2^31 elements apart", run.problems(*run(dut)))
