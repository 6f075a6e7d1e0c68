"""tests.soak: each bar's tests exist, a failure is one, and what was through before stays in the file."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.project.shell import ROOT
from tests.project.shell import run as shell
from tests.soak import __main__ as soak
from tests.soak.bars import BARS, Bar

FAILING = """
import os
def test_size(record_property):
    record_property("kills", 500)
    assert os.environ.get("CUBINERY_SOAK") == "full"
"""


def test_the_bars_tests_exist():
    assert {bar.number for bar in BARS.values()} == {1, 2, 3, 4, 5, 6}
    for bar in BARS.values():
        for path, _, test in (name.partition("::") for name in bar.tests):
            made = [
                node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
            ]
            assert not test or test in made, f"{path}::{test}"


def fake(name: str, full: bool) -> dict[str, Any]:
    row = {"name": name, "bar": BARS[name].number, "passed": name != "bombs", "seconds": 1.0}
    return {**row, "what": "", "size": "full" if full else "small"}


def test_rows_are_merged_in_order_and_a_failure_is_told(tmp_path: Path, capsys):
    out = tmp_path / "soak.json"
    assert soak.main(["--only", "flips", "--full", "--out", str(out)], fake) == 0
    assert soak.main(["--only", "bombs", "warm_load", "threats", "--out", str(out)], fake) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["flips", "threats", "bombs", "warm_load"]
    assert [row["size"] for row in rows] == ["full", "small", "small", "small"]
    assert "bar 5 bombs          FAILED" in capsys.readouterr().out


def test_what_measures_times_runs_last_and_alone():
    order: list[str] = []
    assert (
        soak.main(["--jobs", "3"], lambda name, full: (order.append(name), {**fake(name, full), "passed": True})[1])
        == 0
    )
    assert sorted(order) == sorted(BARS) and order[-1] == "warm_load"
    for wrong in (["--jobs", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            soak.main(wrong)


def test_a_bar_is_run_at_its_size_and_its_figures_are_kept(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "test_it.py").write_text(FAILING)
    monkeypatch.setitem(BARS, "bombs", Bar(5, (str(tmp_path / "test_it.py"),), "some", "all"))
    row = soak.run("bombs", True)
    assert (row["passed"], row["tests"], row["figures"], row["what"]) == (True, 1, {"kills": "500"}, "all")
    assert row["command"] == f"CUBINERY_SOAK=full python -m pytest -q {tmp_path}/test_it.py" and row["commit"]
    row = soak.run("bombs", False)
    assert not row["passed"] and row["size"] == "small" and "CUBINERY_SOAK" in capsys.readouterr().err
    monkeypatch.setitem(BARS, "bombs", Bar(5, (str(tmp_path / "none.py"),), "", ""))
    assert not soak.run("bombs", False)["passed"]


def test_the_make_target_runs_them_all_at_full_size():
    plan = shell(["make", "--dry-run", "soak"])
    assert plan.rstrip().endswith("-m tests.soak --full --out benchmarks/results/soak.json")


def test_the_kept_result_is_of_every_bar_at_full_size():
    rows = json.loads((ROOT / "benchmarks/results/soak.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(BARS)
    for row in rows:
        assert row["passed"] and row["size"] == "full" and not row["skipped"], row["name"]
