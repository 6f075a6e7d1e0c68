"""Host time of a warm call against SDPA's: host_overhead.free.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.host_overhead

Wall clock over many asynchronous calls on small shapes, ours and SDPA's FlashAttention backend in turn in one run. The
queue is emptied before each series and a series is shorter than the queue, so that no call waits for the device.
`ours` and `peer` are milliseconds a call, as everywhere; the printed table shows microseconds.

A row '…/backward' is `torch.autograd.grad` of q, k and v alone, through the graph of a forward that ran before.
`both_ours` and `both_peer` of that row are a forward and its backward together.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import measure, published
from benchmarks.cases import Case, dense
from benchmarks.ours import Ours
from registry.contract import Artifact

CASES = (
    dense("llama3-8b", 1, False, 32, 8, 128, 1),
    dense("llama3-8b", 128, True, 32, 8, 128, 1),
    dense("hd64", 128, False, 16, 16, 64, 1),
)
BACKWARD_CASES = (
    dense("llama3-8b", 128, True, 32, 8, 128, 1),
    dense("llama3-8b", 1024, True, 32, 8, 128, 1),
    dense("mqa", 2048, True, 8, 1, 128, 1),
)
CALLS = 400  # in a series; the driver's queue holds 1,024 launches
BACKWARD_CALLS = 64  # each has several launches, the peer's too, and the device may take longer than the host
SERIES = 25
MAX_BACKWARD = 1.0  # our host time of a warm backward over SDPA's


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("host_overhead", __doc__)
    parser.add_argument("--series", type=int, default=SERIES)
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args(argv)
    bench = Ours(measure.registry_path(options.registry), "free")
    rows = []
    for case in CASES:
        rows += case_rows(bench, case, options.series, options.calls)
    backwards = [backward_row(bench, case, options.series, options.calls) for case in BACKWARD_CASES]
    bars = [
        published.at_most(f"{row['case']}: host time over SDPA's", round(row["ours"] / row["peer"], 4), MAX_BACKWARD)
        for row in backwards
    ]
    rows += backwards
    value = measure.result("free", rows, bars=bars)
    print("\n".join(map(line, rows)))
    print("\n".join(map(published.line, bars)))
    print(f"{measure.write(options.out, 'host_overhead.free', value)}: geomean {value['geomean']}")
    return 0


def case_rows(bench: Ours, case: Case, series: int, calls: int) -> list[dict[str, Any]]:
    """Rows for a call that returns the output alone, one with the LSE and one into a given output, each against the
    same SDPA call."""
    import torch

    artifact = bench.choice(case).artifact
    q, k, v = measure.make_inputs(case, "bf16")[0]
    out, attn, causal = torch.empty_like(q), bench.runtime.flash_attn, case.causal
    # SDPA gets views made once: a caller of it would hold its data in that layout.
    sq, sk, sv = (x.transpose(1, 2) for x in (q, k, v))
    gqa = case.heads_q != case.heads_kv
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ours: dict[str, Callable[[], Any]] = {
        "": lambda: attn(q, k, v, causal=causal),
        "/lse": lambda: attn(q, k, v, causal=causal, return_lse=True),
        "/out": lambda: attn(q, k, v, causal=causal, out=out),
    }
    with torch.no_grad(), measure.flash_backend():
        times = series_us({**ours, "peer": lambda: sdpa(sq, sk, sv, is_causal=causal, enable_gqa=gqa)}, series, calls)
    return [_row(case.name + name, times[name], times["peer"], artifact) for name in ours]


def backward_row(bench: Ours, case: Case, series: int, calls: int) -> dict[str, Any]:
    """The row of a backward with all three gradients, against the same of SDPA."""
    import torch

    artifact, attn, causal = bench.choice(case, op="bwd").artifact, bench.runtime.flash_attn, case.causal
    qkv = [x.requires_grad_() for x in measure.make_inputs(case, "bf16")[0]]
    peers = [x.detach().transpose(1, 2).requires_grad_() for x in qkv]  # views made once, as for the forward
    gqa, sdpa = case.heads_q != case.heads_kv, torch.nn.functional.scaled_dot_product_attention
    sq, sk, sv = peers
    forward = partial(attn, *qkv, causal=causal)
    peer_forward = partial(sdpa, sq, sk, sv, is_causal=causal, enable_gqa=gqa)
    dout = torch.randn_like(qkv[0])
    with measure.flash_backend():
        found = [(forward, forward(), qkv, dout), (peer_forward, peer_forward(), peers, dout.transpose(1, 2))]
        runs: dict[str, Callable[[], Any]] = {}
        for name, (call, out, leaves, grad) in zip(("ours", "peer"), found, strict=True):
            runs[name] = partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
            runs[f"both_{name}"] = partial(_both, call, leaves, grad)
        times = series_us(runs, series, min(calls, BACKWARD_CALLS))
    both = {name: round(statistics.median(times[name]) / 1e3, 6) for name in ("both_ours", "both_peer")}
    return _row(f"{case.name}/backward", times["ours"], times["peer"], artifact) | both


def _both(forward: Callable[[], Any], leaves: Sequence[Any], dout: Any) -> None:
    import torch

    torch.autograd.grad(forward(), leaves, dout)


def _row(case: str, ours: Sequence[float], peer: Sequence[float], artifact: Artifact) -> dict[str, Any]:
    """ours, peer: microseconds a call, one figure a series."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return {
        "case": case,
        "ours": round(mine / 1e3, 6),
        "peer": round(theirs / 1e3, 6),
        "ratio": round(theirs / mine, 4),
        "variant": artifact.variant,
        "ptx_sha256": artifact.ptx_sha256,
    }


def line(row: dict[str, Any]) -> str:
    us = {name: row[name] * 1e3 for name in ("ours", "peer", "both_ours", "both_peer") if name in row}
    both = f"   with the forward {us['both_ours']:6.2f} and {us['both_peer']:6.2f} µs" if "both_ours" in row else ""
    return f"  {row['case']:<34} ours {us['ours']:6.2f} µs   SDPA {us['peer']:6.2f} µs   {row['ratio']:.2f}x{both}"


def series_us(runs: dict[str, Callable[[], Any]], series: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call, one figure a series; the runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(20):
            run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(series):
            for name, run in runs.items():
                measure.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    finally:
        gc.enable()
    measure.synchronize()
    return times


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
