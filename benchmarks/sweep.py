"""Measure every candidate variant of a registry file on the grid, free and with SM120's occupancy emulated.

    python -m benchmarks.sweep --registry candidates.db --out sweep.json

Candidates are read from the artifacts table, so they need not stand in the dispatch table. The work is done in a
worker process that is started again without the candidate (or the case) that broke it: one bad kernel costs itself.
Every candidate is first checked against a float64 reference; one that fails is reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import cases, measure
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError, Candidate, Kernel, bind_fwd, read

MODES = ("free", "sm120")
# batch, heads_q, heads_kv, seqlen_q, seqlen_k, causal: ragged on both sides, grouped, longer and shorter queries.
CHECKS = (
    (2, 4, 2, 200, 333, False),
    (2, 4, 2, 200, 333, True),
    (1, 7, 1, 385, 129, True),
    (1, 2, 2, 1, 1000, True),
    (1, 4, 1, 1024, 1024, True),
)
MAX_ERROR = {"bf16": 1e-2, "fp16": 2e-3}  # relative, of a norm: P rounded to the dtype costs about a third of it
MAX_LSE_ERROR = 1e-4
RESTARTS = 40


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.worker:
        _worker(options)
        return 0
    measure.registry_path(options.registry)
    events, report = [], summarise([])
    for event in _supervise(options):
        events.append(event)
        report = summarise(events)
        if options.out:  # after every event: a run that is cut short keeps what it measured
            measure.write(options.out.parent, options.out.name.removesuffix(".json"), report)
    print(table(report))
    return 0 if report["rows"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, required=True, help="registry file with the candidates' artifacts")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--only", default="*", help="glob over variant keys")
    parser.add_argument("--cases", default="*", help="glob over case names, e.g. 'llama3-8b/S8192/*'")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--stall", type=float, default=120.0, help="seconds without news before the worker is killed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="{}", help=argparse.SUPPRESS)
    return parser


# ---- the supervising side ----


def _supervise(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All events of as many workers as it takes; what a worker dies on is skipped by the next."""
    skip: dict[str, list[str]] = {"candidates": [], "cases": [], "checked": []}
    for _ in range(RESTARTS):
        current: dict[str, Any] = {}
        for event in _worker_events(options, skip):
            if event["event"] == "begin":
                current = event
                print(f"… {event['name']}", file=sys.stderr, flush=True)
                continue
            if event["event"] == "end":
                return
            if event["event"] == "checked":
                skip["checked" if event["ok"] else "candidates"].append(event["variant"])
            elif event["event"] == "measured":
                skip["cases"].append(event["case"])
            yield event
        if not current:
            yield {"event": "failed", "name": "worker", "reason": "it died before it began; see its output above"}
            return
        kind, name = current["kind"], current["name"]
        if name not in skip[kind]:
            skip[kind].append(name)
            yield {"event": "failed", "name": name, "reason": "the worker died or stalled here; see its output above"}
    yield {"event": "failed", "name": "worker", "reason": f"given up after {RESTARTS} restarts"}


def _worker_events(options: argparse.Namespace, skip: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """The events of one worker process, until it ends or says nothing for `--stall` seconds."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--worker", "--skip", json.dumps(skip)]
    command += ["--registry", str(options.registry), "--only", options.only, "--cases", options.cases]
    command += ["--repeats", str(options.repeats), "--modes", *options.modes]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=measure.ROOT)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def pump() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    try:
        while (line := lines.get(timeout=options.stall)) is not None:
            if line.startswith("{"):
                yield json.loads(line)
    except queue.Empty:
        print("the worker stalls; it is killed", file=sys.stderr, flush=True)
    finally:
        worker.kill()
        worker.wait()


# ---- the worker side ----


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _worker(options: argparse.Namespace) -> None:
    """Check, then time, everything that `--skip` does not name; one JSON event a line on stdout."""
    skip = json.loads(options.skip)
    arch = measure.device_arch()
    candidates = read(options.registry, arch, only=options.only)
    if not candidates:
        _say(event="failed", name=options.only, reason=f"no artifact for {arch} in {options.registry}")
    good = [c for c in candidates if c.key not in skip["candidates"] and _checked(c, skip["checked"])]
    todo = [
        (c, dtype) for c in cases.grid(cases.SWEPT) if fnmatchcase(c.name, options.cases) for dtype in measure.DTYPES
    ]
    for case, dtype in todo:
        fitting = [c for c in good if c.variant.head_dim == case.head_dim and c.variant.dtype == dtype]
        name = f"{case.name} {dtype}"
        if fitting and name not in skip["cases"]:
            _say(event="begin", kind="cases", name=name)
            rows = _measure(case, dtype, fitting, options.modes, options.repeats)
            _say(event="measured", case=name, rows=rows)
    _say(event="end")


def _checked(candidate: Candidate, already: list[str]) -> bool:
    """Whether the candidate computes attention; says so. A CUDA fault ends this process, the supervisor goes on."""
    if candidate.key in already:
        return True
    _say(event="begin", kind="candidates", name=candidate.key)
    try:
        errors = [_error(Kernel(candidate), candidate, shape) for shape in CHECKS]
    except BenchmarkError as error:
        _say(event="checked", variant=candidate.key, ok=False, reason=str(error))
        return False
    worst, worst_lse = max(e for e, _ in errors), max(e for _, e in errors)
    ok = all(e <= MAX_ERROR[candidate.variant.dtype] and lse <= MAX_LSE_ERROR for e, lse in errors)
    reason = "" if ok else f"relative errors of out and LSE by check: {[(f'{e:.1e}', f'{x:.1e}') for e, x in errors]}"
    _say(event="checked", variant=candidate.key, ok=ok, reason=reason, error=worst, lse_error=worst_lse)
    return ok


def _error(kernel: Kernel, candidate: Candidate, shape: tuple[int, int, int, int, int, bool]) -> tuple[float, float]:
    """Relative error of the output and largest relative error of the LSE on one small problem."""
    import torch

    batch, heads_q, heads_kv, seqlen_q, seqlen_k, causal = shape
    variant = candidate.variant
    kind = getattr(torch, measure.DTYPES[variant.dtype])
    q = torch.randn(batch, seqlen_q, heads_q, variant.head_dim, device=measure.DEVICE).to(kind)
    k, v = (torch.randn(batch, seqlen_k, heads_kv, variant.head_dim, device=measure.DEVICE).to(kind) for _ in range(2))
    o = torch.full_like(q, float("nan"))
    lse = torch.full((batch, heads_q, seqlen_q), float("nan"), device=measure.DEVICE)
    bind_fwd(kernel, q, k, v, o, lse, causal=causal)()
    measure.synchronize()
    expected, expected_lse = reference(q, k, v, causal)
    rows = torch.isfinite(expected_lse)
    empty_differ = not torch.equal(torch.isneginf(lse), ~rows)
    lse_error = ((lse - expected_lse)[rows].abs() / expected_lse[rows].abs().clamp(min=1)).max().item()
    return measure.relative_error(o, expected), float("inf") if empty_differ else lse_error


def reference(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
    """Attention and LSE in float64; causal aligns bottom-right, an empty row gives 0 and −inf."""
    import torch

    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if causal:
        seqlen_q, seqlen_k = scores.shape[2:]
        allowed = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q)
        scores = scores.masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), lse


def _measure(case: Case, dtype: str, found: list[Candidate], modes: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row per candidate and mode, all timed in turn with the peer."""
    import torch

    inputs = measure.make_inputs(case, dtype)
    outputs = [(torch.empty_like(q), _lse(q)) for q, _, _ in inputs]
    runs: dict[str, measure.Run] = {}
    facts: dict[str, dict[str, Any]] = {}
    with measure.flash_backend():
        for candidate in found:
            for mode in modes:
                name = f"{mode} {candidate.key}"
                try:
                    kernel = _kernel(candidate, mode)
                except BenchmarkError as error:
                    _say(event="failed", name=name, reason=str(error))
                    continue
                bound = [
                    bind_fwd(kernel, *qkv, *ol, causal=case.causal) for qkv, ol in zip(inputs, outputs, strict=True)
                ]
                runs[name] = partial(_call, bound)
                facts[name] = _facts(candidate, kernel, mode, dtype)
        peer = [partial(measure.sdpa, *qkv, case.causal) for qkv in inputs]
        times = measure.interleaved({**runs, "peer": partial(_call, peer)}, len(inputs), repeats)
    reference_ms = statistics.median(times["peer"])
    return [_row(case, facts[name], times[name], reference_ms) for name in runs]


def _lse(q: Any) -> Any:
    import torch

    return torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device, dtype=torch.float32)


def _call(bound: list[Any], i: int) -> None:
    bound[i]()


@cache
def _kernel(candidate: Candidate, mode: str) -> Kernel:
    if mode == "free":
        return Kernel(candidate)
    # All of the H200's 228 KB for shared memory leaves it the 28 KB of L1 that SM120 has beside its 100 KB.
    return Kernel(candidate, smem=candidate.emulated_smem(), carveout=100)


def _facts(candidate: Candidate, kernel: Kernel, mode: str, dtype: str) -> dict[str, Any]:
    shown = candidate.sm120 or candidate.artifact
    wanted = candidate.target_blocks() if mode == "sm120" else None
    return {
        "variant": candidate.key,
        "ptx_sha256": candidate.artifact.ptx_sha256,
        "mode": mode,
        "dtype": dtype,
        "registers": shown.registers,
        "spills": shown.spills,
        "blocks": kernel.occupancy,
        "blocks_wanted": wanted,
    }


def _row(case: Case, facts: dict[str, Any], times: list[float], peer_ms: float) -> dict[str, Any]:
    ours = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [ours, ours, ours]
    return {
        "case": case.name,
        "ours": round(ours, 5),
        "peer": round(peer_ms, 5),
        "ratio": round(peer_ms / ours, 4),
        "tflops": round(case.tflops(ours), 1),
        "spread": round((quartiles[2] - quartiles[0]) / ours, 4),
        **facts,
    }


# ---- the report ----


def summarise(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows, failures and check errors of all workers."""
    rows = [row for event in events if event["event"] == "measured" for row in event["rows"]]
    failed = [{"name": e["name"], "reason": e["reason"]} for e in events if e["event"] == "failed"]
    checks = [e for e in events if e["event"] == "checked"]
    failed += [{"name": e["variant"], "reason": e["reason"]} for e in checks if not e["ok"]]
    errors = {e["variant"]: {"out": e["error"], "lse": e["lse_error"]} for e in checks if e["ok"]}
    return {**measure.environment(), "rows": rows, "failed": failed, "errors": errors}


def table(report: dict[str, Any]) -> str:
    """A line per variant and mode, fastest first, then the best variant of each case."""
    lines = []
    groups = defaultdict(list)
    for row in report["rows"]:
        dim = row["variant"].split("-")[2]
        groups[row["mode"], row["dtype"], dim].append(row)
    for (mode, dtype, dim), rows in sorted(groups.items()):
        lines += ["", f"{mode} {dtype} {dim}: geomean of peer / ours"]
        lines += _ranking(rows)
    lines += ["", "best by case (ratio, TFLOP/s, variant, lead over the second)"]
    lines += _winners(report["rows"])
    lines += [f"FAILED {f['name']}: {f['reason']}" for f in report["failed"]]
    return "\n".join(lines)


def _ranking(rows: list[dict[str, Any]]) -> list[str]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["variant"]].append(row)
    lengths = sorted({int(row["case"].split("/")[1][1:]) for row in rows})
    kinds = [(kind, s) for kind in ("full", "causal") for s in lengths]
    head = "".join(f"{kind[0]}{s:>6}" for kind, s in kinds)
    lines = [f"  {'variant':<44} regs spill blk  all   full  causal {head}"]
    for key, mine in sorted(groups.items(), key=lambda item: -measure.geomean(r["ratio"] for r in item[1])):
        mean = partial(_mean, mine)
        first = mine[0]
        wanted = first["blocks_wanted"]
        blocks = f"{first['blocks']}" if wanted in (None, first["blocks"]) else f"{first['blocks']}≠{wanted}"
        cells = "".join(f"{mean(f'/S{s}/{kind}'):7.3f}" for kind, s in kinds)
        lines.append(
            f"  {key:<44} {first['registers']:>4} {first['spills']:>5} {blocks:>3} "
            f"{mean(''):.3f} {mean('/full'):.3f} {mean('/causal'):.3f} {cells}"
        )
    return lines


def _mean(rows: list[dict[str, Any]], ending: str) -> float:
    return measure.geomean(row["ratio"] for row in rows if row["case"].endswith(ending))


def _winners(rows: list[dict[str, Any]]) -> list[str]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["mode"], row["dtype"], row["case"]].append(row)
    lines = []
    for (mode, dtype, case), mine in groups.items():
        ranked = sorted(mine, key=lambda row: row["ours"])
        best = ranked[0]
        lead = f"+{(ranked[1]['ours'] / best['ours'] - 1) * 100:.1f} %" if len(ranked) > 1 else ""
        lines.append(
            f"  {mode:<5} {dtype} {case:<26} {best['ratio']:.3f} {best['tflops']:6.1f} {best['variant']} {lead}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
