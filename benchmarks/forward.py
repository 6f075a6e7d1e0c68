"""The forward against SDPA's FlashAttention-2 on the grid: forward.free.json and forward.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.forward [--modes free sm120]

Ours is `runtime.flash_attn` with the dispatch table's own choice. Mode sm120 pads the dynamic shared memory of our
launches until as many blocks share an H200 SM as would share an SM120 SM (by the sm_120 artifact's registers, threads
and shared memory); the peer is never padded. Times are device times between CUDA events, medians, interleaved. The bars
and FA4's published figures (benchmarks/published.py) stand beside the rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from benchmarks import cases, measure, published
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError
from benchmarks.ours import MODES, Ours
from registry.contract import CubineryError

MAX_DIFFERENCE = 2e-2  # relative, of norms, from the peer's output: both round P and the output to the dtype


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("forward", __doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", default="*", help="glob over case names, e.g. 'llama3-8b/S8192/*'")
    parser.add_argument("--dtype", choices=sorted(measure.DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(argv)
    return int(sum([_mode(mode, options) for mode in options.modes]) > 0)


def _mode(mode: str, options: argparse.Namespace) -> int:
    """Measure and write one mode's file; how many cases failed."""
    ours = Ours(measure.registry_path(options.registry), mode)
    rows, failures = [], 0
    for case in cases.grid():
        if not fnmatchcase(case.name, options.cases):
            continue
        try:
            rows.append(against_sdpa(ours, case, options.dtype, options.repeats))
            print(line(rows[-1]), flush=True)
        except CubineryError as error:  # one case without a kernel must not cost the others
            failures += 1
            print(f"  {case.name:<26} FAILED {error.reason}: {error}", flush=True)
    fa4 = published.against_fa4(rows, published.FA2_FA4, "forward")
    value = measure.result(mode, rows, occupancy=ours.occupancy, against_fa4=fa4)
    value["bars"] = published.verdicts(mode, value)
    path = measure.write(options.out, f"forward.{mode}", value)
    report(fa4["cells"])
    print("\n".join(map(published.line, value["bars"])))
    print(f"{path}: geomean {value['geomean']} over {len(rows)} cases, {mode}; blocks per SM {ours.occupancy}")
    return failures


def against_sdpa(ours: Ours, case: Case, dtype: str, repeats: int) -> dict[str, Any]:
    """One dense case: check ours against the peer, then time both in turn."""
    inputs = measure.make_inputs(case, dtype)
    ours.choice(case, dtype)  # its occupancy is asked for before anything is timed
    with measure.flash_backend():
        mine = ours.calls(case, inputs)
        peer = [partial(measure.sdpa, *qkv, case.causal) for qkv in inputs]
        difference = measure.relative_error(mine[0](), peer[0]().transpose(1, 2))
        if not difference <= MAX_DIFFERENCE:
            raise BenchmarkError(f"{case.name}: ours differs from SDPA by {difference:.2e}")
        runs: dict[str, measure.Run] = {"ours": partial(measure.call, mine), "peer": partial(measure.call, peer)}
        times = measure.interleaved(runs, len(inputs), repeats, warmup=3)
    ms, peer_ms = statistics.median(times["ours"]), statistics.median(times["peer"])
    return {
        **ours.facts(case, ms, dtype),
        "peer": round(peer_ms, 5),
        "ratio": round(peer_ms / ms, 4),
        "peer_tflops": round(case.tflops(peer_ms), 1),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"  {row['case']:<26} ours {row['ours']:8.4f} ms {row['tflops']:6.1f} TFLOP/s   "
        f"SDPA {row['peer']:8.4f} ms {row['peer_tflops']:6.1f}   {row['ratio']:.3f}x   {row['variant']}"
        + (" packed" if row["pack"] else "")
    )


def report(cells: Sequence[dict[str, Any]]) -> None:
    for cell in cells:
        print(
            f"  {cell['case']:<26} ours/FA2 {cell['ours_over_fa2']:.3f}   FA4/FA2 as published "
            f"{cell['fa4_over_fa2']:.3f}   {'ahead' if cell['met'] else 'BEHIND'}"
        )


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
