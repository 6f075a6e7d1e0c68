"""README's tables of measurements say what the result files say."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from tests.project.shell import ROOT

RESULTS = ROOT / "benchmarks/results"
SECTION = (ROOT / "README.md").read_text().split("\n## Measured\n")[1].split("\n## ")[0]
OURS, QUOTED = SECTION.split("\n### Quoted\n")


@cache
def result(name: str) -> dict[str, Any]:
    value = json.loads((RESULTS / f"{name}.json").read_text())
    assert isinstance(value, dict)
    return value


def by_case(name: str) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in result(name)["rows"]}


def table_rows(text: str) -> list[list[str]]:
    """The cells of each table line, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i - 1 for i, line in enumerate(lines) if set(line) <= set("|- ")}
    kept = [line for i, line in enumerate(lines) if i not in heads and i - 1 not in heads]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def forward() -> list[list[str]]:
    rows = []
    for mode in ("free", "sm120"):
        value = result(f"forward.{mode}")
        ranked = sorted(value["rows"], key=lambda row: row["ratio"])
        ends = [f"{row['ratio']:.3f} ({row['case']})" for row in (ranked[0], ranked[-1])]
        behind = sum(row["ratio"] < 1 for row in ranked)
        rows.append([f"`{mode}`", f"{value['geomean']:.3f}", *ends, f"{behind} of {len(ranked)}"])
    return rows


def host_time() -> list[list[str]]:
    rows = by_case("host_overhead.free")
    plain = [case for case in rows if not case.endswith(("/lse", "/out"))]
    us = {case: f"{row['ours'] * 1e3:.1f}" for case, row in rows.items()}
    return [[c, us[c], us[f"{c}/lse"], us[f"{c}/out"], f"{rows[c]['peer'] * 1e3:.1f}"] for c in plain]


def cold_start() -> list[list[str]]:
    rows = by_case("cold_start.free")
    named = {"a registry file": "embedded", "the disk cache of a server's kernels": "disk_cache"}
    found = {name: next(row for case, row in rows.items() if case.endswith(f"/{kind}")) for name, kind in named.items()}
    ours = [
        [f"ours, from {name}", *(f"{row[x]:.1f}" for x in ("import", "first", "ours"))] for name, row in found.items()
    ]
    (peer,) = {f"{row['peer']:.1f}" for row in rows.values()}
    return [*ours, ["SDPA, FlashAttention backend", "none", peer, peer]]


def test_the_tables_are_those_of_the_result_files():
    assert table_rows(OURS) == [*forward(), *host_time(), *cold_start()]


def test_occupancy_is_alike_in_both_modes_as_the_text_says():
    free, emulated = (result(f"forward.{mode}")["occupancy"] for mode in ("free", "sm120"))
    assert emulated == {variant: f"{blocks} of {blocks}" for variant, blocks in free.items()}


@pytest.mark.parametrize("name", ["forward.free", "forward.sm120", "host_overhead.free", "cold_start.free"])
def test_the_text_names_machine_and_day_of_every_file(name):
    value = result(name)
    for said in (value["gpu"], value["driver"], value["torch"], value["date"][:10]):
        assert said in OURS
    assert f"benchmarks/results/{name}.json" in OURS


def test_no_figure_stands_outside_the_checked_tables():
    """Prose about our own run has no decimals but those of versions, which the test above checks."""
    versions = {result("forward.free")[name] for name in ("driver", "torch")}
    prose = "\n".join(line for line in OURS.splitlines() if not line.startswith("|"))
    for version in versions:
        prose = prose.replace(version, "")
    assert re.findall(r"\d+\.\d+", prose) == []


def test_what_is_quoted_is_told_from_what_was_run():
    assert "another session" in QUOTED and "not measured side by side" in QUOTED
