"""The kernels of this checkout beside those of another, by turns in one run: did a change make a cell slower?

    python -m benchmarks.against forward --against ../before --registry now.db --against-registry before.db

Each round runs the benchmark in both checkouts, in alternating order, and every cell's ratio is ours over theirs: the
least over rounds of each side, since whatever disturbs a run makes it longer. Exits 1 where a cell is slower than
`--within` says, or where one checkout has no time for a cell. Results go to `against.<benchmark>.<mode>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.ours import MODES

ROOT = Path(__file__).resolve().parent.parent
WITHIN = {"forward": 0.01, "backward": 0.01, "decode": 0.02}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("benchmark", choices=WITHIN)
    parser.add_argument("--against", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--registry", type=Path, required=True, help="registry file of this checkout's kernels")
    parser.add_argument("--against-registry", type=Path, required=True, help="registry file of the other's")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", default="*", help="glob over case names")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--within", type=float, help="default: 0.01, of decode 0.02")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    sides = {"ours": (ROOT, options.registry), "theirs": (options.against, options.against_registry)}
    times: dict[str, dict[tuple[str, str], list[float]]] = {side: {} for side in sides}
    for n in range(options.rounds):
        for side in sides if n % 2 else reversed(sides):
            print(f"round {n + 1}/{options.rounds}: {side}", file=sys.stderr, flush=True)
            for cell, ms in _run(*sides[side], options).items():
                times[side].setdefault(cell, []).append(ms)
    within = options.within or WITHIN[options.benchmark]
    slower = 0
    if alone := sorted(times["ours"].keys() ^ times["theirs"].keys()):
        print(f"measured in one checkout alone: {', '.join(map('/'.join, alone))}", file=sys.stderr)
        return 1
    for mode in options.modes:
        rows = [_row(case, times["ours"][mode, case], times["theirs"][mode, case])
                for found, case in times["ours"] if found == mode]  # fmt: skip
        mean = measure.geomean(row["ratio"] for row in rows)
        above = sorted((row for row in rows if row["ratio"] > 1 + within), key=lambda row: -row["ratio"])
        slower += len(above)
        name = f"{options.benchmark}.{mode}"
        print(f"{name}: {len(rows)} cells, ours / theirs {mean:.4f}, {len(above)} above {1 + within}")
        for row in above:
            print(f"  {row['case']:<36} {row['ours']:.4f} ms / {row['theirs']:.4f} ms = {row['ratio']:.4f}")
        more = {"mode": mode, "rounds": options.rounds, "rows": rows, "geomean": round(mean, 4)}
        measure.write(options.out, f"against.{name}", {**measure.environment(), **more})
    return 1 if slower else 0


def _run(root: Path, registry: Path, options: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Milliseconds of each (mode, case) of the benchmark in a checkout."""
    root = root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"benchmarks.{options.benchmark}", "--registry", str(registry.resolve())]
        command += ["--out", folder, "--cases", options.cases, "--repeats", str(options.repeats), "--modes"]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run([*command, *options.modes], cwd=root, env={**os.environ, "PYTHONPATH": path},
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        found: dict[tuple[str, str], float] = {}
        for mode in options.modes:  # a missed bar is an exit code other than 0, with results
            path_of = Path(folder) / f"{options.benchmark}.{mode}.json"
            if not path_of.exists():
                sys.exit(f"{root}: benchmarks.{options.benchmark} exited with {done.returncode}: {done.stderr[-2000:]}")
            found |= {(mode, row["case"]): row["ours"] for row in json.loads(path_of.read_text())["rows"]}
        return found


def _row(case: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    a, b = min(ours), min(theirs)
    return {"case": case, "ours": a, "theirs": b, "ratio": round(a / b, 4)}


if __name__ == "__main__":
    sys.exit(main())
