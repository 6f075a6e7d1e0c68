"""README's tables of measurements say what the result files say."""

from __future__ import annotations

import re

import pytest

from tests.project import measured
from tests.project.measured import FILES, MODES, README, TABLES, result

TEXT = README.read_text()
_, OURS, QUOTED = measured.section(TEXT)


@pytest.mark.parametrize("number", range(len(TABLES)), ids=[table.__name__ for table in TABLES])
def test_the_tables_are_those_of_the_result_files(number):
    assert measured.tables_of(OURS)[number] == TABLES[number](), "python -m tests.project.measured rewrites them"


def test_every_table_is_checked():
    assert len(measured.tables_of(OURS)) == len(TABLES)


def test_the_text_says_what_the_grid_was():
    cases = [row["case"].split("/") for row in result("forward.free")["rows"]]
    seqlens = sorted({int(seqlen.removeprefix("S")) for _, seqlen, _ in cases})
    assert f"{len({model for model, _, _ in cases})} models" in OURS
    assert f"seqlen {seqlens[0]} to {seqlens[-1]}" in OURS.replace("\n", " ")


@pytest.mark.parametrize("name", ["forward.sm120", "shapes.sm120"])
def test_occupancy_was_that_of_sm120_as_the_text_says(name):
    launched = result(name)["occupancy"]
    assert launched and not {v: said for v, said in launched.items() if len(set(said.split(" of "))) != 1}


@pytest.mark.parametrize("name", FILES)
def test_the_text_names_machine_and_day_of_every_file(name):
    value = result(name)
    machine = [value[what] for what in ("gpu", "driver", "torch") if what in value]
    said = machine or [f"{value['cpus']} CPU cores", f"Python {value['python']}"]
    for words in (*said, value["date"][:10], f"benchmarks/results/{name}.json"):
        assert words in OURS


def test_no_part_of_the_shapes_failed():
    assert not [(mode, part) for mode in MODES for part, found in result(f"shapes.{mode}").items() if "error" in found]


def test_no_figure_stands_outside_the_checked_tables():
    """Prose about our own run has no decimals but those of versions, which a test above checks."""
    versions = {result("forward.free")[name] for name in ("driver", "torch")} | {result("build")["python"]}
    prose = "\n".join(line for line in OURS.splitlines() if not line.startswith("|"))
    for version in versions:
        prose = prose.replace(version, "")
    assert re.findall(r"\d+\.\d+", prose) == []


def test_what_is_quoted_is_told_from_what_was_run():
    assert "another session" in QUOTED and "not measured side by side" in QUOTED


def test_rewriting_changes_the_rows_of_tables_and_nothing_else(monkeypatch):
    text = (
        "# A\n\n## Measured\n\nsaid\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nsaid\n\n| c |\n|---|\n\n### Quoted\n\n| d |\n"
    )
    monkeypatch.setattr(measured, "TABLES", (lambda: [["3", "4"], ["5", "6"]], lambda: [["7"]]))
    expected = text.replace("| 1 | 2 |", "| 3 | 4 |\n| 5 | 6 |").replace("| c |\n|---|", "| c |\n|---|\n| 7 |")
    assert measured.rewritten(text) == expected
    assert measured.tables_of(measured.section(expected)[1]) == [[["3", "4"], ["5", "6"]], [["7"]]]
