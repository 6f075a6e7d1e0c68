"""Re-prove the whole table on this machine's GPU: conformance tests, then the sanitizers, into one ledger file.

    CUBINERY_REGISTRY=registry.db python -m tests.gpu.verify [--planted planted.db]

pytest runs again, without what is done, when a kernel broke its CUDA context: one bad variant costs only itself.
Exit codes: 0 every variant passed every test of its conformance list, 1 a test failed or is missing, 2 nothing can be
verified here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from kernels import dispatch
from registry.contract import Variant
from tests.gpu import ledger
from tests.gpu.conftest import LOST, why_not
from tests.gpu.sanitize import ROOT

RESTARTS = 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.verify", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--planted", type=Path, help="registry file of tests.gpu.plant_race; without it no sanitizers, so exit code 1"
    )
    parser.add_argument("--logs", type=Path, help="folder for the sanitizers' logs")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args(argv)
    reason = why_not()
    if reason:
        print(f"nothing can be verified here: {reason}", file=sys.stderr)
        return 2
    path = Path(os.environ.get("CUBINERY_GPU_RUN") or ledger.new_run())
    os.environ["CUBINERY_GPU_RUN"] = str(path)  # of the processes below too
    codes = [run_pytest(options.pytest)]
    if options.planted:
        command = [sys.executable, "-m", "tests.gpu.sanitize", "--registry", os.environ["CUBINERY_REGISTRY"]]
        command += ["--planted", str(options.planted)]
        for arch in {row["arch"] for row in ledger.read(path)}:  # one: that of the GPU which pytest has just used
            command += ["--arch", arch]
        if options.logs:
            command += ["--logs", str(options.logs)]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    lacking = missing(path, dispatch.variants())
    if lacking and not options.planted:
        lacking.append("memcheck and racecheck: give --planted FILE (make: PLANTED=FILE); docs/operations.md says how")
    print("\n".join([summary(path), *lacking]))
    return int(any(codes) or bool(lacking))


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


def missing(path: Path, variants: Iterable[Variant]) -> list[str]:
    """A line per set of variants for which the run lacks the same tests of their conformance lists."""
    variants = list(variants)
    ran = {(row["variant"], row["test"]) for row in ledger.read(path)}
    lacking = defaultdict(list)
    for variant in variants:
        tests = ledger.CONFORMANCE["ops"][variant.op]
        lacking[tuple(test for test in tests if (variant.key, test) not in ran)].append(variant.key)
    return [
        f"NOT verified: {', '.join(tests)} missing for "
        + (f"all {len(variants)} variants" if len(keys) == len(variants) else ", ".join(keys))
        for tests, keys in lacking.items()
        if tests
    ]


if __name__ == "__main__":
    sys.exit(main())
