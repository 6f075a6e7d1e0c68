"""python -m builder accept: what enters the dispatch table, what stays, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from builder import accept
from builder.__main__ import main
from builder.accept import Choice, serving
from builder.build import Table
from builder.errors import ResultsError
from kernels.fwd import table as fwd
from kernels.tables import Tile, Tiles
from registry.contract import Condition, Variant, sha256_hex
from tests.builder import toys

CLASSES = {
    "packed_decode": (Condition("group", ">=", 2), Condition("packed_rows", "<=", 64)),
    "short": (Condition("seqlen_q", "<=", 64),),
    "packed": (Condition("group", ">=", 2),),
    "default": (),
}
DIMS = (128, 128)
SHORT, LONG, RIVAL = "m64-n64-w4-s1", "m128-n32-w4-s1", "m64-n32-w4-s2"
TILES = Tiles(
    CLASSES,
    (Tile(DIMS, "short", SHORT, False), Tile(DIMS, "default", LONG, False)),
)
FACTS = {
    "packed_decode": {"group": 4, "packed_rows": 4, "seqlen_q": 1},
    "short": {"group": 1, "packed_rows": 64, "seqlen_q": 64},
    "packed": {"group": 4, "packed_rows": 4096, "seqlen_q": 1024},
    "default": {"group": 1, "packed_rows": 1024, "seqlen_q": 1024},
}
ORIGIN = {"gpu": "H200", "date": "2026-11-21T00:00:00Z"}


def ptx(tile: str) -> str:
    key = f"fwd-bf16-d{DIMS[0]}-dv{DIMS[1]}-{tile}"
    return sha256_hex(toys.ptx("toy_" + key.replace("-", "_"), n=Variant.parse(key).size("n")).encode())


def stated(tile: str, pack: bool = False) -> dict[str, Any]:
    return {"tile": tile, "pack": pack, "ptx_sha256": ptx(tile)}


def measured(tile: str, gain: float | Mapping[str, float], *, pack: bool = False, runs: int = 3,
             excluded: str | None = None, free: float = 1.5, cases: int = 2) -> dict[str, Any]:  # fmt: skip
    gains = {"sm120": dict.fromkeys(names(cases), gain), "free": dict.fromkeys(names(cases), free)}
    return {**stated(tile, pack), "gains": gains, "runs": runs, "excluded": excluded}


def names(count: int) -> list[str]:
    return [f"case{i}" for i in range(count)]


def entry(call_class: str, incumbent: str, *options: dict[str, Any], cases: int = 2) -> dict[str, Any]:
    listed = [{"case": name, "facts": FACTS[call_class], "incumbent": stated(incumbent)} for name in names(cases)]
    return {"head_dim": 128, "head_dim_v": 128, "class": call_class, "cases": listed, "options": list(options)}


def result(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"tuning": 1, "op": "fwd", **ORIGIN, "classes": list(entries), "failed": [], "measurements": []}


def decided(tmp_path: Path, *entries: dict[str, Any], tiles: Tiles = TILES) -> tuple[Tiles, str]:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result(*entries)))
    origin, found = accept.read(path)
    accept.check_table(tiles, found)
    changed, lines = accept.decide(tiles, found, origin)
    return changed, "\n".join(lines)


def choices(tiles: Tiles) -> dict[str, Choice]:
    return {t.call_class: Choice(t.tile, t.pack) for t in tiles.tiles}


def test_a_gain_of_two_percent_replaces_with_the_evidence(tmp_path: Path) -> None:
    changed, said = decided(tmp_path, entry("default", LONG, measured(RIVAL, 1.02), measured(SHORT, 1.01)))
    assert choices(changed) == {"short": (SHORT, False), "default": (RIVAL, False)}
    assert changed.tiles[-1].evidence == {
        "sm120": 1.02, "free": 1.5, "over": LONG, "ptx_sha256": ptx(RIVAL), **ORIGIN
    }  # fmt: skip
    assert f"128/128 default: {RIVAL} replaces {LONG}: +2.0 % (free +50.0 %)" in said


def test_less_than_that_keeps_the_incumbent_and_says_why(tmp_path: Path) -> None:
    changed, said = decided(tmp_path, entry("default", LONG, measured(RIVAL, 1.0199, free=2.0)))
    assert choices(changed) == choices(TILES)
    assert f"{LONG} stays: {RIVAL} is at +2.0 %, +2.0 % is needed" in said
    kept = changed.tiles[-1].evidence
    assert kept is not None and (kept["sm120"], kept["free"], kept["over"]) == (0.98, 0.5, RIVAL)
    assert kept["ptx_sha256"] == ptx(LONG)


def test_the_mode_that_decides_is_sm120_over_all_cases_of_the_class(tmp_path: Path) -> None:
    mixed = measured(RIVAL, 1.0)
    mixed["gains"]["sm120"] = {"case0": 1.2, "case1": 0.85}
    changed, _ = decided(tmp_path, entry("default", LONG, mixed))
    assert choices(changed) == choices(TILES), "a geomean of 1.01"


@pytest.mark.parametrize("fault", [{"runs": 2}, {"excluded": "its 3 runs differ by 12%"}])
def test_what_was_not_measured_well_never_enters(fault: dict[str, Any], tmp_path: Path) -> None:
    changed, said = decided(tmp_path, entry("default", LONG, measured(RIVAL, 1.3, **fault)))
    assert changed == TILES and "stays: no other was measured well enough" in said
    assert str(fault.get("excluded", "")) in said


def test_a_class_without_a_tile_of_its_own_gets_one_only_if_that_pays(tmp_path: Path) -> None:
    changed, _ = decided(tmp_path, entry("packed", LONG, measured(LONG, 1.04, pack=True)))
    assert choices(changed) == {**choices(TILES), "packed": (LONG, True)}
    assert [t.call_class for t in changed.tiles] == ["short", "packed", "default"]
    same, _ = decided(tmp_path, entry("packed", LONG, measured(LONG, 1.01, pack=True)))
    assert same == TILES


def test_a_class_follows_the_later_one_that_serves_it(tmp_path: Path) -> None:
    """`packed` is served by `default`, which changes: what was best for it is compared with the new tile."""
    new = measured(RIVAL, 1.05)
    changed, said = decided(tmp_path, entry("packed", LONG, new), entry("default", LONG, new))
    assert choices(changed) == {"short": (SHORT, False), "default": (RIVAL, False)}
    assert said.index("128/128 default") < said.index("128/128 packed")


def test_a_class_that_would_lose_by_following_keeps_what_it_had(tmp_path: Path) -> None:
    changed, _ = decided(
        tmp_path, entry("packed", LONG, measured(RIVAL, 0.9)), entry("default", LONG, measured(RIVAL, 1.05))
    )
    assert choices(changed)["packed"] == (LONG, False) and choices(changed)["default"] == (RIVAL, False)
    unmeasured, said = decided(
        tmp_path, entry("packed", LONG, measured(SHORT, 0.9)), entry("default", LONG, measured(RIVAL, 1.05))
    )
    assert choices(unmeasured)["packed"] == (LONG, False) and "which was not measured here" in said


def test_the_outcome_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    entries = [
        entry("packed_decode", SHORT, measured(RIVAL, 1.1, pack=True)),
        entry("short", SHORT, measured(RIVAL, 1.03)),
        entry("packed", LONG, measured(LONG, 1.03, pack=True)),
        entry("default", LONG, measured(RIVAL, 1.01)),
    ]
    there, here = decided(tmp_path, *entries), decided(tmp_path, *reversed(entries))
    assert there == here and there[0].to_text() == here[0].to_text()
    assert choices(there[0]) == {
        "packed_decode": (RIVAL, True), "short": (RIVAL, False), "packed": (LONG, True), "default": (LONG, False)
    }  # fmt: skip


def test_serving_is_what_the_rows_choose() -> None:
    assert serving(TILES, DIMS, FACTS["packed_decode"]) == (SHORT, False)
    assert serving(TILES, DIMS, FACTS["packed"]) == (LONG, False)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda v: v.pop("tuning"), "results", "no result of benchmarks.tune: KeyError: 'tuning'"),
        (lambda v: v.update(tuning=2), "results", "tuning 2 of 'fwd', this release reads 1"),
        (lambda v: v.update(classes=[]), "results", "nothing was measured"),
        (lambda v: v["classes"][0].update(cases=[]), "results", "has no cases"),
        (lambda v: v["classes"][0]["options"][0]["gains"]["free"].popitem(), "results", "not one positive number a"),
        (lambda v: v["classes"][0]["options"][0]["gains"]["sm120"].update(case0=-1), "results", "positive number"),
        (lambda v: v["classes"][0]["options"][0].update(pack=1), "results", "pack is 1"),
        (lambda v: v["classes"][0].update({"class": "no such"}), "results", "the table's classes are packed_decode"),
        (lambda v: v["classes"][0].update(head_dim=80), "dims", "80/128 default: the table's head dims are 128/128"),
        (lambda v: v["classes"][0]["cases"][0]["incumbent"].update(tile=RIVAL), "stale", "the table now says"),
    ],
)
def test_what_cannot_be_believed_is_refused(
    change: Callable[[dict[str, Any]], object], reason: str, message: str, tmp_path: Path
) -> None:
    value = result(entry("default", LONG, measured(RIVAL, 1.1)))
    change(value)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ResultsError) as error:
        accept.check_table(TILES, accept.read(path)[1])
    assert error.value.reason == reason and message in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"tuning": 1}', "\x00"])
def test_what_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match=r"no result of benchmarks\.tune"):
        accept.read(path)


# ---- the command, with toys for kernels ----


@pytest.fixture
def table(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    path = tmp_path / "tiles.json"
    path.write_text(TILES.to_text())
    monkeypatch.setattr(fwd, "TILES", path)
    variants = tuple(sorted({Variant.parse(row.variant) for row in fwd.rows()}))
    return Table(variants, (), {"fwd": toys.ABI}, {"fwd": ("kernels.toy",)}, toys.GENERATOR, sources)


def test_the_command_writes_the_table_once(table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result(entry("default", LONG, measured(RIVAL, 1.1)))))
    before = fwd.TILES.read_text()
    assert main(["accept", str(path), "--dry-run", "--jobs", "1"], lambda: table) == 0
    assert "would change" in capsys.readouterr().out and fwd.TILES.read_text() == before
    assert main(["accept", str(path), "--jobs", "1"], lambda: table) == 0
    assert f"{RIVAL} replaces {LONG}" in capsys.readouterr().out
    assert choices(Tiles.read(fwd.TILES))["default"] == (RIVAL, False)
    assert main(["accept", str(path), "--jobs", "1"], lambda: table) == 1
    assert "builder: stale: 128/128 default: case0 was measured against" in capsys.readouterr().err


@pytest.mark.parametrize("tile", [RIVAL, LONG])
def test_other_ptx_than_the_builder_makes_now_is_refused(
    tile: str, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(result(entry("default", LONG, measured(RIVAL, 1.1)))).replace(ptx(tile), "f" * 64)
    path = tmp_path / "results.json"
    path.write_text(text)
    before = fwd.TILES.read_text()
    assert main(["accept", str(path), "--jobs", "1"], lambda: table) == 1
    assert f"{tile}: PTX ffffffffffff was measured, the builder now makes" in capsys.readouterr().err
    assert fwd.TILES.read_text() == before


def test_the_candidates_registry_spares_the_compiler(
    table: Table, tmp_path: Path, calls: Path, cached_nvdisasm: None
) -> None:
    registry, path = tmp_path / "c.db", tmp_path / "results.json"
    path.write_text(json.dumps(result(entry("default", LONG, measured(RIVAL, 1.1)))))
    assert main(["candidates", "--registry", str(registry), "--only", f"*-{RIVAL}"], lambda: table) == 0
    generated = len(calls.read_text().splitlines())
    assert main(["accept", str(path), "--registry", str(registry), "--dry-run"], lambda: table) == 0
    assert generated > 0 and len(calls.read_text().splitlines()) == generated


def test_usage_of_accept(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accept"], lambda: table) == 2
    assert "python -m builder accept --help" in capsys.readouterr().err
