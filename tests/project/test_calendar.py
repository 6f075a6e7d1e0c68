"""No test depends on the day on which it runs. `make ahead` runs them in another year; this costs nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.shell import ROOT

ENDED, ENDLESS = 2020, 9000  # years; a fixed day between them is to come at first, and then has been
# These give the code under test its clock.
OWN_CLOCK = {"tests/benchmarks/test_gpu_ledger.py"}


def days(path: Path) -> Iterator[tuple[int, int]]:
    """(line, year) of every fixed day that a source makes a date or time of."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(year := node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("datetime", "date") and isinstance(year.value, int):
                yield node.lineno, year.value


@pytest.mark.parametrize("room", sorted(path.name for path in (ROOT / "tests").iterdir() if path.is_dir()))
def test_fixed_days_are_long_past_or_never_come(room):
    for path in (ROOT / "tests" / room).rglob("*.py"):
        if str(path.relative_to(ROOT)) not in OWN_CLOCK:
            fixed = [(line, year) for line, year in days(path) if ENDED < year < ENDLESS]
            assert not fixed, f"{path}: (line, year) {fixed}: take the day from the clock, or one that always is past"


def test_fixed_days_are_found(tmp_path):
    (tmp_path / "t.py").write_text("NOW = datetime.datetime(2026, 11, 21, tzinfo=UTC)\nx = date(2031, 1, 1)\nnow()\n")
    assert list(days(tmp_path / "t.py")) == [(1, 2026), (2, 2031)]
