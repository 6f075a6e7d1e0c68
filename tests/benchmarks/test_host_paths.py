"""benchmarks.host_paths measures every path of two checkouts."""

from __future__ import annotations

import json

from benchmarks import host_paths


def test_a_checkout_against_itself(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ("--rounds", "1", "--calls", "20", "--series", "3")
    assert host_paths.main(["--against", str(host_paths.ROOT), "--stand-in", *sizes, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {"dense", "varlen", "decode with append", "backward", "forward and backward"} < {row["case"] for row in rows}
    assert all(0.2 < row["ratio"] < 5 and row["ours"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
