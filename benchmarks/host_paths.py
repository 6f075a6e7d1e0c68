"""Host time of a warm call along each path, this checkout's beside another's, in one run: host_paths.json.

    python -m benchmarks.host_paths --against ../other --registry ours.db --against-registry theirs.db
    python -m benchmarks.host_paths --against ../other --stand-in          # without a GPU

Both checkouts run in fresh processes, in turn, `--rounds` times; `ratio` is the median of ours over the median of
theirs. Tiny calls: dense, with the LSE, packed, decode with and without append, forward and backward, each alone and
together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_paths", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--against", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--registry", default="", help="registry file of this checkout's kernels")
    parser.add_argument("--against-registry", default="", help="registry file of the other's")
    parser.add_argument("--stand-in", action="store_true", help="toy kernels and a driver that launches nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=200, help="in a series")
    parser.add_argument("--series", type=int, default=15, help="of each path in a round")
    parser.add_argument("--out", type=Path, default=None, help="result file (default: printed only)")
    options = parser.parse_args(argv)
    sides = {"ours": (ROOT, options.registry), "theirs": (options.against.resolve(), options.against_registry)}
    times: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for n in range(options.rounds):
        print(f"round {n + 1}/{options.rounds}", file=sys.stderr)
        for side in sides if n % 2 else reversed(sides):
            for name, ns in _child(*sides[side], options).items():
                times[side].setdefault(name, []).append(ns)
    rows = [_row(name, times["ours"][name], times["theirs"][name]) for name in times["ours"]]
    for row in rows:
        print(f"  {row['case']:<22} ours {row['ours']:7.2f} µs   theirs {row['theirs']:7.2f} µs   {row['ratio']:.3f}x")
    if options.out:
        device = {"device": "stand-in"} if options.stand_in else measure.environment()
        options.out.write_text(json.dumps({**device, "rows": rows}, indent=1) + "\n")
    return 0


def _child(root: Path, registry: str, options: argparse.Namespace) -> dict[str, float]:
    arguments = ["--stand-in"] if options.stand_in else ["--registry", str(Path(registry).resolve())]
    arguments += ["--calls", str(options.calls), "--series", str(options.series)]
    command = [sys.executable, str(Path(__file__).with_name("host_child.py")), *arguments]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{root}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    a, b = statistics.median(ours), statistics.median(theirs)
    return {"case": name, "ours": round(a / 1e3, 2), "theirs": round(b / 1e3, 2), "ratio": round(a / b, 3)}


if __name__ == "__main__":
    sys.exit(main())
