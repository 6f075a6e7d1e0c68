"""Candidates are built as the table's variants are, and what cannot be built is named."""

from __future__ import annotations

from benchmarks import candidates, cubins
from kernels.validity import fwd_invalid
from registry.contract import Variant


def test_candidates_are_built_beside_the_table_and_bad_ones_left_out(tmp_path, capsys):
    path, good, bad = tmp_path / "c.db", "fwd-bf16-d64-dv64-m64-n32-w4-s1", "fwd-bf16-d64-dv64-m64-n64-w4-s3"
    assert candidates.main(["--registry", str(path), "--jobs", "1", good, bad]) == 1
    out = capsys.readouterr().out
    assert f"left out: {bad}" in out and "stages" in out and "1 of 2 candidates" in out
    (candidate,) = cubins.read(path, "sm_90")
    assert candidate.key == good and candidate.target_blocks() == candidate.sm120.blocks_per_sm


def test_the_list_is_of_tiles_that_can_be_built():
    for dim, tiles in candidates.TILES.items():
        for tile in tiles.split():
            assert fwd_invalid(Variant.parse(f"fwd-bf16-d{dim}-dv{dim}-{tile}")) is None
