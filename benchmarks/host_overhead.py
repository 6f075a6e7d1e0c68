"""Host time of a warm call against SDPA's: host_overhead.free.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.host_overhead

Wall clock over many asynchronous calls on tiny shapes, ours and SDPA's FlashAttention backend in turn in one run. The
queue is emptied before each series and a series is shorter than the queue, so that no call waits for the device.
`ours` and `peer` are milliseconds a call, as everywhere; the printed table shows microseconds.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from benchmarks.cases import Case, dense
from benchmarks.ours import Ours

CASES = (
    dense("llama3-8b", 1, False, 32, 8, 128, 1),
    dense("llama3-8b", 128, True, 32, 8, 128, 1),
    dense("hd64", 128, False, 16, 16, 64, 1),
)
CALLS = 400  # in a series; the driver's queue holds 1,024 launches
SERIES = 25


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("host_overhead", __doc__)
    parser.add_argument("--series", type=int, default=SERIES)
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args(argv)
    bench = Ours(measure.registry_path(options.registry), "free")
    rows = []
    for case in CASES:
        rows += case_rows(bench, case, options.series, options.calls)
    value = measure.result("free", rows)
    for row in rows:
        ours, peer = row["ours"] * 1e3, row["peer"] * 1e3
        print(f"  {row['case']:<34} ours {ours:6.2f} µs   SDPA {peer:6.2f} µs   {row['ratio']:.2f}x")
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
    peer = statistics.median(times["peer"])
    return [
        {
            "case": case.name + name,
            "ours": round(statistics.median(times[name]) / 1e3, 6),
            "peer": round(peer / 1e3, 6),
            "ratio": round(peer / statistics.median(times[name]), 4),
            "variant": artifact.variant,
            "ptx_sha256": artifact.ptx_sha256,
        }
        for name in ours
    ]


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
