"""Which PTX the ledger shows as verified (docs/design.md, 'Verification'). Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import ROOT
from builder.errors import LedgerError

FOLDER = ROOT / "tests" / "gpu"
_FIELDS = {
    "ptx_sha256": str,
    "variant": str,
    "arch": str,
    "test": str,
    "suite": int,
    "result": str,
    "gpu": str,
    "driver": str,
    "date": str,
}


@dataclass(frozen=True)
class Conformance:
    """The current suite: its number and each op's tests."""

    suite: int
    ops: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path | None = None) -> Conformance:
        """Read conformance.json of `folder`, by default the checkout's.

        LedgerError if it is missing or not `{"suite": N, "ops": {op: [test names]}}`.
        """
        path = (folder or FOLDER) / "conformance.json"
        try:
            value = json.loads(path.read_bytes())
            suite, ops = value["suite"], {op: tuple(tests) for op, tests in value["ops"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(f'{path}: not {{"suite": N, "ops": {{op: [test names]}}}}: {error!r}') from None
        names = [name for tests in ops.values() for name in tests]
        if type(suite) is not int or not all(isinstance(name, str) for name in names):
            raise LedgerError(f"{path}: suite {suite!r} must be an integer and every test name a string")
        return cls(suite, ops)


@dataclass(frozen=True)
class Verified:
    """What the ledger says about each PTX under the current suite."""

    conformance: Conformance
    results: Mapping[tuple[str, str], str]  # (ptx_sha256, test) → the result of its latest run

    @classmethod
    def read(cls, folder: Path | None = None) -> Verified:
        """Read conformance.json and ledger/*.jsonl of `folder`, by default the checkout's.

        LedgerError names the file and line that does not read.
        """
        folder = folder or FOLDER
        conformance = Conformance.read(folder)
        runs = [read_run(path, conformance.suite) for path in sorted(folder.glob("ledger/*.jsonl"))]
        return cls(conformance, merge(runs))

    def lacking(self, ptx_sha256: str, op: str) -> list[str]:
        """What keeps a PTX from being verified: 'test: fail' or 'test: never run'. Empty when it is verified."""
        tests = self.conformance.ops.get(op, ())
        if not tests:
            return [f"no conformance tests are listed for op {op}"]
        found = {test: self.results.get((ptx_sha256, test), "never run") for test in tests}
        return [f"{test}: {result}" for test, result in found.items() if result != "pass"]


def read_run(path: Path, suite: int) -> dict[tuple[str, str], tuple[str, str]]:
    """One run: (ptx_sha256, test) → (date, result) under `suite`. A test that ran several times passed if it always
    did; its date is that of its last record."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        record = _record(line, f"{path}:{number}")
        if record["suite"] != suite:
            continue
        at = record["ptx_sha256"], record["test"]
        date, result = found.get(at, ("", "pass"))
        found[at] = max(date, record["date"]), min(result, record["result"])  # 'fail' < 'pass'
    return found


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LedgerError(f"{where}: not JSON: {error}") from None
    wrong = [n for n, kind in _FIELDS.items() if not isinstance(record, dict) or type(record.get(n)) is not kind]
    if wrong or record["result"] not in ("pass", "fail"):
        raise LedgerError(f"{where}: {', '.join(wrong) or 'result'} is missing or of the wrong type or value")
    return dict(record)


def merge(runs: Iterable[Mapping[tuple[str, str], tuple[str, str]]]) -> dict[tuple[str, str], str]:
    """(ptx_sha256, test) → the result of the run with the latest date; of equal dates a fail counts."""
    found: dict[tuple[str, str], tuple[str, bool]] = {}
    for run in runs:
        for at, (date, result) in run.items():
            found[at] = max(found.get(at, ("", False)), (date, result == "fail"))
    return {at: "fail" if failed else "pass" for at, (_, failed) in found.items()}
