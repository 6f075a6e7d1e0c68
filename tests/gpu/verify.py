"""Re-prove the whole table on this machine's GPU: conformance tests, then the sanitizers, into one ledger file.

    CUBINERY_REGISTRY=registry.db python -m tests.gpu.verify [--planted planted.db]

pytest runs again, without what is done, when a kernel broke its CUDA context, ended the process or never ended: one bad
variant costs only itself. In pieces: `--stop-after 500 --resume`, again and again while the exit code is 3.
Exit codes: 0 every variant passed every test of its conformance list, 1 a test failed, hung or is missing, 2 nothing
can be verified here, 3 --stop-after ended the run before its last test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks import measure
from benchmarks.cubins import BenchmarkError
from benchmarks.derived import read_index
from builder.verified import FAILS, where
from kernels import dispatch
from registry.contract import CubineryError, Variant
from tests.gpu import ledger, watchdog
from tests.gpu.conftest import LOST, STOPPED, why_not
from tests.gpu.sanitize import ROOT
from tests.gpu.watchdog import HANG_AFTER, SLOWER, UNFINISHED

RESTARTS = 30
TESTS = "tests/gpu"


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    stop_at = time.time() + options.stop_after
    path = Path(os.environ.get("CUBINERY_GPU_RUN") or ledger.new_run())
    try:
        if reason := why_not():
            raise BenchmarkError(reason)
        arch = measure.device_arch()
        artifacts = read_index(Path(os.environ["CUBINERY_REGISTRY"]), arch).artifacts
        ledger.verified_on(path, artifacts)  # a ledger that does not read is told of now, not after the run
    except CubineryError as error:
        print(f"nothing can be verified here: {error}", file=sys.stderr)
        return 2
    os.environ["CUBINERY_GPU_RUN"] = str(path)  # of the processes below too
    codes = [run_pytest(options, path, stop_at)]
    if options.planted and codes != [UNFINISHED]:
        codes.append(run_sanitizers(options, arch, stop_at))
    variants = [variant for variant in dispatch.variants() if variant.op in options.ops]
    verified = ledger.verified_on(path, [a for a in artifacts if Variant.parse(a.variant).op in options.ops])
    lacking = missing(ledger.done(path, artifacts, options.resume), variants, arch)
    if lacking and not options.planted:
        lacking.append("memcheck and racecheck: give --planted FILE (make: PLANTED=FILE); docs/operations.md says how")
    print("\n".join([summary(path), where(verified, [arch]), *lacking]))
    if UNFINISHED in codes:
        print("unfinished: the time was over; go on with --resume")
        return UNFINISHED
    return int(any(codes) or bool(lacking) or any(row["result"] in FAILS for row in ledger.read(path)))


def _parser() -> argparse.ArgumentParser:
    introduction, _, exit_codes = __doc__.partition("Exit codes: ")
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.verify",
        description=introduction.splitlines()[0],
        epilog=f"Under a sanitizer --hang-after counts {SLOWER:g} times. Exit codes: {' '.join(exit_codes.split())}",
        parents=[watchdog.options(HANG_AFTER)],
    )
    parser.add_argument(
        "--planted", type=Path, help="registry file of tests.gpu.plant_race; without it no sanitizers, so exit code 1"
    )
    parser.add_argument("--logs", type=Path, help="folder for the sanitizers' logs")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    return parser


def run_pytest(options: argparse.Namespace, path: Path, stop_at: float) -> int:
    """Start pytest as often as something ends it early. 0, 1 if a test failed, UNFINISHED if the time was over."""
    # An ini file of its own: the project's asks for a newer pytest than a GPU machine may have.
    command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", "."]
    command += [TESTS, *options.pytest]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        running = Path(scratch) / "running.json"
        env = {**os.environ, "CUBINERY_GPU_RUNNING": str(running), "CUBINERY_GPU_STOP_AT": str(stop_at)}
        env |= {"CUBINERY_GPU_OPS": ",".join(options.ops), "CUBINERY_GPU_RESUME": str(int(options.resume))}
        for _ in range(RESTARTS):
            code = watchdog.watch(command, options.hang_after, path, running, cwd=ROOT, env=env)
            if code in (0, STOPPED):
                return UNFINISHED if code else failed
            failed = 1
            if not (settle(path, running, code) or code == LOST):
                return failed
            if time.time() >= stop_at:
                return UNFINISHED
    print(f"pytest was started {RESTARTS} times and did not come to its end", file=sys.stderr)
    return failed


def settle(path: Path, running: Path, code: int | None) -> bool:
    """Record how the test ended in which pytest did: hung, so that it was killed (code None), or dead. False if it was
    in none."""
    result, how = ("hang", "hung") if code is None else ("fail", f"ended with {code}")
    if not running.exists():
        if code is None:
            print("pytest hung outside any conformance test", file=sys.stderr)
        return False
    row = json.loads(running.read_text())
    running.unlink()
    ledger.append(path, {**row, "result": result, "date": ledger.timestamp()})
    print(f"pytest {how} in {row['test']} of {row['variant']}: recorded as {result}", file=sys.stderr)
    return True


def run_sanitizers(options: argparse.Namespace, arch: str, stop_at: float) -> int:
    """The exit code of `tests.gpu.sanitize` over the same variants."""
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--registry", os.environ["CUBINERY_REGISTRY"]]
    command += ["--arch", arch, "--planted", str(options.planted), "--ops", ",".join(options.ops)]
    command += ["--hang-after", str(options.hang_after * SLOWER)]
    command += ["--stop-after", str(max(0.0, stop_at - time.time()))]
    command += ["--resume"] if options.resume else []
    command += ["--logs", str(options.logs)] if options.logs else []
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def summary(path: Path) -> str:
    """A line per test: how many variants passed, which failed."""
    rows = ledger.read(path)
    passed = Counter(row["test"] for row in rows if row["result"] == "pass")
    lines = [f"{path}: {len(rows)} results for {len({row['variant'] for row in rows})} variants"]
    for test in dict.fromkeys(row["test"] for row in rows):
        failed = sorted({_named(row) for row in rows if row["test"] == test and row["result"] in FAILS})
        lines.append(f"  {test:<14} {passed[test]:>3} passed, {len(failed)} failed {' '.join(failed)}".rstrip())
    return "\n".join(lines)


def _named(row: dict[str, str]) -> str:
    return row["variant"] + (" (hang)" if row["result"] == "hang" else "")


def missing(done: set[tuple[str, str]], variants: Iterable[Variant], arch: str) -> list[str]:
    """A line per set of variants that lack the same tests of their conformance lists. done: (variant, test)."""
    variants = list(variants)
    lacking = defaultdict(list)
    for variant in variants:
        tests = ledger.CONFORMANCE["ops"][variant.op]
        lacking[tuple(test for test in tests if (variant.key, test) not in done)].append(variant.key)
    return [
        f"NOT verified on {arch}: {', '.join(tests)} missing for "
        + (f"all {len(variants)} variants" if len(keys) == len(variants) else ", ".join(keys))
        for tests, keys in lacking.items()
        if tests
    ]


if __name__ == "__main__":
    sys.exit(main())
