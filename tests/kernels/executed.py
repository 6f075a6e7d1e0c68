"""What was executed on the CPU before, and need not be again: a ledger like the GPU's.

A record says that every test of a test file passed for a variant: for the PTX that a builder's fingerprint gave, under
the sources of that file and of all that it imports, the interpreter of tests/ptx among them. Another fingerprint, PTX
or source makes a record say nothing. Only a run writes records: `make test-all`.

`make test` executes what has no record, and of the rest each variant that the commit's id picks, a tenth: so every
record is tried again before long, whoever wrote it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from builder.build import Table, plan
from builder.toolchain import Toolchain, closure
from registry.contract import canonical_json, sha256_hex

ROOT = Path(__file__).parents[2]
LEDGER = Path(os.environ.get("CUBINERY_EXECUTED", Path(__file__).with_name("executed.jsonl")))
EVERY = 10  # of variants with records, one is executed all the same


class Record(NamedTuple):
    """variant: its key. module: of the tests. suite: digest of their sources."""

    variant: str
    fingerprint: str
    ptx_sha256: str
    module: str
    suite: str


class Ledger:
    """Records, by what they are asked for."""

    def __init__(self, records: Iterable[Record] = ()):
        self.records = set(records)
        self._ptx = {(r.variant, r.fingerprint): r.ptx_sha256 for r in self.records}
        self._passed = {(r.ptx_sha256, r.module, r.suite) for r in self.records}

    @classmethod
    def read(cls, path: Path = LEDGER) -> Ledger:
        """Raises ValueError, with the line, for what is no record."""
        return cls(_records(path)) if path.exists() else cls()

    def ptx(self, variant: str, fingerprint: str) -> str | None:
        """What a fingerprint gave when it was recorded."""
        return self._ptx.get((variant, fingerprint))

    def has(self, ptx_sha256: str, module: str) -> bool:
        """Whether these tests, as they are now, passed for this PTX."""
        return (ptx_sha256, module, suite(module)) in self._passed

    def write(self, added: Iterable[Record], path: Path = LEDGER) -> None:
        """Records of variants and modules that were executed anew take the place of their old ones."""
        new = set(added)
        anew = {(r.variant, r.module) for r in new}
        kept = {r for r in self.records if (r.variant, r.module) not in anew} | new
        path.write_text("".join(json.dumps(r._asdict()) + "\n" for r in sorted(kept)))


def _records(path: Path) -> Iterator[Record]:
    for n, line in enumerate(path.read_text().splitlines(), 1):
        try:
            value = json.loads(line)
            if {*map(type, value.values())} != {str} or value.keys() != {*Record._fields}:
                raise TypeError
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}:{n}: is no record; remove it, and run `make test-all`") from None
        yield Record(**value)


@cache
def suite(module: str) -> str:
    """Digest of the sources of a test module and all of tests/ that it imports."""
    return sha256_hex(canonical_json(closure([module], packages=("tests",), folder=ROOT)))


@cache
def fingerprints() -> Mapping[str, str]:
    """The builder's, of each variant's PTX."""
    return {job.key: job.ptx_fingerprint for job in plan(Table.ours(), (), Toolchain.current(), None)}


@cache
def commit() -> str:
    """'' where it cannot be told, as in a copy without history or with changes: then every variant is picked."""
    if given := os.environ.get("CUBINERY_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def is_picked(variant: str, of_commit: str) -> bool:
    """Whether a commit tries a variant's records again."""
    return not of_commit or int(sha256_hex(f"{of_commit} {variant}".encode())[:8], 16) % EVERY == 0
