"""The record of what ran on hardware: tests/gpu/ledger/<run>.jsonl, one new file a run, one object a line.

A run is named by its UTC time and GPU, `2026-11-21T0538-h200`; beside its rows lies `<run>.sanitizers.json`, what
compute-sanitizer saw (`sanitize`).

A variant is verified when, for its PTX hash and the current suite, every test of its op's conformance list has passed
and none has failed later: `builder.verified` reads these files.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

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
    """Where the sanitizers' report on a run belongs."""
    return run.with_suffix(".sanitizers.json")


class Ledger:
    """Appends results to one run's file; every row is on disk when `add` returns."""

    def __init__(self, path: Path, gpu: str, driver: str):
        self.path, self.gpu, self.driver = path, gpu, driver

    def add(self, artifact: Any, test: str, passed: bool) -> None:
        """One row. test: a name of the op's conformance list; anything else is a ValueError."""
        names = CONFORMANCE["ops"][artifact.variant.split("-")[0]]
        if test not in names:
            raise ValueError(f"test: {test!r} is none of {', '.join(names)}")
        row = {
            "ptx_sha256": artifact.ptx_sha256,
            "variant": artifact.variant,
            "arch": artifact.arch,
            "test": test,
            "suite": CONFORMANCE["suite"],
            "result": "pass" if passed else "fail",
            "gpu": self.gpu,
            "driver": self.driver,
            "date": f"{_now():%Y-%m-%dT%H:%M:%SZ}",
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of one run; none if the file does not exist yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
