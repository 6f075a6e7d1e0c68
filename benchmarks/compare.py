"""Two result files of one benchmark, case by case: was a change faster or slower?

    python -m benchmarks.compare before/forward.free.json after/forward.free.json

Both files must come from one run on one machine. `time` is after over before of our own time; `ratio` is the same of
our time over the peer's, which takes out how fast the device happened to be. Exits 1 if the geomean of a case's two
figures is above 1 + `--within` (default 0.01) for any case.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--within", type=float, default=0.01)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)
    before, after = (_rows(path) for path in (options.before, options.after))
    found = [_row(case, before[case], after[case]) for case in after if case in before]
    if not found:
        print(f"{options.before} and {options.after} have no case in common", file=sys.stderr)
        return 2
    slower = [row for row in found if math.sqrt(row["time"] * row["ratio"]) > 1 + options.within]
    means = {name: math.exp(sum(math.log(row[name]) for row in found) / len(found)) for name in ("time", "ratio")}
    if options.json:
        print(json.dumps({"rows": found, "slower": [row["case"] for row in slower], "geomean": means}))
        return 1 if slower else 0
    for row in sorted(found, key=lambda row: -row["time"])[:10] + slower:
        print(f"  {row['case']:<36} time {row['time']:.4f}   ratio {row['ratio']:.4f}")
    print(f"{len(found)} cases, geomean time {means['time']:.4f}, ratio {means['ratio']:.4f}; {len(slower)} slower")
    return 1 if slower else 0


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads(path.read_text())["rows"]}


def _row(case: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    time = after["ours"] / before["ours"]
    peers = before.get("peer"), after.get("peer")
    return {"case": case, "time": time, "ratio": time * peers[0] / peers[1] if all(peers) else time}


if __name__ == "__main__":
    sys.exit(main())
