"""Timing, environment facts and result files that all benchmarks share."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
ROTATED_BYTES = 256 << 20  # several times the 60 MB of L2 of an H200: no run finds its inputs in the cache
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

WAITS = (2_000_000, 8_000_000, 32_000_000)  # GPU cycles, the first about 1 ms

DEVICE = "cuda"  # tests of the scripts themselves set "cpu"

Run = Callable[[int], object]  # enqueues one call on input set i
Elsewhere = Callable[[int], Sequence[float]]  # the milliseconds of round i, timed by whoever is asked


def interleaved(
    runs: Mapping[str, Run], sets: int, repeats: int, warmup: int = 2, elsewhere: Mapping[str, Elsewhere] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each run, `repeats` times: one call of every run a round, so that clocks drift alike for all.

    elsewhere: what another process times, asked for once a round, before and after our own calls by turns.

    Input sets rotate from call to call, and so do the places within a round, in both directions: what runs before it
    moves a kernel by up to 2 %. On a GPU, events are recorded around each call while the queue is kept full,
    so host time stays out of the figures. BenchmarkError where the host is too slow for that.
    """
    for i in range(warmup):
        for run in runs.values():
            run(i % sets)
    beside = elsewhere or {}
    times: dict[str, list[float]] = {name: [] for name in (*runs, *beside)}
    names = list(runs)
    for repeat in range(repeats):
        at = repeat // 2 % len(names)
        order = (names[at:] + names[:at])[:: -1 if repeat % 2 else 1]
        if repeat % 2:
            _ask(beside, repeat, times)
        for name, ms in one_round({name: runs[name] for name in order}, repeat, sets).items():
            times[name].append(ms)
        if not repeat % 2:
            _ask(beside, repeat, times)
    return times


def _ask(elsewhere: Mapping[str, Elsewhere], repeat: int, times: dict[str, list[float]]) -> None:
    for name, ask in elsewhere.items():
        times[name] += ask(repeat)


def one_round(runs: Mapping[str, Run], repeat: int, sets: int) -> dict[str, float]:
    """Milliseconds of one call of each run, on input sets from `repeat` on; the device is idle before and after."""
    return (_cuda_round if DEVICE == "cuda" else _cpu_round)(runs, repeat, sets)


def _cuda_round(runs: Mapping[str, Run], repeat: int, sets: int) -> dict[str, float]:
    """One call of each run, enqueued while the device waits; again behind a longer wait if it caught up with one."""
    import torch

    for wait in WAITS:
        torch.cuda.synchronize()
        torch.cuda._sleep(wait)
        marks, ahead = {}, True
        for i, (name, run) in enumerate(runs.items()):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run((repeat + i) % sets)
            end.record()
            ahead = ahead and not start.query()  # all of this call is in the queue before the device comes to it
            marks[name] = (start, end)
        torch.cuda.synchronize()
        if ahead:
            return {name: start.elapsed_time(end) for name, (start, end) in marks.items()}
    raise BenchmarkError(f"the host cannot enqueue {', '.join(runs)} before the device runs them")


def _cpu_round(runs: Mapping[str, Run], repeat: int, sets: int) -> dict[str, float]:
    times = {}
    for i, (name, run) in enumerate(runs.items()):
        start = time.perf_counter()
        run((repeat + i) % sets)
        times[name] = (time.perf_counter() - start) * 1e3
    return times


def call(bound: Sequence[Callable[[], object]], i: int) -> object:
    """Run input set `i`."""
    return bound[i % len(bound)]()


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The command line that benchmarks share: --registry and --out."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").splitlines()[0])
    made.add_argument("--registry", type=Path, help="registry file; by default CUBINERY_REGISTRY")
    made.add_argument("--out", type=Path, default=RESULTS)
    return made


def registry_path(given: Path | None) -> Path:
    """The registry file to measure on this machine: `given`, or what CUBINERY_REGISTRY names.

    BenchmarkError if that is no file, or if there is no device to measure on.
    """
    if reason := no_device():
        raise BenchmarkError(f"nothing can be measured here: {reason}")
    path = given or Path(os.environ.get("CUBINERY_REGISTRY", ""))
    if not path.is_file():
        raise BenchmarkError(f"registry: {str(path)!r} is no file; give --registry PATH or set CUBINERY_REGISTRY")
    return path


def no_device() -> str | None:
    """Why nothing can run on DEVICE here; None if it can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    return "no CUDA device" if DEVICE == "cuda" and not torch.cuda.is_available() else None


def exit_code(main: Callable[[], int]) -> int:
    """What `main` returns; 2 with one line on stderr when it cannot run as asked."""
    try:
        return main()
    except BenchmarkError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


def device_arch() -> str:
    """The architecture whose cubins run here, e.g. 'sm_90'."""
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if DEVICE == "cuda" else "sm_90"


def multiprocessors() -> int:
    """Of the device."""
    import torch

    return int(torch.cuda.get_device_properties(0).multi_processor_count) if DEVICE == "cuda" else 4


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_inputs(case: Case, dtype: str, rotated: int = ROTATED_BYTES) -> list[tuple[Any, Any, Any]]:
    """Sets of random q, k, v, enough of them to outgrow the L2 cache: `rotated` bytes, up to 16 sets.

    Shapes are (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) of a varlen case.
    """
    import torch

    kind = getattr(torch, DTYPES[dtype])
    packed = case.lengths is not None
    lead_q, lead_k = ((n,) if packed else (case.batch, n) for n in (case.seqlen_q, case.seqlen_k))
    head_dim, head_dim_v = case.dims
    shapes = (
        (*lead_q, case.heads_q, head_dim),
        (*lead_k, case.heads_kv, head_dim),
        (*lead_k, case.heads_kv, head_dim_v),
    )
    nbytes = 2 * sum(math.prod(shape) for shape in shapes)
    sets = max(2, min(16, -(-rotated // nbytes))) if DEVICE == "cuda" else 2
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Any:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(kind)

    return [(draw(shapes[0]), draw(shapes[1]), draw(shapes[2])) for _ in range(sets)]


def cu_seqlens(lengths: Sequence[int]) -> Any:
    """Where each sequence of a packed array starts, and where the last one ends: int32 on the device."""
    import torch

    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def sdpa(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """The peer: F.scaled_dot_product_attention on (batch, heads, seqlen, head_dim) views of the same data.

    Call it inside `flash_backend()`, so that on a GPU nothing but FlashAttention-2 can serve it.
    """
    import torch.nn.functional as F

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def flash_backend() -> Any:
    """A context manager that forces SDPA's FlashAttention backend; on the CPU, for self-tests, its plain one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION if DEVICE == "cuda" else SDPBackend.MATH)


def relative_error(out: Any, reference: Any) -> float:
    """‖out − reference‖ / ‖reference‖; NaN where either holds one."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def geomean(values: Iterable[float]) -> float:
    """The geometric mean of positive values; NaN for none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


@cache
def environment() -> dict[str, str]:
    """gpu, driver, torch, commit and date, as every result file states them."""
    import torch

    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "none (CPU)"
    return {
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "torch": torch.__version__,
        **stamp(),
    }


def stamp() -> dict[str, str]:
    """commit and date. A copy of the tree on a GPU machine may have no history: CUBINERY_COMMIT says what it is of."""
    return {
        "commit": os.environ.get("CUBINERY_COMMIT") or _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "?",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def result(mode: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """One result file's content. Rows carry case, ours, peer, ratio (> 1: ours is faster), variant, ptx_sha256."""
    return {**environment(), "mode": mode, "rows": list(rows), "geomean": mean_of(rows), **more}


def mean_of(rows: Iterable[Mapping[str, Any]], name: str = "ratio") -> float | None:
    """The geometric mean of a ratio that all rows have; None without rows."""
    mean = geomean(row[name] for row in rows)
    return None if math.isnan(mean) else round(mean, 4)


def write(folder: Path, name: str, value: Mapping[str, Any]) -> Path:
    """Write `<folder>/<name>.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
    return path
