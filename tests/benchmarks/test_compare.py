"""benchmarks.compare tells what became slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare


def write(path: Path, **ours: float) -> Path:
    rows = [{"case": case, "ours": ms, "peer": 2.0} for case, ms in ours.items()]
    path.write_text(json.dumps({"rows": rows}))
    return path


@pytest.mark.parametrize(("after", "code", "slower"), [(1.009, 0, []), (1.02, 1, ["a"]), (0.5, 0, [])])
def test_a_case_that_became_slower_is_named(tmp_path, capsys, after, code, slower):
    before = write(tmp_path / "before.json", a=1.0, b=2.0, gone=1.0)
    assert compare.main([str(before), str(write(tmp_path / "after.json", a=after, b=2.0, new=9.0)), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["slower"] == slower and [row["case"] for row in found["rows"]] == ["a", "b"]


def test_a_slow_moment_of_the_device_is_no_slower_kernel(tmp_path, capsys):
    before, after = write(tmp_path / "before.json", a=1.0), tmp_path / "after.json"
    after.write_text(json.dumps({"rows": [{"case": "a", "ours": 1.01, "peer": 2.02}]}))
    assert compare.main([str(before), str(after)]) == 0
    assert "0 slower" in capsys.readouterr().out


def test_nothing_in_common_is_an_error(tmp_path):
    assert compare.main([str(write(tmp_path / "a.json", a=1.0)), str(write(tmp_path / "b.json", b=1.0))]) == 2
