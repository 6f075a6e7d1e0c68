"""What issue 3 bounds beside the grid, all through the public API: shapes.free.json and shapes.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.shapes [--modes free sm120] [--only window varlen]

window: time of window (1023, 0) at 32,768 tokens over the time of the full attention times the share of pairs that the
window shows. varlen: time of 256 sequences of 64 to 400 tokens over the time that the same work, rounded up to tiles of
64 × 64 pairs, takes at our own rate for dense sequences of 256; beside it the time when all are padded to the longest,
and an uneven mix. asymmetric: head_dim other than head_dim_v, beside SDPA where it serves them. pack: the table's tile
with the query heads of a group apart and together, launched raw. Every output is checked before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import forward, measure, published, reference
from benchmarks.cases import Case, dense, varlen, visible_pairs
from benchmarks.cubins import BenchmarkError, Kernel, bind_fwd
from benchmarks.ours import MODES, Ours
from benchmarks.workloads import lengths
from registry.contract import CubineryError

WINDOW, WINDOW_TOKENS, WINDOW_BAR = 1023, 32768, 1.35
VARLEN_BAR, VARLEN_TILE, DENSE_TOKENS = 1.15, 64, 256
CHECKED_ROWS = 128  # of a long sequence that is too big for float64 as a whole: its last queries


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("shapes", __doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    return int(sum([_mode(mode, options) for mode in options.modes]) > 0)


def _mode(mode: str, options: argparse.Namespace) -> int:
    """Measure and write one mode's file; how many parts failed."""
    ours = Ours(measure.registry_path(options.registry), mode)
    value: dict[str, Any] = {**measure.environment(), "mode": mode}
    failures = 0
    for name in options.only:
        try:
            value[name] = PARTS[name](ours, options.repeats)
        except CubineryError as error:  # one part must not cost the others
            failures += 1
            value[name] = {"error": f"{error.reason}: {error}"}
        print(f"{mode} {name}:", flush=True)
        _show(value[name])
    print(measure.write(options.out, f"shapes.{mode}", {**value, "occupancy": ours.occupancy}))
    return failures


def _show(found: dict[str, Any]) -> None:
    for row in found.get("rows", []):
        print("  " + "  ".join(f"{name} {item}" for name, item in row.items() if name != "ptx_sha256"))
    for bar in found.get("bars", []):
        print(published.line(bar))
    if "error" in found:
        print(f"  FAILED {found['error']}")


def medians(runs: dict[str, tuple[list[Any], int]], repeats: int) -> dict[str, float]:
    """Milliseconds by name. runs: name -> (a callable for each input set, how many sets)."""
    sets = min(count for _, count in runs.values())
    timed: dict[str, measure.Run] = {name: partial(measure.call, calls) for name, (calls, _) in runs.items()}
    return {name: statistics.median(times) for name, times in measure.interleaved(timed, sets, repeats).items()}


def timed(ours: Ours, cases: Sequence[Case], repeats: int) -> list[float]:
    """Milliseconds of each case through the public API, in turn."""
    runs = {}
    for i, case in enumerate(cases):
        ours.choice(case)
        inputs = measure.make_inputs(case, "bf16")
        runs[str(i)] = ours.calls(case, inputs), len(inputs)
    return list(medians(runs, repeats).values())


# ---- windows ----


def window(ours: Ours, repeats: int) -> dict[str, Any]:
    rows, bars = [], []
    for model, head_dim in (("llama3-8b", 128), ("hd64", 64)):
        heads = (32, 8) if head_dim == 128 else (16, 16)
        full = dense(model, WINDOW_TOKENS, False, *heads, head_dim, 1)
        part = dense(model, WINDOW_TOKENS, False, *heads, head_dim, 1, window=WINDOW)
        check_tail(ours, part)
        full_ms, part_ms = timed(ours, (full, part), repeats)
        share = visible_pairs(full.seqlen_q, full.seqlen_k, *part.bounds) / full.seqlen_q**2
        factor = round(part_ms / (full_ms * share), 4)
        rows.append(
            {**ours.facts(part, part_ms), "full": round(full_ms, 5), "share": round(share, 5), "factor": factor}
        )
        bars.append(published.at_most(f"{part.name} factor", factor, WINDOW_BAR))
    return {"rows": rows, "bars": bars}


def check_tail(ours: Ours, case: Case) -> None:
    """Check the last rows of a long windowed case against float64 over the keys that they see."""
    q, k, v = measure.make_inputs(case, "bf16", rotated=1)[0]
    (call,) = ours.calls(case, [(q, k, v)])
    rows = min(CHECKED_ROWS, case.seqlen_q)
    assert case.left is not None
    keys = min(rows + case.left, case.seqlen_k)
    expected, _ = reference.attention(q[:, -rows:], k[:, -keys:], v[:, -keys:], False, case.left)
    _close(case, call()[:, -rows:], expected)


def _close(case: Case, out: Any, expected: Any) -> None:
    error = measure.relative_error(out, expected)
    if not error <= forward.MAX_DIFFERENCE:
        raise BenchmarkError(f"{case.name}: ours differs from the reference by {error:.2e}")


# ---- varlen ----


def varlen_part(ours: Ours, repeats: int) -> dict[str, Any]:
    heads, rows, bars = (32, 8, 128), [], []
    even, uneven = lengths(256), (*lengths(255), 8192)
    for causal in (False, True):
        even_ones = dense("dense", DENSE_TOKENS, causal, *heads, batch=sum(even) // DENSE_TOKENS)
        short, mix = varlen("short", heads, even, causal), varlen("mix", heads, uneven, causal)
        padded = dense("padded", max(even), causal, *heads, batch=len(even))
        check_packed(ours, short)
        dense_ms, short_ms, mix_ms, padded_ms = timed(ours, (even_ones, short, mix, padded), repeats)
        per_pair = dense_ms / tile_pairs((DENSE_TOKENS,) * even_ones.batch, causal)
        factor = round(short_ms / (per_pair * tile_pairs(even, causal)), 4)
        rows.append({**ours.facts(short, short_ms), "factor": factor, "dense_256": round(dense_ms, 5),
                     "padded": round(padded_ms, 5)})  # fmt: skip
        mixed = round(mix_ms / (per_pair * tile_pairs(uneven, causal)), 4)
        rows.append({**ours.facts(mix, mix_ms), "factor": mixed})
        bars.append(published.at_most(f"{short.name} factor", factor, VARLEN_BAR))
    return {"rows": rows, "bars": bars}


def tile_pairs(found: Sequence[int], causal: bool) -> int:
    """(query, key) pairs of these sequences, rounded up to whole tiles; under a causal mask of the tiles it touches."""
    tiles = [-(-length // VARLEN_TILE) for length in found]
    return VARLEN_TILE**2 * sum(n * (n + 1) // 2 if causal else n * n for n in tiles)


def check_packed(ours: Ours, case: Case) -> None:
    """Check every sequence against float64."""
    q, k, v = measure.make_inputs(case, "bf16", rotated=1)[0]
    (call,) = ours.calls(case, [(q, k, v)])
    _close(case, call(), reference.packed(q, k, v, case)[0])


# ---- head_dim other than head_dim_v ----


def asymmetric(ours: Ours, repeats: int) -> dict[str, Any]:
    rows = []
    for head_dim, head_dim_v in ((128, 64), (192, 128), (256, 128)):
        for causal in (False, True):
            case = dense(f"d{head_dim}-dv{head_dim_v}", 4096, causal, 32, 8, head_dim, 2, head_dim_v=head_dim_v)
            small = dense("check", 300, causal, 4, 1, head_dim, 2, head_dim_v=head_dim_v)
            q, k, v = measure.make_inputs(small, "bf16", rotated=1)[0]
            _close(small, ours.calls(small, [(q, k, v)])[0](), reference.attention(q, k, v, causal)[0])
            rows.append(_beside_sdpa(ours, case, repeats))
    return {"rows": rows}


def _beside_sdpa(ours: Ours, case: Case, repeats: int) -> dict[str, Any]:
    """With SDPA's FlashAttention-2 where it takes such head dims, else with its refusal."""
    try:
        return forward.against_sdpa(ours, None, case, "bf16", repeats)
    except RuntimeError as error:
        (ms,) = timed(ours, (case,), repeats)
        return {**ours.facts(case, ms), "peer": None, "sdpa": str(error).splitlines()[0][:200]}


# ---- packing ----


def pack(ours: Ours, repeats: int) -> dict[str, Any]:
    """Each case with its tile as the table chooses it, the heads of a group apart and together."""
    rows = []
    for heads, seqlen, keys, batch, causal in (
        ((32, 8), 1, 8192, 16, False),
        ((28, 4), 8, 4096, 16, True),
        ((32, 8), 128, 4096, 8, True),
        ((32, 8), 1024, None, 8, True),
        ((32, 8), 4096, None, 2, True),
        ((32, 8), 4096, None, 2, False),
        ((28, 4), 4096, None, 2, True),
    ):
        case = dense(f"{heads[0]}h{heads[1]}", seqlen, causal, *heads, 128, batch, keys)
        chosen = ours.choice(case)
        candidate = ours.candidate(chosen.artifact)
        kernel = Kernel(candidate, smem=None if ours.mode == "free" else candidate.emulated_smem())
        inputs = measure.make_inputs(case, "bf16")
        outs = [reference.outputs(q, v, case) for q, _, v in inputs]
        runs = {
            name: ([bind_fwd(kernel, *qkv, *out, causal=causal, pack=together)
                    for qkv, out in zip(inputs, outs, strict=True)], len(inputs))
            for name, together in (("apart", False), ("together", True))
        }  # fmt: skip
        results = {}
        for name, (calls, _) in runs.items():
            calls[0]()
            results[name] = outs[0][0].clone()
        _close(case, results["together"], results["apart"])
        ms = medians(runs, repeats)
        gain = round(ms["apart"] / ms["together"], 4)
        rows.append({**ours.facts(case, ms["together" if chosen.pack else "apart"]),
                     "apart": round(ms["apart"], 5), "together": round(ms["together"], 5), "gain": gain})  # fmt: skip
    return {"rows": rows}


PARTS: dict[str, Callable[[Ours, int], dict[str, Any]]] = {
    "window": window,
    "varlen": varlen_part,
    "asymmetric": asymmetric,
    "pack": pack,
}


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
