"""What building costs: the whole table for sm_120 into an empty registry, the same again, then sm_90 besides.

    python -m benchmarks.build [--only GLOB] [--jobs N] [--out FOLDER]

CPU seconds are user and system time of the builder with its workers and tools, wall seconds those of the process.
Needs no GPU. Writes build.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.cubins import BenchmarkError

# case, architectures, and the bars: figure -> at most how many seconds
CASES: tuple[tuple[str, tuple[str, ...], dict[str, float]], ...] = (
    ("sm_120, empty registry", ("sm_120",), {"wall_s": 480.0, "cpu_s_per_cubin": 4.0}),  # on 2 cores
    ("sm_120 again", ("sm_120",), {"wall_s": 2.0}),
    ("sm_90 besides", ("sm_120", "sm_90"), {"cpu_s_per_cubin": 0.7}),
)


def run(archs: Sequence[str], registry: Path, flags: Sequence[str]) -> dict[str, Any]:
    """One build, in which a built variant is one new cubin; cpu_s_per_cubin is None where none was made.

    bytes: of all these variants' cubins; registry_bytes: of the file that holds them, compressed, with their PTX.
    BenchmarkError if it fails.
    """
    command = [sys.executable, "-m", "builder", *(f"--arch={arch}" for arch in archs), f"--registry={registry}"]
    started, before = time.perf_counter(), _children_cpu()
    done = subprocess.run([*command, "--json", *flags], cwd=measure.ROOT, capture_output=True, text=True, check=False)
    wall, cpu = time.perf_counter() - started, _children_cpu() - before
    if done.returncode:
        raise BenchmarkError(f"the builder's exit code is {done.returncode}: {done.stderr[-2000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "variants": said["variants"],
        "built": said["built"],
        "bytes": said["bytes"],
        "registry_bytes": registry.stat().st_size,
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "cpu_s_per_cubin": round(cpu / said["built"], 3) if said["built"] else None,
    }


def _children_cpu() -> float:
    """CPU seconds of all processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rows(flags: Sequence[str]) -> list[dict[str, Any]]:
    """One row a case, in a registry of their own."""
    found = []
    with tempfile.TemporaryDirectory(prefix="cubinery-bench-") as folder:
        for case, archs, bars in CASES:
            row = run(archs, Path(folder) / "registry.db", flags)
            found.append({"case": case, **row, "bars": bars})
    return found


def line(row: dict[str, Any]) -> str:
    each = "-" if row["cpu_s_per_cubin"] is None else f"{row['cpu_s_per_cubin']:.2f}"
    verdicts = (f"{name} <= {bar}: {'met' if row[name] <= bar else 'MISSED'}" for name, bar in row["bars"].items())
    return (
        f"{row['case']:24} {row['built']:>4}/{row['variants']:<3} {row['wall_s']:8.2f} {row['cpu_s']:8.2f} {each:>8} "
        f"{row['bytes'] / 1e6:6.2f}  {', '.join(verdicts)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write `build.json`; 1 if the builder failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="GLOB", help="only variants whose key matches, as the builder's --only")
    parser.add_argument("--jobs", type=int, metavar="N", help="the builder's --jobs")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    given = {"--only": options.only, "--jobs": options.jobs}
    try:
        found = rows([f"{name}={value}" for name, value in given.items() if value is not None])
    except BenchmarkError as error:
        print(f"benchmarks.build: {error}", file=sys.stderr)
        return 1
    print(f"{'case':24} {'built':>8} {'wall s':>8} {'CPU s':>8} {'a cubin':>8} {'MB':>6}  bars")
    for row in found:
        print(line(row))
    print(
        measure.write(
            options.out,
            "build",
            {
                **measure.stamp(),
                "python": platform.python_version(),
                "cpus": len(os.sched_getaffinity(0)),
                "rows": found,
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
