"""benchmarks.against runs a benchmark in two checkouts by turns and says which cells became slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import against

TOY = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("--registry", "--out", "--cases", "--repeats"):
    parser.add_argument(name)
parser.add_argument("--modes", nargs="+")
options = parser.parse_args()
count = pathlib.Path(options.registry)
count.write_text(count.read_text() + "x")
times = json.loads(pathlib.Path(__file__).with_name("times.json").read_text())
for mode in options.modes:
    rows = [{"case": case, "ours": ms[(len(count.read_text()) - 1) % len(ms)]} for case, ms in times[mode].items()]
    (pathlib.Path(options.out) / f"forward.{mode}.json").write_text(json.dumps({"rows": rows}))
raise SystemExit(1)
"""


def checkout(folder: Path, times: dict[str, dict[str, list[float]]]) -> list[str]:
    """A folder whose benchmark of the forward takes these times, round by round; [folder, registry]."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks/__init__.py").touch()
    (folder / "benchmarks/forward.py").write_text(TOY)
    (folder / "benchmarks/times.json").write_text(json.dumps(times))
    (folder / "registry.db").touch()
    return [str(folder), str(folder / "registry.db")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(ours, theirs, *more: str) -> tuple[int, Path]:
        mine, registry = checkout(tmp_path / "ours", ours)
        other, other_registry = checkout(tmp_path / "theirs", theirs)
        monkeypatch.setattr(against, "ROOT", Path(mine))
        monkeypatch.setattr(against.measure, "environment", dict)
        out = tmp_path / "out"
        command = ["forward", "--against", other, "--registry", registry, "--against-registry", other_registry]
        return against.main([*command, "--out", str(out), *more]), out

    return run


def test_the_least_of_each_side_counts(run, capsys):
    free = {"a": [2.0, 1.0], "b": [3.0, 3.06]}
    slow = {"a": [2.0], "b": [2.9]}
    code, out = run({"free": free, "sm120": free}, {"free": {"a": [1.0, 4.0], "b": [3.0]}, "sm120": slow})
    assert code == 1  # b of sm120 is 3 % slower
    rows = {row["case"]: row for row in json.loads((out / "against.forward.free.json").read_text())["rows"]}
    assert rows == {"a": {"case": "a", "ours": 1.0, "theirs": 1.0, "ratio": 1.0},
                    "b": {"case": "b", "ours": 3.0, "theirs": 3.0, "ratio": 1.0}}  # fmt: skip
    said = capsys.readouterr().out
    assert "forward.free: 2 cells, ours / theirs 1.0000, 0 above 1.01" in said
    assert "forward.sm120: 2 cells" in said and "3.0000 ms / 2.9000 ms = 1.0345" in said


def test_each_bar_has_its_own_width(run):
    times = {"free": {"a": [1.03]}}
    assert run(times, {"free": {"a": [1.0]}}, "--modes", "free", "--within", "0.04", "--rounds", "1")[0] == 0


def test_a_benchmark_that_ends_without_results_is_said(run, tmp_path: Path):
    with pytest.raises(SystemExit, match="KeyError: 'sm120'"):
        run({"free": {}}, {"free": {}}, "--modes", "sm120")


def test_a_cell_that_one_checkout_cannot_measure_is_no_cell_that_holds(run, capsys):
    assert run({"free": {"a": [1.0], "b": [1.0]}}, {"free": {"a": [1.0]}}, "--modes", "free")[0] == 1
    assert "measured in one checkout alone: free/b" in capsys.readouterr().err
