"""The record of what ran on hardware: tests/gpu/ledger/<run>.jsonl, one new file a run, one object a line.

A run is named by its UTC time and GPU, `2026-11-21T0538-h200`; beside its rows lies `<run>.sanitizers.json`, what
compute-sanitizer saw (`sanitize`).

On which architectures a variant is verified, `builder.verified` finds in these files. A result is 'pass', 'fail' or
'hang', which is a fail.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from builder import verified

HERE = Path(__file__).resolve().parent
CONFORMANCE = json.loads((HERE / "conformance.json").read_text())


def folder() -> Path:
    """CUBINERY_LEDGER_DIR, or the checkout's own."""
    return Path(os.environ.get("CUBINERY_LEDGER_DIR") or HERE / "ledger")


def new_run() -> Path:
    """`<UTC date>T<HHMM>-<gpu>.jsonl`, with -2, -3, … behind it while that is taken; nothing is created."""
    name = f"{_now():%Y-%m-%dT%H%M}-{slug(_smi('name'))}"
    paths = (folder() / f"{name}{f'-{n}' if n > 1 else ''}.jsonl" for n in count(1))
    return next(path for path in paths if not path.exists())


def slug(gpu: str) -> str:
    """A GPU's name for a file name: 'NVIDIA GeForce RTX 5090' is 'geforce-rtx-5090'."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def sanitizers_report(run: Path) -> Path:
    """Where the sanitizers' report on a run belongs; one that goes on has further ones, -part2, -part3, …"""
    parts = (f"-part{n}" if n > 1 else "" for n in count(1))
    paths = (run.with_name(f"{run.stem}{part}.sanitizers.json") for part in parts)
    return next(path for path in paths if not path.exists())


class Ledger:
    """Appends results to one run's file; every row is on disk when `add` returns."""

    def __init__(self, path: Path, gpu: str, driver: str):
        self.path, self.gpu, self.driver = path, gpu, driver

    def add(self, artifact: Any, test: str, result: str) -> None:
        """One row, as `row` makes it."""
        append(self.path, self.row(artifact, test, result))

    def row(self, artifact: Any, test: str, result: str) -> dict[str, Any]:
        """test: a name of the op's conformance list; result: 'pass', 'fail' or 'hang'; anything else is a
        ValueError."""
        names = CONFORMANCE["ops"][artifact.variant.split("-")[0]]
        if test not in names:
            raise ValueError(f"test: {test!r} is none of {', '.join(names)}")
        if result not in verified.RESULTS:
            raise ValueError(f"result: {result!r} is none of {', '.join(verified.RESULTS)}")
        return {
            "ptx_sha256": artifact.ptx_sha256,
            "variant": artifact.variant,
            "arch": artifact.arch,
            "test": test,
            "suite": CONFORMANCE["suite"],
            "result": result,
            "gpu": self.gpu,
            "driver": self.driver,
            "date": timestamp(),
        }


def append(path: Path, row: dict[str, Any]) -> None:
    """One row more of a run; its file is created if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of one run; none if the file does not exist yet. LedgerError names a line that is not a row."""
    return verified.records(path) if path.exists() else []


def done(run: Path, artifacts: Iterable[Any], resume: bool) -> set[tuple[str, str]]:
    """(variant, test) that need not run: those of this run, however they ended; and with `resume` those that are
    passed by the latest run of the ledger, for the same PTX, suite and architecture."""
    suite = CONFORMANCE["suite"]
    found = set(verified.read_run(run, suite)) if run.exists() else set()
    if resume:
        found |= {at for at, result in _whole(run).results.items() if result == "pass"}
    return {
        (a.variant, test)
        for a in artifacts
        for test in CONFORMANCE["ops"][a.variant.split("-")[0]]
        if (a.ptx_sha256, test, a.arch) in found
    }


def verified_on(run: Path, artifacts: Iterable[Any]) -> dict[str, list[str]]:
    """Variant → the architectures on which the whole ledger, this run included, shows its PTX as verified."""
    whole = _whole(run)
    return {a.variant: whole.architectures(a.ptx_sha256, a.variant.split("-")[0]) for a in artifacts}


def _whole(run: Path) -> verified.Verified:
    return verified.Verified.read(HERE, {HERE / "ledger", folder(), run.parent})


def driver_version() -> str:
    """The driver's version as nvidia-smi states it."""
    return _smi("driver_version")


def _smi(field: str) -> str:
    """What nvidia-smi states of the first GPU; 'unknown' where it does not."""
    command = ("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def timestamp() -> str:
    """Now, as rows state it."""
    return f"{_now():%Y-%m-%dT%H:%M:%SZ}"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
