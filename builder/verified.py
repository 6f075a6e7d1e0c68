"""Which PTX the ledger shows as verified, and on which architectures (docs/design.md, 'Verification').

Standard library only: the GPU tests read their ledger with it too.
"""

from __future__ import annotations

import json
from collections import Counter
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
FAILS = ("hang", "fail")
RESULTS = (*FAILS, "pass")  # worst first
Key = tuple[str, str, str]  # ptx_sha256, test, architecture of the cubin that ran


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
    """What the ledger says about each PTX under the current suite, architecture by architecture."""

    conformance: Conformance
    results: Mapping[Key, str]  # → the result of the latest run

    @classmethod
    def read(cls, folder: Path | None = None, ledgers: Iterable[Path] | None = None) -> Verified:
        """Read conformance.json and ledger/*.jsonl of `folder`, by default the checkout's.

        ledgers: folders of runs to read instead of `folder`/ledger. LedgerError names the file and line that does not
        read.
        """
        folder = folder or FOLDER
        conformance = Conformance.read(folder)
        paths = [path for one in ledgers or (folder / "ledger",) for path in sorted(one.glob("*.jsonl"))]
        return cls(conformance, merge(read_run(path, conformance.suite) for path in paths))

    def architectures(self, ptx_sha256: str, op: str) -> list[str]:
        """Where the PTX is verified: the architectures whose latest result of every test of the op is a pass."""
        return [arch for arch, tests in self._by_arch(ptx_sha256, op).items() if set(tests.values()) == {"pass"}]

    def lacking(self, ptx_sha256: str, op: str) -> list[str]:
        """What keeps a PTX from being verified on some architecture and failing on none. Empty when nothing does.

        'test: fail on arch' and 'test: hang on arch' of every architecture; and 'test: never run on arch' of the one
        that lacks least, if no architecture has a pass of every test.
        """
        if not self.conformance.ops.get(op):
            return [f"no conformance tests are listed for op {op}"]
        found = self._by_arch(ptx_sha256, op)
        if not found:
            return [f"{test}: never run" for test in self.conformance.ops[op]]
        bad = [f"{t}: {r} on {arch}" for arch, tests in found.items() for t, r in tests.items() if r in FAILS]
        unrun = {arch: [t for t, r in tests.items() if r == "never run"] for arch, tests in found.items()}
        nearest = min(unrun, key=lambda arch: len(unrun[arch]))
        return bad + [f"{test}: never run on {nearest}" for test in unrun[nearest]]

    def _by_arch(self, ptx_sha256: str, op: str) -> dict[str, dict[str, str]]:
        """Architecture → test → its result, or 'never run', where any test of the op has run."""
        tests = self.conformance.ops.get(op, ())
        archs = sorted({arch for ptx, test, arch in self.results if ptx == ptx_sha256 and test in tests})
        return {a: {t: self.results.get((ptx_sha256, t, a), "never run") for t in tests} for a in archs}


def where(verified: Mapping[str, Iterable[str]], archs: Iterable[str]) -> str:
    """'113 variants verified on sm_90; 0 on sm_120': of variant key → architectures, and 0 for others of `archs`."""
    counts = {**dict.fromkeys(archs, 0), **Counter(arch for found in verified.values() for arch in found)}
    first, *more = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return "; ".join([f"{first[1]} variants verified on {first[0]}", *(f"{count} on {arch}" for arch, count in more)])


def read_run(path: Path, suite: int) -> dict[Key, tuple[str, str]]:
    """One run: key → (date, result) under `suite`. Of a test that ran several times the worst result counts; its date
    is that of its last record."""
    found: dict[Key, tuple[str, str]] = {}
    for record in records(path):
        if record["suite"] != suite:
            continue
        at = record["ptx_sha256"], record["test"], record["arch"]
        date, result = found.get(at, ("", "pass"))
        found[at] = max(date, record["date"]), worst(result, record["result"])
    return found


def worst(*results: str) -> str:
    return min(results, key=RESULTS.index)


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of one run. LedgerError names the file, and the line that is not a result."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LedgerError(f"{path}: {error}") from None
    return [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LedgerError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise LedgerError(f"{where}: not a JSON object with {', '.join(_FIELDS)}")
    if wrong := [name for name, kind in _FIELDS.items() if type(record.get(name)) is not kind]:
        raise LedgerError(f"{where}: {', '.join(wrong)} missing or of the wrong type")
    if record["result"] not in RESULTS:
        raise LedgerError(f"{where}: result {record['result']!r} is none of {', '.join(RESULTS)}")
    return record


def merge(runs: Iterable[Mapping[Key, tuple[str, str]]]) -> dict[Key, str]:
    """Key → the result of the run with the latest date; of equal dates the worst counts."""
    found: dict[Key, tuple[str, str]] = {}
    for run in runs:
        for at, new in run.items():
            old = found.get(at, new)
            found[at] = max(old, new) if old[0] != new[0] else (new[0], worst(old[1], new[1]))
    return {at: result for at, (_, result) in found.items()}
