"""Issue 6's bars, each at its small or its full size, into one JSON file.

    python -m tests.soak [--full] [--only NAME …] [--jobs N] [--out FILE]

A row: name, bar, command, size, what, passed, tests, figures (what tests have recorded), seconds, date, commit, dirty
(the tree differed from the commit). Rows that --out has of bars that are not run stay. Exits 1 if a bar failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.measure import stamp
from tests.project.shell import ROOT, environment
from tests.soak.bars import BARS


def run(name: str, full: bool) -> dict[str, Any]:
    """One bar's row. What pytest said of a failure is printed."""
    bar, start = BARS[name], time.monotonic()
    tree = {**stamp(), "dirty": dirty()}  # as it is loaded: a commit may come meanwhile
    command = ["python", "-m", "pytest", "-q", *bar.tests]
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
        report = Path(folder) / "report.xml"
        extra = [
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            f"--basetemp={folder}/tmp",
            "-p",
            "no:cacheprovider",
        ]
        size = {"CUBINERY_SOAK": "full"} if full else {}
        done = subprocess.run(
            [sys.executable, *command[1:], *extra], cwd=ROOT, env=environment(**size), capture_output=True, text=True
        )
        found = read(report)
    passed = done.returncode == 0 and found["tests"] > 0
    if not passed:
        print(f"{name}: failed\n{done.stdout}{done.stderr}", file=sys.stderr, flush=True)
    return {
        "name": name,
        "bar": bar.number,
        "command": shlex.join(["CUBINERY_SOAK=full"] * full + command),
        "size": "full" if full else "small",
        "what": bar.full if full else bar.small,
        "passed": passed,
        **found,
        "seconds": round(time.monotonic() - start, 1),
        **tree,
    }


def read(report: Path) -> dict[str, Any]:
    """How many tests ran, which of them were skipped, and the properties that they recorded, of a JUnit file."""
    if not report.is_file():
        return {"tests": 0, "skipped": [], "figures": {}}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    figures = {p.get("name"): p.get("value") for case in cases for p in case.iter("property")}
    return {"tests": len(cases) - len(skipped), "skipped": skipped, "figures": figures}


def dirty() -> bool:
    """Whether tracked or new files differ from the commit; True where there is no git to ask."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return bool(done.returncode or done.stdout.strip())


def keep(out: Path | None, lock: threading.Lock, row: dict[str, Any]) -> None:
    """Put a row in its place in the file at once: a soak that is stopped leaves what was through."""
    with lock:
        verdict = "passed" if row["passed"] else "FAILED"
        print(f"bar {row['bar']} {row['name']:14} {verdict} in {row['seconds']} s: {row['what']}", flush=True)
        if out is None:
            return
        rows = {r["name"]: r for r in json.loads(out.read_text())["rows"]} if out.exists() else {}
        rows[row["name"]] = row
        ordered = [rows[name] for name in BARS if name in rows]
        value = {"python": sys.version.split()[0], "cpus": len(os.sched_getaffinity(0)), "rows": ordered}
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(out)


def main(argv: Sequence[str] | None = None, run: Callable[[str, bool], dict[str, Any]] = run) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the sizes of the bars; without it those of make test")
    parser.add_argument("--only", nargs="+", choices=BARS, default=list(BARS), metavar="NAME", help=", ".join(BARS))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="bars at once")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs: at least 1")
    lock, rows = threading.Lock(), []

    def one(name: str) -> None:
        rows.append(run(name, options.full))
        keep(options.out, lock, rows[-1])

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, [name for name in options.only if not BARS[name].alone]))
    for name in options.only:
        if BARS[name].alone:
            one(name)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
