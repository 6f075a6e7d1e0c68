"""The backward against SDPA's FlashAttention-2 on the grid: backward.free.json and backward.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.backward [--modes free sm120]

A call is `torch.autograd.grad` of q, k and v through the graph of a forward that ran before, as training has it: all
that the backward launches and allocates, and nothing of the forward. Ours and the peer get the same inputs and the same
gradient of the output. Modes and the two peers are those of benchmarks/forward.py.

Times are device times between CUDA events, medians, interleaved. autograd costs some 100 µs of host time a call (it
wakes a thread of its own), more than the smallest cells take on the device. None of that is in the figures: a round's
calls are enqueued while the device waits, and `measure` runs a round again in which the device caught up with the host.

`deterministic` is our time with deterministic=True, in the same rounds, for the cells of DETERMINISTIC. `extra` has
windows, packed sequences and head_dim other than head_dim_v, which SDPA does not serve: ours alone, each checked
against float64 on a small call of its kind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from benchmarks import cases, forward, measure, published, reference
from benchmarks.cases import Case, dense, varlen
from benchmarks.cubins import BenchmarkError
from benchmarks.held import HeldPeer
from benchmarks.ours import MODES, Ours
from benchmarks.workloads import lengths
from registry.contract import CubineryError

OPS = ("fwd", "bwd_preprocess", "bwd", "bwd_sum", "bwd_postprocess")
MAX_DIFFERENCE = 2e-2  # relative, of norms, from the peer's gradients and from float64's: P and dS are of the dtype
DETERMINISTIC = frozenset(
    f"{model}/S{seqlen}/{mask}"
    for model, seqlen in (("llama3-8b", 512), ("llama3-8b", 2048), ("llama3-8b", 8192), ("hd64", 8192), ("hd256", 8192))
    for mask in ("full", "causal")
)
EXTRA = (
    dense("llama3-8b", 32768, False, 32, 8, 128, 1, window=1023),
    dense("hd64", 32768, False, 16, 16, 64, 1, window=1023),
    *(varlen("short", (32, 8, 128), lengths(256), causal) for causal in (False, True)),
    varlen("mix", (32, 8, 128), (*lengths(255), 8192), True),
    *(dense(f"d{d}-dv{dv}", 4096, True, 32, 8, d, 2, head_dim_v=dv) for d, dv in ((128, 64), (192, 128))),
)
Gradients = Callable[[], tuple[Any, ...]]
Drawn = tuple[list[tuple[Any, Any, Any]], list[Any]]


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("backward", __doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", default="*", help="glob over case names, e.g. 'llama3-8b/S8192/*'")
    parser.add_argument("--dtype", choices=sorted(measure.DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=16)
    options = parser.parse_args(argv)
    with HeldPeer() as held:
        return int(sum([_mode(mode, options, held) for mode in options.modes]) > 0)


def _mode(mode: str, options: argparse.Namespace, held: HeldPeer) -> int:
    """Measure and write one mode's file; how many cases failed."""
    ours = Ours(measure.registry_path(options.registry), mode)
    held.start()  # what keeps it from that keeps it from every case
    rows, failures = _rows(cases.grid(), partial(against_sdpa, ours, held), options)
    extra, failed = _rows(EXTRA, partial(alone, ours), options)
    fa4 = published.against_fa4(rows, published.BACKWARD_FA2_FA4, "backward")
    of_spine = [row for row in rows if row["case"] in cases.spine()]
    means = {"geomean_spine": measure.mean_of(of_spine), "geomean_held": measure.mean_of(rows, "ratio_held"),
             "geomean_spine_held": measure.mean_of(of_spine, "ratio_held")}  # fmt: skip
    value = measure.result(mode, rows, **means, held=held.proof, extra=extra, occupancy=ours.occupancy, against_fa4=fa4)
    value["bars"] = published.backward_verdicts(mode, value)
    path = measure.write(options.out, f"backward.{mode}", value)
    forward.report(fa4["cells"])
    print("\n".join(map(published.line, value["bars"])))
    print(f"{path}: {forward.summary(value)}, {mode}; blocks per SM {ours.occupancy}")
    return failures + failed


def _rows(found: Sequence[Case], one: Any, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """A row for each case that --cases names, and how many failed."""
    rows, failures = [], 0
    for case in found:
        if not fnmatchcase(case.name, options.cases):
            continue
        try:
            rows.append(one(case, options.dtype, options.repeats))
            print(line(rows[-1]), flush=True)
        except CubineryError as error:  # one case without a kernel must not cost the others
            failures += 1
            print(f"  {case.name:<26} FAILED {error.reason}: {error}", flush=True)
    return rows, failures


def against_sdpa(ours: Ours, held: HeldPeer, case: Case, dtype: str, repeats: int) -> dict[str, Any]:
    """One dense case: check ours against the peer, then time both, ours in fixed order and the held peer, in turn."""
    inputs, douts = _inputs(ours, case, dtype)
    runs = {"ours": gradients(ours.calls(case, inputs), inputs, douts)}
    with measure.flash_backend():
        runs["peer"] = peer(case, inputs, douts)
    if case.name in DETERMINISTIC:
        runs["deterministic"] = gradients(ours.calls(case, inputs, deterministic=True), inputs, douts)
    expected = runs["peer"][0]()
    for name in runs.keys() - {"peer"}:
        check(f"{case.name}, {name}", runs[name][0](), expected)
    held.prepare("backward", case, dtype)
    ms = _medians(runs, repeats, {"peer_held": held.round})
    row = {**ours.facts(case, ms["ours"], dtype, "bwd"), **forward.beside_peers(case, ms, "bwd")}
    if "deterministic" in ms:
        row["deterministic"] = round(ms["deterministic"], 5)
        row["deterministic_ratio"] = round(ms["deterministic"] / ms["ours"], 4)
    return row


def alone(ours: Ours, case: Case, dtype: str, repeats: int) -> dict[str, Any]:
    """A case that the peer does not serve."""
    small = small_of(case)
    (qkv,), (dout,) = (found[:1] for found in _inputs(ours, small, dtype))
    (mine,) = gradients(ours.calls(small, [qkv]), [qkv], [dout])
    check(case.name, mine(), exact(small, qkv, dout))
    inputs, douts = _inputs(ours, case, dtype)
    ms = _medians({"ours": gradients(ours.calls(case, inputs), inputs, douts)}, repeats)
    return ours.facts(case, ms["ours"], dtype, "bwd")


def _inputs(ours: Ours, case: Case, dtype: str) -> Drawn:
    """`draw`, after what is not to be asked for while anything is timed."""
    for op in OPS:
        ours.choice(case, dtype, op)  # its occupancy
    return draw(case, dtype)


def draw(case: Case, dtype: str) -> Drawn:
    """Sets of q, k, v that require gradients, and a gradient of the output for each."""
    import torch

    inputs, douts = measure.make_inputs(case, dtype), []
    generator = torch.Generator(measure.DEVICE).manual_seed(1)
    for q, k, v in inputs:
        shape = (*q.shape[:-1], v.shape[-1])
        drawn = torch.randn(shape, generator=generator, device=measure.DEVICE, dtype=torch.float32)
        douts.append(drawn.to(q.dtype))
        for x in (q, k, v):
            x.requires_grad_()
    return inputs, douts


def peer(case: Case, inputs: Sequence[tuple[Any, Any, Any]], douts: Sequence[Any]) -> list[Gradients]:
    """SDPA's backward for each input set; to be called within `measure.flash_backend()`."""
    return gradients(forward.peer(case, inputs), inputs, [dout.transpose(1, 2) for dout in douts])


def gradients(
    calls: Sequence[Callable[[], Any]], inputs: Sequence[tuple[Any, ...]], douts: Sequence[Any]
) -> list[Gradients]:
    """For each input set the backward alone, through the graph of a forward that runs now."""
    import torch

    return [
        partial(torch.autograd.grad, call(), qkv, dout, retain_graph=True)
        for call, qkv, dout in zip(calls, inputs, douts, strict=True)
    ]


def _medians(
    runs: dict[str, list[Gradients]], repeats: int, elsewhere: Mapping[str, measure.Elsewhere] | None = None
) -> dict[str, float]:
    """Milliseconds by name."""
    timed: dict[str, measure.Run] = {name: partial(measure.call, calls) for name, calls in runs.items()}
    times = measure.interleaved(timed, len(runs["ours"]), repeats, elsewhere=elsewhere)
    return {name: statistics.median(found) for name, found in times.items()}


def check(what: str, found: Sequence[Any], expected: Sequence[Any]) -> None:
    """BenchmarkError where a gradient is wrong or not a number."""
    for name, mine, right in zip(("dq", "dk", "dv"), found, expected, strict=True):
        difference = measure.relative_error(mine, right)
        if not difference <= MAX_DIFFERENCE:
            raise BenchmarkError(f"{what}: {name} differs by {difference:.2e}")


def small_of(case: Case) -> Case:
    """A call of the same kind that is small enough for float64."""
    model, heads = case.name.split("/")[0], (case.heads_q, case.heads_kv, case.head_dim)
    if case.lengths is not None:
        return varlen(model, heads, (5, 300, 129), case.causal, case.head_dim_v)
    window = None if case.left is None else 100
    return dense(model, 300, case.causal, *heads, 1, head_dim_v=case.head_dim_v, window=window)


def exact(case: Case, qkv: tuple[Any, Any, Any], dout: Any) -> tuple[Any, ...]:
    """dq, dk and dv in float64."""
    import torch

    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    if case.lengths is None:
        out, _ = reference.attention(q, k, v, case.causal, case.left)
    else:
        out, _ = reference.packed(q, k, v, case)
    return torch.autograd.grad(out, (q, k, v), dout.double())


def line(row: dict[str, Any]) -> str:
    if "peer" not in row:
        return f"  {row['case']:<26} ours {row['ours']:8.4f} ms {row['tflops']:6.1f} TFLOP/s   {row['variant']}"
    ordered = f"   deterministic {row['deterministic_ratio']:.3f}x" if "deterministic" in row else ""
    return forward.line(row) + ordered


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
