"""The bars of forward and backward, and the published figures that one of them is about.

A bar is about the free peer unless its name says that the peer is held: what FlashAttention-2 does on this GPU with all
of its shared memory, which is more than SM120 has. In mode sm120, where ours has SM120's occupancy, the held peer is
the like one, and has to be met at the same figure besides. What was published of FlashAttention-4 is over the free one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cells = dict[str, tuple[int, int]]

# case -> TFLOP/s of (FlashAttention-2 through torch's SDPA, FA4's SM120 kernels), both on one H200.
SOURCE = "facts/kernels.md, Baselines on one H200: {}, bf16, batch x seqlen = 8192"
FA2_FA4: Cells = {
    "llama3-8b/S2048/full": (330, 328),
    "llama3-8b/S2048/causal": (256, 245),
    "llama3-8b/S8192/full": (353, 370),
    "llama3-8b/S8192/causal": (310, 291),
    "llama2-7b/S8192/full": (348, 358),
    "llama2-7b/S8192/causal": (310, 278),
    "qwen2.5-7b/S8192/full": (353, 369),
    "qwen2.5-7b/S8192/causal": (303, 286),
    "hd64/S8192/full": (289, 309),
    "hd64/S8192/causal": (208, 183),
}
BACKWARD_FA2_FA4: Cells = {
    "llama3-8b/S2048/full": (259, 215),
    "llama3-8b/S2048/causal": (214, 184),
    "llama3-8b/S8192/full": (297, 241),
    "llama3-8b/S8192/causal": (276, 228),
    "llama2-7b/S8192/full": (300, 244),
    "llama2-7b/S8192/causal": (278, 234),
    "qwen2.5-7b/S8192/full": (293, 239),
    "qwen2.5-7b/S8192/causal": (272, 225),
    "hd64/S8192/full": (248, 225),
    "hd64/S8192/causal": (192, 186),
}
# mode -> (least geomean of FA2's time over ours, least of any cell or None)
BARS: dict[str, tuple[float, float | None]] = {"sm120": (1.0, None), "free": (1.08, 0.95)}


BACKWARD_BARS = {"sm120": 0.85, "free": 0.95}  # mode -> least geomean over the spine's grid
MAX_DETERMINISTIC = 1.35  # time over the default's


def against_fa4(rows: Sequence[Mapping[str, Any]], published: Cells, what: str) -> dict[str, Any]:
    """ours/FA2 of this run beside FA4/FA2 as published, cell by cell. what: 'forward' or 'backward'."""
    ratios = {row["case"]: row["ratio"] for row in rows}
    cells = [
        {"case": case, "ours_over_fa2": ratios[case], "fa4_over_fa2": round(fa4 / fa2, 4),
         "met": ratios[case] > fa4 / fa2}
        for case, (fa2, fa4) in published.items()
        if case in ratios
    ]  # fmt: skip
    return {"source": SOURCE.format(what), "cells": cells}


def verdicts(mode: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a bar of this mode. A run over a part of the grid is judged by what it has."""
    least, least_cell = BARS[mode]
    found = [*_means(mode, "geomean", value, "geomean", least), _ahead_of_fa4(value)]
    if least_cell is not None and value["rows"]:
        found.append(bar("slowest cell", min(row["ratio"] for row in value["rows"]), least_cell))
    return found


def backward_verdicts(mode: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`verdicts` of the backward: the geomean is over the spine's part of the grid."""
    of_spine = _means(mode, "geomean over the spine's grid", value, "geomean_spine", BACKWARD_BARS[mode])
    found = [*of_spine, _ahead_of_fa4(value)]
    ratios = [row["deterministic_ratio"] for row in value["rows"] if "deterministic_ratio" in row]
    if ratios:
        found.append(at_most("deterministic over default, slowest cell", max(ratios), MAX_DETERMINISTIC))
    return found


def _means(mode: str, title: str, value: Mapping[str, Any], name: str, least: float) -> list[dict[str, Any]]:
    """The bar of a geomean: over the free peer, and in mode sm120 over the held one too."""
    found = [bar(title, value[name] or 0.0, least)]
    return found if mode == "free" else [*found, bar(f"{title}, held peer", value[f"{name}_held"] or 0.0, least)]


def _ahead_of_fa4(value: Mapping[str, Any]) -> dict[str, Any]:
    behind = sum(not cell["met"] for cell in value["against_fa4"]["cells"])
    return {"bar": "every cell ahead of FA4/FA2", "value": behind, "met": behind == 0}


def bar(name: str, value: float, least: float) -> dict[str, Any]:
    return {"bar": f"{name} >= {least}", "value": value, "met": value >= least}


def at_most(name: str, value: float, most: float) -> dict[str, Any]:
    return {"bar": f"{name} <= {most}", "value": value, "met": value <= most}


def line(found: Mapping[str, Any]) -> str:
    return f"  {found['bar']}: {found['value']} {'met' if found['met'] else 'MISSED'}"
