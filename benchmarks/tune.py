"""Measure candidate tiles against those of the dispatch table, class by class: the input of `python -m builder accept`.

    python -m builder candidates --registry candidates.db        # where the builder runs
    python -m benchmarks.tune --registry candidates.db --out results.json [--dims 128,128] [--budget 600]

Every candidate gets a process of its own, which checks it against float64 and then times it on the cases of each class
it may serve, in turn with what the table chooses now (the incumbent), packed and not, free and with SM120's occupancy
emulated. Processes start side by side and measure one at a time. The three fastest of a class (with the occupancy
emulated) are measured twice more in fresh processes; one whose runs differ by more than 10 % is excluded.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure, reference
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError, Candidate, Kernel, bind_fwd, read
from benchmarks.workloads import packings, workloads
from kernels import dispatch
from kernels.fwd.table import TILES
from kernels.tables import Tiles
from registry.contract import CubineryError, Variant

FORMAT = 1  # of the result file; builder.accept reads it
DTYPE = "bf16"  # tiles are chosen for it and serve fp16 too
MODES = ("sm120", "free")
TOP, REPEATS = 3, 2  # how many of a class are measured again, and how often
MAX_VARIANCE = 0.10
LIMIT_S = 60  # that one process may hold the device: a kernel that hangs costs no more
FIRST_PART = 0.6  # of the time of one pair of head dims, for measuring everything once
SIDE_BY_SIDE = 6  # processes: importing torch takes longer than measuring
SETS_BYTES = 128 << 20  # of rotated inputs


class Choice(NamedTuple):
    """How a call is served."""

    key: str
    pack: bool

    @property
    def tile(self) -> str:
        return "-".join(f"{letter}{size}" for letter, size in Variant.parse(self.key).tile)


@dataclass(frozen=True)
class Job:
    """One process: a candidate, and the classes on whose cases it is measured. run: 0 is the first of it."""

    key: str
    classes: tuple[str, ...]
    run: int


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.worker:
        _worker(options)
        return 0
    measure.registry_path(options.registry)
    report = Tuning(options).run()
    options.out.write_text(text(report))
    print(summary(report))
    print(f"{options.out}: {len(report['classes'])} classes, {len(report['failed'])} candidates failed or left out")
    return 0 if report["classes"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", type=Path, required=True, help="what `python -m builder candidates` wrote")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--dims", action="append", type=_dims, metavar="D,DV", help="head dims (default: all); repeat")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="classes of the dispatch table (default: all)")
    parser.add_argument("--only", default="*", help="glob over candidates' keys")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of a case in one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    return parser


def _dims(value: str) -> tuple[int, int]:
    try:
        head_dim, head_dim_v = map(int, value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not like 128,128") from None
    return head_dim, head_dim_v


# ---- the process that starts the others ----


class Tuning:
    """One run: which jobs are left, how much time, and all events so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.table = Tiles.read(TILES)
        self.classes = tuple(options.classes or self.table.classes)
        if unknown := set(self.classes) - self.table.classes.keys():
            raise BenchmarkError(
                f"--classes {', '.join(sorted(unknown))}: the table has {', '.join(self.table.classes)}"
            )
        self.end = time.monotonic() + options.budget
        self.measurements: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.start: Callable[[Job, float], list[dict[str, Any]]] = partial(_start, options)

    def run(self) -> dict[str, Any]:
        """Everything, one pair of head dims after the other; each gets an even share of the time that is left."""
        found = read(self.options.registry, measure.device_arch())
        by_dims: dict[tuple[int, int], list[Candidate]] = {}
        for candidate in found:
            variant = candidate.variant
            if variant.dtype == DTYPE and (not self.options.dims or dims_of(variant) in self.options.dims):
                by_dims.setdefault(dims_of(variant), []).append(candidate)
        if not by_dims:
            raise BenchmarkError(f"{self.options.registry}: no {DTYPE} candidates of these head dims for this device")
        classes = []
        for done, (dims, candidates) in enumerate(sorted(by_dims.items())):
            share = (self.end - time.monotonic()) / (len(by_dims) - done)
            classes += self._one(dims, candidates, share)
        tuned = {"tuning": FORMAT, "op": "fwd", **measure.environment(), "classes": classes}
        return {**tuned, "failed": self.failed, "measurements": self.measurements}

    def _one(self, dims: tuple[int, int], candidates: list[Candidate], share: float) -> list[dict[str, Any]]:
        """Measure all candidates once, then the best of each class again."""
        began, before = time.monotonic(), len(self.measurements)
        ready = []
        for candidate in candidates:
            if not fnmatchcase(candidate.key, self.options.only):
                continue
            if candidate.sm120 is None:
                self._fail(candidate.key, "no sm_120 cubin of its PTX: refused there")
            elif classes := self._classes(candidate.variant):
                ready.append(Job(candidate.key, classes, 0))
        in_table = {row.variant for row in dispatch.rows()}
        ready.sort(key=lambda job: job.key not in in_table)
        self._all(ready, began + FIRST_PART * share)
        again = best(self.measurements[before:])
        for run in range(1, 1 + REPEATS):
            self._all([Job(key, classes, run) for key, classes in again.items()], began + share)
        hashes = {c.key: c.artifact.ptx_sha256 for c in candidates}
        return aggregate(dims, self.measurements[before:], hashes)

    def _classes(self, variant: Variant) -> tuple[str, ...]:
        """The classes that a tile of so many rows may serve."""
        of = workloads(*dims_of(variant))
        return tuple(c for c in self.classes if of[c].rows[0] <= variant.size("m") <= of[c].rows[1])

    def _all(self, jobs: Sequence[Job], end: float) -> None:
        """Run the jobs side by side; those that could only start after `end` are left out."""

        def start(job: Job) -> list[dict[str, Any]]:
            left = end - time.monotonic()
            return self.start(job, left) if left > 0 else [{"event": "failed", "reason": "no time was left for it"}]

        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            for job, events in zip(jobs, pool.map(start, jobs), strict=True):
                for event in events:
                    if event["event"] == "measured":
                        del event["event"]
                        self.measurements.append({"run": job.run, "variant": job.key, **event})
                    else:
                        self._fail(job.key, event["reason"] + (f" (run {job.run})" if job.run else ""))

    def _fail(self, key: str, reason: str) -> None:
        self.failed.append({"variant": key, "reason": reason})
        print(f"  {key}: {reason}", file=sys.stderr, flush=True)


def dims_of(variant: Variant) -> tuple[int, int]:
    return variant.head_dim, variant.head_dim_v


def _start(options: argparse.Namespace, job: Job, left: float) -> list[dict[str, Any]]:
    """The events of one process; its death is one of them. left: seconds until no more may start."""
    command = [sys.executable, "-m", "benchmarks.tune", "--worker", job.key, "--classes", *job.classes]
    command += ["--registry", str(options.registry.resolve()), "--repeats", str(options.repeats)]
    command += ["--lock", str(Path(tempfile.gettempdir()) / f"cubinery-tune-{os.getpid()}.lock")]
    try:
        # Others may be measured first, each for LIMIT_S at worst.
        done = subprocess.run(
            command, cwd=measure.ROOT, capture_output=True, text=True, check=False, timeout=left + LIMIT_S * 2
        )
    except subprocess.TimeoutExpired:
        return [{"event": "failed", "reason": "its turn to measure never came"}]
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        ending = " ".join(done.stderr.split())[-300:]
        events.append({"event": "failed", "reason": f"its process ended with {done.returncode}: {ending}"})
    return events


# ---- what the measurements say ----


def geomeans(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, Choice], dict[int, float]]:
    """(class, choice) → run → geomean over the class's cases of the gain with SM120's occupancy; whole runs only."""
    rows = [row for row in rows if row["mode"] == "sm120"]
    cases: dict[str, set[str]] = defaultdict(set)
    gains: dict[tuple[str, Choice], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cases[row["class"]].add(row["case"])
        gains[row["class"], Choice(row["variant"], row["pack"])][row["run"]][row["case"]] = row["gain"]
    return {
        at: {run: measure.geomean(found.values()) for run, found in runs.items() if found.keys() == cases[at[0]]}
        for at, runs in gains.items()
    }


def best(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Candidate → the classes in which it, packed or not, is among the fastest. What is in the table need not prove
    itself against itself."""
    incumbents: dict[str, set[Choice]] = defaultdict(set)
    for row in rows:
        incumbents[row["class"]].add(Choice(row["incumbent"], row["incumbent_pack"]))
    ranked: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (call_class, choice), runs in geomeans(rows).items():
        if runs and incumbents[call_class] != {choice}:
            ranked[call_class].append((statistics.median(runs.values()), choice.key))
    found: dict[str, list[str]] = defaultdict(list)
    for call_class, fastest in ranked.items():
        for key in dict.fromkeys(key for _, key in sorted(fastest, reverse=True)[:TOP]):
            found[key].append(call_class)
    return {key: tuple(classes) for key, classes in found.items()}


def aggregate(dims: tuple[int, int], rows: Sequence[dict[str, Any]], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """One entry a class, as builder.accept reads it."""
    runs = geomeans(rows)
    entries = []
    for call_class, workload in workloads(*dims).items():
        mine = [row for row in rows if row["class"] == call_class]
        served = {row["case"]: Choice(row["incumbent"], row["incumbent_pack"]) for row in mine}
        if not mine:
            continue
        options = [
            _option(choice, [r for r in mine if (r["variant"], r["pack"]) == choice], found, hashes)
            for (name, choice), found in runs.items()
            if name == call_class and found
        ]
        cases = [
            {"case": c.name, "facts": c.facts(DTYPE), "incumbent": _stated(served[c.name], hashes)}
            for c in workload.cases
            if c.name in served
        ]
        options.sort(key=lambda option: -option["sm120"])
        entries.append(
            {"head_dim": dims[0], "head_dim_v": dims[1], "class": call_class, "cases": cases, "options": options}
        )
    return entries


def _stated(choice: Choice, hashes: dict[str, str]) -> dict[str, Any]:
    return {"tile": choice.tile, "pack": choice.pack, "ptx_sha256": hashes[choice.key]}


def _option(
    choice: Choice, rows: Sequence[dict[str, Any]], runs: dict[int, float], hashes: dict[str, str]
) -> dict[str, Any]:
    """A tile's gains, medians over its runs, and why it may not be believed."""
    gains: dict[str, dict[str, float]] = {}
    for mode in MODES:
        found: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row["mode"] == mode and row["run"] in runs:
                found[row["case"]].append(row["gain"])
        gains[mode] = {case: round(statistics.median(values), 4) for case, values in found.items()}
    variance = (max(runs.values()) - min(runs.values())) / statistics.median(runs.values())
    excluded = f"its {len(runs)} runs differ by {variance:.0%}" if variance > MAX_VARIANCE else None
    means = {mode: round(measure.geomean(gains[mode].values()), 4) for mode in MODES}
    return {**_stated(choice, hashes), **means, "runs": len(runs), "excluded": excluded, "gains": gains}


def text(report: dict[str, Any]) -> str:
    """JSON with one class, failure or measurement a line."""
    parts = []
    for name, value in report.items():
        rows = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f'"{name}": ' + (f"[\n{rows}\n]" if isinstance(value, list) else json.dumps(value)))
    return "{" + ",\n".join(parts) + "}\n"


def summary(report: dict[str, Any]) -> str:
    """The fastest of each class, with gains over the table's choice."""
    lines = []
    for entry in report["classes"]:
        now = " and ".join(sorted({c["incumbent"]["tile"] + _packed(c["incumbent"]) for c in entry["cases"]}))
        lines.append(f"{entry['head_dim']}/{entry['head_dim_v']} {entry['class']}: {now}")
        for o in entry["options"][:TOP]:
            note = f"  EXCLUDED: {o['excluded']}" if o["excluded"] else ""
            lines.append(
                f"  {o['tile'] + _packed(o):<24} sm120 {o['sm120']:.3f}  free {o['free']:.3f}  {o['runs']} runs{note}"
            )
    return "\n".join(lines)


def _packed(choice: dict[str, Any]) -> str:
    return " packed" if choice["pack"] else ""


# ---- the process of one candidate ----


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _worker(options: argparse.Namespace) -> None:
    """Check the candidate, then time it; one JSON event a line on stdout. A fault ends this process alone."""
    measure.synchronize()  # imports torch and creates its context: that takes longest, and needs no turn
    variant = Variant.parse(options.worker)
    tile = variant.key.index("-m")
    found = {c.key: c for c in read(options.registry, measure.device_arch(), only=f"{variant.key[:tile]}-*")}
    table = Tiles.read(TILES)
    with open(options.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends, however it does
        signal.alarm(LIMIT_S)
        try:
            grouped = any(True in packings(c, table) for c in options.classes)
            check(found[variant.key], (False, True) if grouped else (False,))
            for call_class in options.classes:
                for case in workloads(*dims_of(variant))[call_class].cases:
                    packs = packings(call_class, table)
                    for row in time_case(case, found[variant.key], packs, found, options.repeats):
                        _say(event="measured", **{"class": call_class}, **row)
        except CubineryError as error:
            _say(event="failed", reason=str(error))
        signal.alarm(0)


def check(candidate: Candidate, packs: Sequence[bool]) -> None:
    """BenchmarkError unless the candidate computes attention."""
    kernel, variant = Kernel(candidate), candidate.variant
    for pack in packs:

        def run(q: Any, k: Any, v: Any, o: Any, lse: Any, case: Case, cu: Any, pack: bool = pack) -> None:
            bind_fwd(kernel, q, k, v, o, lse, causal=case.causal, window=case.left, pack=pack, cu_seqlens=cu)()

        errors = reference.errors(run, dims_of(variant), variant.dtype)
        if not reference.good(errors, variant.dtype):
            wrong = ", ".join(f"{case} {out:.1e} {lse:.1e}" for case, out, lse in errors)
            raise BenchmarkError(f"wrong{' when packed' if pack else ''}: relative errors of out and LSE are {wrong}")


def incumbent(case: Case) -> Choice:
    """What the table chooses for the case."""
    facts = case.facts(DTYPE)
    row = next(row for row in dispatch.rows() if all(c.holds(facts) for c in row.when))
    return Choice(row.variant, row.pack)


def time_case(
    case: Case, candidate: Candidate, packs: Sequence[bool], found: dict[str, Candidate], repeats: int
) -> list[dict[str, Any]]:
    """One row for each way of packing and mode, timed in turn with the incumbent in the same mode."""
    served = incumbent(case)
    if served.key not in found:
        raise BenchmarkError(f"{served.key}: the table's choice is not among the candidates; build them again")
    choices = {"incumbent": served} | {f"pack{int(pack)}": Choice(candidate.key, pack) for pack in packs}
    inputs = measure.make_inputs(case, DTYPE, SETS_BYTES)
    outs = [reference.outputs(q, v, case) for q, _, v in inputs]
    cu = None if case.lengths is None else (measure.cu_seqlens(case.lengths),) * 2
    runs: dict[str, measure.Run] = {}
    kernels: dict[str, Kernel] = {}
    for name, choice in choices.items():
        for mode in MODES:
            at = f"{name} {mode}"
            kernel = kernels[at] = _kernel(found[choice.key], mode)
            bound = [
                bind_fwd(kernel, *qkv, *out, causal=case.causal, window=case.left, pack=choice.pack, cu_seqlens=cu)
                for qkv, out in zip(inputs, outs, strict=True)
            ]
            runs[at] = partial(measure.call, bound)
    times = measure.interleaved(runs, len(inputs), repeats)
    rows = []
    for pack in packs:
        for mode in MODES:
            mine, theirs = times[f"pack{int(pack)} {mode}"], times[f"incumbent {mode}"]
            shown = {"blocks": kernels[f"pack{int(pack)} {mode}"].occupancy}
            if mode == "sm120":
                shown["blocks_wanted"] = candidate.target_blocks()
            rows.append({"case": case.name, "pack": pack, "mode": mode, **_figures(mine, theirs, served), **shown})
    return rows


def _figures(mine: list[float], theirs: list[float], served: Choice) -> dict[str, Any]:
    ours, other = statistics.median(mine), statistics.median(theirs)
    quartiles = statistics.quantiles(mine, n=4) if len(mine) > 1 else [ours] * 3
    return {
        "ms": round(ours, 5),
        "incumbent_ms": round(other, 5),
        "gain": round(other / ours, 4),
        "spread": round((quartiles[2] - quartiles[0]) / ours, 4),
        "incumbent": served.key,
        "incumbent_pack": served.pack,
    }


@cache
def _kernel(candidate: Candidate, mode: str) -> Kernel:
    if mode == "free":
        return Kernel(candidate)
    # All of the H200's 228 KB for shared memory leaves it the 28 KB of L1 that SM120 has beside its 100 KB.
    return Kernel(candidate, smem=candidate.emulated_smem(), carveout=100)


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
