import json
from pathlib import Path

import pytest

from benchmarks import build
from benchmarks.cubins import BenchmarkError
from kernels import dispatch

KEY = next(v.key for v in dispatch.variants() if v.op == "fwd" and v.head_dim == 64)


def test_the_costs_of_one_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--only", KEY, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "build.json").read_text())
    assert found.keys() == {"commit", "date", "python", "cpus", "rows"}
    first, again, other = found["rows"]
    assert [row["built"] for row in found["rows"]] == [1, 0, 1]
    assert again["cpu_s_per_cubin"] is None and list(again["bars"]) == ["wall_s"]
    assert first["bars"]["wall_s"] == 480 and other["bytes"] > first["bytes"] > 10_000
    assert other["registry_bytes"] > 0
    assert first["cpu_s"] > 2 * again["cpu_s"], "the workers' time counts: the parent alone does much the same in both"
    assert again["cpu_s"] < other["cpu_s"] < first["cpu_s"]
    assert "cpu_s_per_cubin <= 4.0: " in capsys.readouterr().out


def test_a_build_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"exit code is 2: .*matches none"):
        build.run(["sm_120"], tmp_path / "r.db", ["--only=no-such-variant"])
