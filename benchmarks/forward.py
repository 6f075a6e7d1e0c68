"""The forward against SDPA's FlashAttention-2 on the grid: forward.free.json and forward.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.forward [--modes free sm120]

Ours is `runtime.flash_attn` with the dispatch table's own choice. Mode sm120 pads the dynamic shared memory of our
launches until as many blocks share an H200 SM as would share an SM120 SM (by the sm_120 artifact's registers, threads
and shared memory); the peer is never padded. Times are device times between CUDA events, medians, interleaved. The bars
and FA4's published figures (benchmarks/published.py) stand beside the rows.

The peer is measured twice, by turns in the same run: `peer` is free to use the shared memory of this GPU, `peer_held`
is held to the 99 KB of an SM120 block (benchmarks/held.py), which needs a C compiler, $CC or cc. `ratio` and
`ratio_held` are their times over ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from benchmarks import cases, measure, published
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError
from benchmarks.held import HeldPeer
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
    with HeldPeer() as held:
        return int(sum([_mode(mode, options, held) for mode in options.modes]) > 0)


def _mode(mode: str, options: argparse.Namespace, held: HeldPeer) -> int:
    """Measure and write one mode's file; how many cases failed."""
    ours = Ours(measure.registry_path(options.registry), mode)
    held.start()  # what keeps it from that keeps it from every case
    rows, failures = [], 0
    for case in cases.grid():
        if not fnmatchcase(case.name, options.cases):
            continue
        try:
            rows.append(against_sdpa(ours, held, case, options.dtype, options.repeats))
            print(line(rows[-1]), flush=True)
        except CubineryError as error:  # one case without a kernel must not cost the others
            failures += 1
            print(f"  {case.name:<26} FAILED {error.reason}: {error}", flush=True)
    fa4 = published.against_fa4(rows, published.FA2_FA4, "forward")
    value = measure.result(mode, rows, geomean_held=measure.mean_of(rows, "ratio_held"), held=held.proof,
                           occupancy=ours.occupancy, against_fa4=fa4)  # fmt: skip
    value["bars"] = published.verdicts(mode, value)
    path = measure.write(options.out, f"forward.{mode}", value)
    report(fa4["cells"])
    print("\n".join(map(published.line, value["bars"])))
    print(f"{path}: {summary(value)}, {mode}; blocks per SM {ours.occupancy}")
    return failures


def against_sdpa(ours: Ours, held: HeldPeer | None, case: Case, dtype: str, repeats: int) -> dict[str, Any]:
    """One dense case: check ours against the peer, then time both, and the held peer if there is one, in turn."""
    inputs = measure.make_inputs(case, dtype)
    ours.choice(case, dtype)  # its occupancy is asked for before anything is timed
    with measure.flash_backend():
        mine = ours.calls(case, inputs)
        theirs = peer(case, inputs)
        difference = measure.relative_error(mine[0](), theirs[0]().transpose(1, 2))
        if not difference <= MAX_DIFFERENCE:
            raise BenchmarkError(f"{case.name}: ours differs from SDPA by {difference:.2e}")
        if held:
            held.prepare("forward", case, dtype)
        elsewhere = {"peer_held": held.round} if held else None
        runs: dict[str, measure.Run] = {"ours": partial(measure.call, mine), "peer": partial(measure.call, theirs)}
        times = measure.interleaved(runs, len(inputs), repeats, warmup=3, elsewhere=elsewhere)
    ms = {name: statistics.median(found) for name, found in times.items()}
    return {**ours.facts(case, ms["ours"], dtype), **beside_peers(case, ms)}


def peer(case: Case, inputs: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
    """SDPA's call for each input set; they are to be made within `measure.flash_backend()`."""
    return [partial(measure.sdpa, *qkv, case.causal) for qkv in inputs]


def beside_peers(case: Case, ms: Mapping[str, float], op: str = "fwd") -> dict[str, Any]:
    """What a row states of the peers. ms: by name, with 'ours', 'peer' and, where that was measured, 'peer_held'."""
    row = {
        "peer": round(ms["peer"], 5),
        "ratio": round(ms["peer"] / ms["ours"], 4),
        "peer_tflops": round(case.tflops(ms["peer"], op), 1),
    }
    if "peer_held" in ms:
        row |= {"peer_held": round(ms["peer_held"], 5), "ratio_held": round(ms["peer_held"] / ms["ours"], 4)}
    return row


def summary(value: Mapping[str, Any]) -> str:
    return f"geomean {value['geomean']}, held peer {value['geomean_held']}, over {len(value['rows'])} cases"


def line(row: dict[str, Any]) -> str:
    return (
        f"  {row['case']:<26} ours {row['ours']:8.4f} ms {row['tflops']:6.1f} TFLOP/s   "
        f"SDPA {row['peer']:8.4f} ms {row['peer_tflops']:6.1f}   {row['ratio']:.3f}x   held {row['ratio_held']:.3f}x   "
        f"{row['variant']}" + (" packed" if row["pack"] else "")
    )


def report(cells: Sequence[dict[str, Any]]) -> None:
    for cell in cells:
        print(
            f"  {cell['case']:<26} ours/FA2 {cell['ours_over_fa2']:.3f}   FA4/FA2 as published "
            f"{cell['fa4_over_fa2']:.3f}   {'ahead' if cell['met'] else 'BEHIND'}"
        )


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
