"""README's tables of measurements, from the result files.

    python -m tests.project.measured        # rewrites the tables of README's section Measured

The section's tables, but for those under Quoted, are those of TABLES, in this order; headings and prose stay.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tests.project.shell import ROOT

RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
MODES = ("free", "sm120")
PEERS = (("free", "ratio"), ("sm120", "ratio"), ("sm120", "ratio_held"))  # mode and the peer whose time is over ours
FILES = (
    *(f"{name}.{mode}" for name in ("forward", "backward", "shapes", "decode") for mode in MODES),
    *("training.free", "build", "host_overhead.free", "cold_start.free"),
)
LARGE = 25_000  # artifacts of the large index that benchmarks.cold_start makes up
Rows = list[list[str]]


@cache
def result(name: str) -> dict[str, Any]:
    value = json.loads((RESULTS / f"{name}.json").read_text())
    assert isinstance(value, dict)
    return value


def by_case(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {row["case"]: row for row in rows}
    return found


def shapes(part: str) -> dict[str, dict[str, dict[str, Any]]]:
    """mode -> case -> row of one part of shapes.*.json."""
    return {mode: by_case(result(f"shapes.{mode}")[part]["rows"]) for mode in MODES}


# ---- the tables ----


def forward() -> Rows:
    return [against_sdpa(mode, result(f"forward.{mode}")) for mode in MODES]


def against_sdpa(mode: str, value: dict[str, Any]) -> list[str]:
    ranked = sorted(value["rows"], key=lambda row: row["ratio"])
    ends = [f"{row['ratio']:.3f} ({row['case']})" for row in (ranked[0], ranked[-1])]
    cells = value["against_fa4"]["cells"]
    counts = [(sum(row["ratio"] < 1 for row in ranked), ranked), (sum(cell["met"] for cell in cells), cells)]
    return [f"`{mode}`", *means(value, "geomean"), *ends, *(f"{n} of {len(all_)}" for n, all_ in counts)]


def means(value: dict[str, Any], name: str) -> list[str]:
    """A geomean over the free peer, and over the held one, which older files do not have."""
    return [f"{value[name]:.3f}", ratio_or_dash(value.get(f"{name}_held"))]


def ratio_or_dash(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"


def backward() -> Rows:
    """The forward's columns, the geomeans of the 40 cells beside those of all, and the price of determinism."""
    rows = []
    for mode in MODES:
        value = result(f"backward.{mode}")
        named, free, held, *rest = against_sdpa(mode, value)
        ordered = max(row["deterministic_ratio"] for row in value["rows"] if "deterministic_ratio" in row)
        rows.append([named, free, held, *means(value, "geomean_spine"), *rest, f"{ordered:.2f}"])
    return rows


def models(name: str = "forward") -> Rows:
    """Each model's geomean, full and causal apart: over the free peer in both modes, over the held one in sm120."""
    columns = [(mode, peer, mask) for mode, peer in PEERS for mask in ("full", "causal")]
    ratios: dict[str, dict[tuple[str, str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for mode, peer in PEERS:
        for row in result(f"{name}.{mode}")["rows"]:
            model, _, mask = row["case"].split("/")
            ratios[model][mode, peer, mask] += [row[peer]] if peer in row else []
    return [[model, *(ratio_or_dash(geomean(found[c])) for c in columns)] for model, found in ratios.items()]


def geomean(ratios: list[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def backward_models() -> Rows:
    return models("backward")


def training() -> Rows:
    """What our attention and FlashAttention-2 make of the loss and of the memory, and two runs of the reference."""
    value = result("training.free")
    named = {"ours": "ours", "flash": "SDPA, FlashAttention-2", "reference_again": "fp32 attention, run again"}
    rows = []
    for name, title in named.items():
        peak = value["memory"][name.removesuffix("_again")]
        losses = [f"{value['deviation'][name][kind] * 1e3:.2f}" for kind in ("mean", "max")]
        rows.append([title, *losses, f"{peak / 1e6:.1f}"])
    return rows


def factors() -> Rows:
    """Time over what the work should take: windows, and packed sequences, with the same padded to the longest."""
    rows = []
    for part in ("window", "varlen"):
        bars = {
            bar["bar"].split(" factor <= ")[0]: bar["bar"].split("<= ")[1]
            for bar in result("shapes.free")[part]["bars"]
        }
        found = shapes(part)
        for case in found["free"]:
            both = [found[mode][case] for mode in MODES]
            padded = [f"{row['padded'] / row['ours']:.2f}" if "padded" in row else "–" for row in both]
            rows.append([case, bars.get(case, "–"), *(f"{row['factor']:.2f}" for row in both), *padded])
    return rows


def asymmetric() -> Rows:
    found = shapes("asymmetric")
    rows = []
    for case in found["free"]:
        both = [found[mode][case] for mode in MODES]
        speeds = [f"{row['tflops']:.0f}" for row in both]
        rows.append([case, *speeds, *("not served" if row["peer"] is None else f"{row['ratio']:.3f}" for row in both)])
    return rows


def packing() -> Rows:
    found = shapes("pack")
    return [
        [case, "together" if row["pack"] else "apart", *(f"{found[mode][case]['gain']:.3f}" for mode in MODES)]
        for case, row in found["free"].items()
    ]


def decode() -> Rows:
    """A size a row: bf16 pages of 16, and what an e4m3 cache of the same pages makes of it."""
    found = {mode: by_case(result(f"decode.{mode}")["rows"]) for mode in MODES}
    rows = []
    for size in dict.fromkeys(case.split("/")[0] for case in found["free"]):
        low, narrow = ([found[mode][f"{size}/page16/{kv}"] for mode in MODES] for kv in ("bf16", "e4m3"))
        shares = [f"{100 * row['share']:.1f} %" for row in low]
        peers = [f"{low[0]['ratio']:.2f}", f"{low[1]['ratio']:.2f}", f"{low[0]['ratio_cudnn']:.2f}"]
        more = [f"{low[0]['over_contiguous']:.3f}", *(f"{row['over_bf16']:.2f}" for row in narrow)]
        rows.append([size.replace("x", " × "), *shares, *peers, *more])
    return rows


def build() -> Rows:
    rows = []
    for row in result("build")["rows"]:
        each = row["cpu_s_per_cubin"]
        sizes = [f"{row[name] / 1e6:.2f}" for name in ("bytes", "registry_bytes")]
        times = [f"{row['wall_s']:.1f}", "–" if each is None else f"{each:.2f}"]
        rows.append([row["case"], str(row["variants"]), str(row["built"]), *sizes, *times])
    return rows


def host_time() -> Rows:
    rows = by_case(result("host_overhead.free")["rows"])
    plain = [case for case in rows if not case.endswith(("/lse", "/out", "/backward"))]
    us = {case: f"{row['ours'] * 1e3:.1f}" for case, row in rows.items()}
    return [[c, us[c], us[f"{c}/lse"], us[f"{c}/out"], f"{rows[c]['peer'] * 1e3:.1f}"] for c in plain]


def host_backward() -> Rows:
    rows = [row for row in result("host_overhead.free")["rows"] if row["case"].endswith("/backward")]
    names = ("ours", "peer", "both_ours", "both_peer")
    return [[row["case"].removesuffix("/backward"), *(f"{row[name] * 1e3:.0f}" for name in names)] for row in rows]


def cold_start() -> Rows:
    """With each release of the bindings that was measured; a dash in what older files do not have."""
    rows: Rows = []
    for name in ("cold_start.free", "again/cold_start.free"):
        if (RESULTS / f"{name}.json").exists():
            rows += _cold_start(result(name))
    return rows


def _cold_start(value: dict[str, Any]) -> Rows:
    rows = {row["case"].rpartition("/")[2]: row for row in value["rows"]}
    named = {"a registry file": "embedded", "the disk cache of a server's kernels": "disk_cache"}
    large = {f"{name}, {LARGE:,} artifacts": f"{kind}_{LARGE}" for name, kind in named.items()}
    parts = ("import", "first", "ours")
    version = f", {value['bindings_version']}" if "bindings_version" in value else ""
    ours = [
        [f"ours, from {name}{version}", *(f"{rows[kind][part]:.1f}" if kind in rows else "–" for part in parts)]
        for name, kind in (named | large).items()
    ]
    bindings = f"{rows['embedded']['bindings']:.1f}" if "bindings" in rows["embedded"] else "–"
    (peer,) = {f"{row['peer']:.1f}" for row in rows.values()}
    return [
        *ours,
        [f"`import cuda.bindings.driver` alone{version}", bindings, "none", bindings],
        [f"SDPA, FlashAttention backend{version and ', the same run'}", "none", peer, peer],
    ]


def first_backward() -> Rows:
    value = result("cold_start.free")
    rows = {row["case"].rpartition("/")[2]: row for row in value["rows"]}
    found = [("ours, from a registry file", rows["embedded"]), ("ours, from the disk cache", rows["disk_cache"])]
    ours = [[name, *(f"{row[part]:.1f}" for part in ("autograd", "backward"))] for name, row in found]
    peer = [f"{value['backward'][part]:.1f}" for part in ("peer_autograd", "peer")]
    whole = f"{value['backward']['whole']:.1f}"
    return [*ours, ["SDPA, FlashAttention backend", *peer], ["ours, from the disk cache, both at once", "–", whole]]


TABLES: tuple[Callable[[], Rows], ...] = (
    *(forward, models, backward, backward_models, training, factors, asymmetric, packing, decode),
    *(build, host_time, host_backward, cold_start, first_backward),
)


# ---- README ----


def section(text: str) -> tuple[str, str, str]:
    """(what comes before, our measurements, what comes after, from Quoted on)."""
    before, rest = text.split("\n## Measured\n")
    ours, after = rest.split("\n### Quoted\n")
    return before + "\n## Measured\n", ours, "\n### Quoted\n" + after


def tables_of(text: str) -> list[Rows]:
    """The cells of each table, heading and rule left out."""
    found: list[Rows] = []
    for block in _blocks(text):
        if isinstance(block, list):
            found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in block[2:]])
    return found


def rewritten(text: str) -> str:
    """README with the tables of the result files."""
    before, ours, after = section(text)
    made = iter(TABLES)
    blocks = []
    for block in _blocks(ours):
        if isinstance(block, list):
            block = "\n".join([*block[:2], *(f"| {' | '.join(row)} |" for row in next(made)())])
        blocks.append(block)
    assert next(made, None) is None, "README has fewer tables than there are results"
    return before + "\n".join(blocks) + after


def _blocks(text: str) -> list[str | list[str]]:
    """The text's lines; those of a table, together in a list."""
    found: list[str | list[str]] = []
    inside = False
    for line in text.split("\n"):
        if line.startswith("|") and inside:
            table = found[-1]
            assert isinstance(table, list)
            table.append(line)
        else:
            found.append([line] if line.startswith("|") else line)
        inside = line.startswith("|")
    return found


def main(path: Path = README) -> int:
    path.write_text(rewritten(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
