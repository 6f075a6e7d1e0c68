"""What docs/tuning.md says that the tuner measured is what its result files say."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from tests.project.shell import ROOT

Served = tuple[str, str, str]  # head dims, class, tile
CLAIM = re.compile(r"(\d+/\d+) (\w+): (m\S+(?: packed)?) over (m\S+(?: packed)?) (\d\.\d{3})")
CLAIMS = CLAIM.findall((ROOT / "docs/tuning.md").read_text())


@pytest.fixture(scope="module")
def runs() -> list[dict[Served, float]]:
    """Each run's gains over what then served the class: geometric mean of a tile's cases, SM120's occupancy."""
    return [gains(path) for path in (ROOT / "benchmarks/results").glob("tune*.json")]


def gains(path: Path) -> dict[Served, float]:
    found = {}
    for tuned in json.loads(path.read_text())["classes"]:
        for option in tuned["options"]:
            tile = option["tile"] + (" packed" if option["pack"] else "")
            logs = map(math.log, option["gains"]["sm120"].values())
            dims = f"{tuned['head_dim']}/{tuned['head_dim_v']}"
            found[dims, tuned["class"], tile] = math.exp(statistics.fmean(logs))
    return found


def test_every_letter_of_a_tile_has_a_figure():
    text = (ROOT / "docs/tuning.md").read_text()
    axes = text.split("\n## Compile-time axes\n")[1].split("\n## ")[0]
    figures = {line.split("|")[1].strip(): CLAIM.findall(line) for line in axes.splitlines() if line.startswith("|")}
    assert all(figures[letter] for letter in "mnwsqa")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim[0]} {claim[2]} over {claim[3]}")
def test_a_figure_is_that_of_one_run(claim, runs):
    dims, call_class, tile, other, said = claim
    pair = (dims, call_class, tile), (dims, call_class, other)
    measured = [run[pair[0]] / run[pair[1]] for run in runs if run.keys() >= set(pair)]
    assert any(float(said) == pytest.approx(ratio, abs=6e-4) for ratio in measured), measured
