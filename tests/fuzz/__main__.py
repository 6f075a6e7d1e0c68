"""Run one parser on many cases, and report as JSON.

    python -m tests.fuzz TARGET [--engine seeded|atheris] [--cases N] [--seed S] [--keep]

seeded: mutations of the kept corpus, the same in every run. atheris: guided by coverage (pip install atheris); --keep
adds the cases that reach new code to tests/fuzz/corpus. Any error but the parser's typed one ends the run, and its
input is written to the folder that the message names. {"target", "engine", "cases", "accepted", "grown_mib",
"seconds"}: grown_mib is by how much the process has grown at most.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import LONGEST, Mutator

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
NAMES = ("index", "frame", "elf", "channel")
INSTRUMENTED = ["registry.contract", "registry.frames", "runtime.sources.answers"]
RSS_MIB = 512  # that atheris may take, itself included
HANG_S = 10  # that one case may take under atheris


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def corpus(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def found(data: bytes) -> Path:
    """Where the input that broke something is kept."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-")) / "case"
    path.write_bytes(data)
    return path


def seeded(target: str, cases: int, seed: int) -> dict[str, Any]:
    from tests.fuzz.targets import TARGETS

    known, call = corpus(target), TARGETS[target]
    accepted = sum(map(call, known))
    mutator, before = Mutator(known, f"{target} {seed}"), peak_mib()
    for _ in range(cases):
        data = mutator.case()
        try:
            accepted += call(data)
        except BaseException as error:
            raise SystemExit(f"{target}: {error!r} from {found(data)}") from error
    return {"accepted": accepted, "grown_mib": round(peak_mib() - before, 1)}


def atheris(target: str, cases: int, seed: int, keep: bool) -> dict[str, Any]:
    """In a process of its own: libFuzzer ends the one that it runs in."""
    with tempfile.TemporaryDirectory() as new:
        done = _libfuzzer(target, f"-runs={cases}", f"-seed={seed}", new, str(CORPUS / target))
        stats = dict(re.findall(r"^stat::(\w+): +(\d+)", done, re.MULTILINE))
        if keep:
            _libfuzzer(target, "-merge=1", str(CORPUS / target), new)
    start = int(re.findall(r"INITED.* rss: (\d+)Mb", done)[0])
    return {"cases": int(stats["number_of_executed_units"]), "grown_mib": int(stats["peak_rss_mb"]) - start}


def _libfuzzer(target: str, *options: str) -> str:
    """What libFuzzer says; SystemExit if it has found something."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    start = folder / "start"  # libFuzzer merges in children that it starts by argv[0] alone
    start.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.fuzz {target} --inside "$0" "$@"\n')
    start.chmod(0o700)
    limits = [f"-rss_limit_mb={RSS_MIB}", f"-timeout={HANG_S}", f"-max_len={LONGEST}", "-print_final_stats=1"]
    command = [str(start), *limits, f"-artifact_prefix={folder}/", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{target}: found something, see {folder}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    shutil.rmtree(folder)
    return done.stderr


def inside(target: str, command: Sequence[str]) -> None:
    """libFuzzer itself: its argv."""
    import atheris as engine

    with engine.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import TARGETS
    call = TARGETS[target]

    def case(data: bytes) -> None:
        call(data)

    engine.Setup(list(command), case)
    engine.Fuzz()


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    if given[1:2] == ["--inside"]:
        inside(given[0], given[2:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--engine", choices=("seeded", "atheris"), default="seeded")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="with atheris: add to the kept corpus")
    options = parser.parse_args(given)
    if options.engine == "atheris" and not has_atheris():
        parser.error("--engine atheris: pip install atheris")
    report = {"target": options.target, "engine": options.engine, "cases": options.cases}
    start = time.monotonic()
    if options.engine == "seeded":
        report |= seeded(options.target, options.cases, options.seed)
    else:
        report |= atheris(options.target, options.cases, options.seed, options.keep)
    print(json.dumps({**report, "seconds": round(time.monotonic() - start, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
