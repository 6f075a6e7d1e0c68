"""What tests.synthetic_table adds to a clone's table: sound tiles that serve no call, and true statements about PTX."""

from __future__ import annotations

import subprocess
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from kernels.parts import TABLE, part
from kernels.tables import Tiles
from kernels.validity import invalid
from registry.contract import DTYPES
from tests import synthetic_table
from tests.kernels import executed
from tests.project.shell import ROOT
from tests.synthetic_table import OPS

TABLES = {op: Tiles.read(part(op, TABLE).TILES) for op in OPS}
ADDED = list(islice(synthetic_table.candidates(TABLES), 120))


def test_the_tiles_added_are_new_sound_and_of_the_kinds_that_there_are():
    keys = [tile.variant("bf16").key for tile in ADDED]
    own = {tile.variant("bf16") for table in TABLES.values() for tile in table.tiles}
    assert len(set(keys)) == len(keys) == 120 and not {v.key for v in own} & set(keys)
    for tile in ADDED:
        variant, kind = tile.variant("bf16"), synthetic_table.kinds(tile.op)
        assert invalid(variant) is None and kind(variant) in {kind(v) for v in own if v.op == tile.op}


def test_ops_and_head_dims_grow_alike():
    """So that the tenth that a commit picks is a sample like today's."""
    whole = sum(len(table.tiles) for table in TABLES.values())
    for op, table in TABLES.items():
        mine = [tile for tile in ADDED if tile.op == op]
        assert len(mine) == pytest.approx(120 * len(table.tiles) / whole, abs=1)
        times = Counter(tile.dims for tile in mine)
        assert set(times) <= {tile.dims for tile in table.tiles} and len(times) >= min(4, len(mine))


@pytest.mark.parametrize("op", OPS)
def test_no_call_is_served_otherwise(op):
    """The rows of the table stay in their order, and no call has so many entries as the others ask for."""
    mine = [tile for tile in ADDED if tile.op == op]
    table = synthetic_table.enlarged(TABLES[op], mine)
    assert table.problem() is None and len(table.tiles) == len(TABLES[op].tiles) + len(mine)
    before = TABLES[op].rows()
    new = [row for row in table.rows() if row not in before]
    assert len(new) == len(DTYPES) * len(mine) and all(set(synthetic_table.NO_CALL) <= set(row.when) for row in new)
    assert [row for row in table.rows() if row not in new] == before


def test_what_runs_out_of_tiles_ends():
    few = {"bwd": TABLES["bwd"]}
    found = list(synthetic_table.candidates(few))
    assert 8 < len(found) == len({tile.variant("bf16").key for tile in found})


def test_only_a_fresh_clone_is_changed(tmp_path, capsys):
    """Its ledger says more than is true, so this checkout's is never touched."""
    ledger = executed.LEDGER.read_bytes()
    assert "this checkout itself" in said(ROOT, capsys) and "no clone" in said(tmp_path, capsys)
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    (clone / "tests" / "synthetic_table.py").write_text("")
    assert "has changes of its own" in said(clone, capsys)
    assert executed.LEDGER.read_bytes() == ledger


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        synthetic_table.main(["350", str(folder)])
    return capsys.readouterr().err
