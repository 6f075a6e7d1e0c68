"""The ledger, the covering array, and how a run without a GPU ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.derived import one_variant_each, read_index
from builder.errors import LedgerError
from kernels import dispatch
from runtime.load.select import select
from tests.benchmarks.fakes import write_registry
from tests.gpu import conftest, every_variant, ledger
from tests.support.covering import covering

ROOT = Path(__file__).resolve().parents[2]
SUITE = ledger.CONFORMANCE["suite"]
ARTIFACT = SimpleNamespace(ptx_sha256="a" * 64, variant="fwd-bf16-d64-dv64-m64-n64-w4-s1", arch="sm_90")


def test_rows_are_appended_with_every_field(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBINERY_LEDGER_DIR", str(tmp_path / "deep" / "ledger"))
    run = ledger.Ledger(ledger.new_run(), "a GPU", "1.2")
    assert ledger.read(run.path) == []
    run.add(ARTIFACT, "yardstick", "pass")
    run.add(ARTIFACT, "memcheck", "hang")
    rows = ledger.read(run.path)
    assert run.path.parent == tmp_path / "deep" / "ledger" and run.path.suffix == ".jsonl"
    assert list(rows[0]) == ["ptx_sha256", "variant", "arch", "test", "suite", "result", "gpu", "driver", "date"]
    told = [(r["test"], r["result"], r["suite"]) for r in rows]
    assert told == [("yardstick", "pass", SUITE), ("memcheck", "hang", SUITE)]
    with pytest.raises(ValueError, match="none of yardstick"):
        run.add(ARTIFACT, "speed", "pass")
    with pytest.raises(ValueError, match="'slow' is none of hang, fail, pass"):
        run.add(ARTIFACT, "yardstick", "slow")


def test_a_row_that_does_not_read_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    ledger.append(path, {"result": "pass"})
    with pytest.raises(LedgerError, match=r"run\.jsonl:1: ptx_sha256, variant"):
        ledger.read(path)


def test_what_need_not_run_is_of_the_same_ptx_suite_and_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBINERY_LEDGER_DIR", str(tmp_path))
    run, before = (ledger.Ledger(tmp_path / f"{name}.jsonl", "a GPU", "1") for name in ("run", "before"))
    old, elsewhere = (SimpleNamespace(**{**vars(ARTIFACT), **changed}) for changed in (
        {"ptx_sha256": "b" * 64}, {"arch": "sm_120"}))  # fmt: skip
    for test, result in (("lse", "pass"), ("strided", "fail"), ("windows", "hang")):
        run.add(ARTIFACT, test, result)
        before.add(elsewhere, test, result)
    run.add(old, "empty", "pass")
    run.add(elsewhere, "drawn", "pass")
    before.add(ARTIFACT, "varlen", "pass")
    before.add(ARTIFACT, "streams", "hang")
    ledger.append(before.path, {**before.row(ARTIFACT, "determinism", "pass"), "suite": SUITE - 1})
    of_this_run = {(ARTIFACT.variant, test) for test in ("lse", "strided", "windows")}
    assert ledger.done(run.path, [ARTIFACT], resume=False) == of_this_run
    assert ledger.done(run.path, [ARTIFACT], resume=True) == of_this_run | {(ARTIFACT.variant, "varlen")}
    assert ledger.done(tmp_path / "new.jsonl", [ARTIFACT], resume=False) == set()
    passed = {(ARTIFACT.variant, test) for test in ("lse", "varlen")}
    assert ledger.done(tmp_path / "new.jsonl", [ARTIFACT], resume=True) == passed


def test_runs_are_named_alike(tmp_path, monkeypatch):
    """Those that are committed and those to come: `<UTC date>T<HHMM>-<gpu>`, never the name of another run."""
    pattern = r"20\d\d-\d\d-\d\dT\d{4}-[a-z0-9]+(-[a-z0-9]+)*"
    committed = list((ROOT / "tests/gpu/ledger").iterdir())
    assert committed and all(re.fullmatch(pattern + r"\.(jsonl|sanitizers\.json)", path.name) for path in committed)
    monkeypatch.setenv("CUBINERY_LEDGER_DIR", str(tmp_path))
    monkeypatch.setattr(ledger, "_smi", lambda field: "NVIDIA H200")
    monkeypatch.setattr(ledger, "_now", lambda: datetime(2026, 11, 21, 5, 38, 59, tzinfo=UTC))
    for name in ("2026-11-21T0538-h200", "2026-11-21T0538-h200-2", "2026-11-21T0538-h200-3"):
        path = ledger.new_run()
        assert path == tmp_path / f"{name}.jsonl" and re.fullmatch(pattern, path.stem)
        assert ledger.sanitizers_report(path) == tmp_path / f"{name}.sanitizers.json"
        path.touch()
    for part in ("", "-part2", "-part3"):  # of a run that goes on
        report = ledger.sanitizers_report(path)
        assert report == tmp_path / f"{path.stem}{part}.sanitizers.json"
        assert re.fullmatch(pattern, report.name.removesuffix(".sanitizers.json"))
        report.touch()


def test_a_gpu_names_its_runs():
    assert ledger.slug("NVIDIA GeForce RTX 5090") == "geforce-rtx-5090"
    assert ledger.slug("NVIDIA H100 80GB HBM3 (MIG 1g.10gb)") == "h100-80gb-hbm3-mig-1g-10gb"


def test_every_op_of_the_table_has_a_conformance_list():
    assert {variant.op for variant in dispatch.variants()} == set(ledger.CONFORMANCE["ops"])


@pytest.mark.parametrize(
    "factors",
    [
        {"a": "xy", "b": (1, 2, 3)},
        {"only": (1, 2)},
        {"q": range(7), "k": range(7), "group": range(4), "family": range(3), "window": range(2)},
    ],
)
def test_every_pair_of_values_occurs(factors):
    cases = covering(factors)
    for (a, xs), (b, ys) in combinations(factors.items(), 2):
        assert {(case[a], case[b]) for case in cases} == set(product(xs, ys))
    assert cases == covering(factors)
    sizes = sorted((len(list(values)) for values in factors.values()), reverse=True)
    assert len(cases) <= 1.15 * sizes[0] * (sizes[1] if len(sizes) > 1 else 1)


def test_each_variant_is_forced_by_a_channel_of_its_own(tmp_path):
    keys = ["fwd-bf16-d64-dv64-m64-n64-w4-s1", "fwd-bf16-d64-dv64-m128-n64-w4-s1"]
    registry = write_registry(tmp_path / "r.db", keys)
    made = one_variant_each(registry, tmp_path / "one.db", "sm_90")
    assert sorted(made) == sorted(keys)
    for key in keys:
        index = read_index(tmp_path / "one.db", "sm_90", key)
        choice = select(index, "fwd", {"head_dim": 64})
        assert (choice.artifact, choice.pack) == (made[key], False)
    assert read_index(tmp_path / "one.db", "sm_90") == read_index(registry, "sm_90")


def test_without_a_gpu_every_test_is_skipped_and_says_why(tmp_path):
    """In a process of its own that sees no device, even on a machine that has one."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CUBINERY_LEDGER_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_fwd.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED [" in done.stdout and "no CUDA device" in done.stdout and "passed" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_suite_number_is_set():
    listed = json.loads((ROOT / "tests/gpu/conformance.json").read_text())
    assert listed["suite"] >= 2 and len(set(listed["ops"]["fwd"])) == len(listed["ops"]["fwd"])


def recording(tmp_path, monkeypatch, lost):
    monkeypatch.setattr(conftest, "_context_lost", lambda: lost)
    run = ledger.Ledger(tmp_path / "run.jsonl", "a GPU", "1.2")
    return run, conftest._recorded(run, ARTIFACT, "lse")


def test_how_a_check_ends_is_recorded(tmp_path, monkeypatch):
    run, block = recording(tmp_path, monkeypatch, lost=False)
    with block:
        pass
    with pytest.raises(AssertionError, match="wrong"), conftest._recorded(run, ARTIFACT, "strided"):
        raise AssertionError("wrong")
    with pytest.raises(KeyboardInterrupt), conftest._recorded(run, ARTIFACT, "windows"):
        raise KeyboardInterrupt
    assert [(row["test"], row["result"]) for row in ledger.read(run.path)] == [("lse", "pass"), ("strided", "fail")]


def test_a_variant_that_does_not_load_fails_its_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "_context_lost", lambda: False)
    monkeypatch.setitem(sys.modules, "tests.gpu.checks", SimpleNamespace())
    run = ledger.Ledger(tmp_path / "run.jsonl", "a GPU", "1.2")
    dut = SimpleNamespace(artifacts={ARTIFACT.variant: ARTIFACT}, force=lambda key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        every_variant.run(dut, set(), lambda *given: conftest._recorded(run, *given), ARTIFACT.variant, "lse")
    assert [(row["test"], row["result"]) for row in ledger.read(run.path)] == [("lse", "fail")]


def test_a_lost_context_is_recorded_and_ends_the_process(tmp_path, monkeypatch):
    run, block = recording(tmp_path, monkeypatch, lost=True)
    with pytest.raises(pytest.exit.Exception) as ended, block:
        raise RuntimeError("an illegal memory access was encountered")
    assert ended.value.returncode == conftest.LOST
    assert [row["result"] for row in ledger.read(run.path)] == ["fail"]
