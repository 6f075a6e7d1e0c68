"""Re-prove the whole table on this machine's GPU: conformance tests, then the sanitizers, into one ledger file.

    CUBINERY_REGISTRY=registry.db python -m tests.gpu.verify [--planted planted.db]

pytest runs again, without what is done, when a kernel broke its CUDA context: one bad variant costs only itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.gpu import ledger
from tests.gpu.conftest import LOST, why_not
from tests.gpu.sanitize import ROOT

RESTARTS = 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--planted", type=Path, help="registry file of tests.gpu.plant_race; without it no sanitizers")
    parser.add_argument("--logs", type=Path, help="folder for the sanitizers' logs and report")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args(argv)
    reason = why_not()
    if reason:
        print(f"nothing can be verified here: {reason}", file=sys.stderr)
        return 2
    path = Path(os.environ.setdefault("CUBINERY_GPU_RUN", str(ledger.new_run())))
    codes = [run_pytest(options.pytest)]
    if options.planted:
        command = [sys.executable, "-m", "tests.gpu.sanitize", "--registry", os.environ["CUBINERY_REGISTRY"]]
        command += ["--planted", str(options.planted)]
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            command += ["--logs", str(options.logs), "--report", str(options.logs / "sanitizers.json")]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    print(summary(path))
    return int(any(codes))


def run_pytest(more: list[str]) -> int:
    """pytest's exit code; started again as long as it ends with a lost CUDA context."""
    # An ini file of its own: the project's asks for a newer pytest than a GPU machine may have.
    command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", ".", "tests/gpu", *more]
    worst = 0
    for _ in range(RESTARTS):
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        worst = max(worst, code)
        if code != LOST:
            break
    return worst


def summary(path: Path) -> str:
    """A line per test: how many variants passed, which failed."""
    rows = ledger.read(path)
    passed = Counter(row["test"] for row in rows if row["result"] == "pass")
    lines = [f"{path}: {len(rows)} results for {len({row['variant'] for row in rows})} variants"]
    for test in dict.fromkeys(row["test"] for row in rows):
        failed = sorted({row["variant"] for row in rows if row["test"] == test and row["result"] == "fail"})
        lines.append(f"  {test:<14} {passed[test]:>3} passed, {len(failed)} failed {' '.join(failed)}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
