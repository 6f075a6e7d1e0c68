"""benchmarks/sweep.py without a GPU: its reading, checking, restarting and reporting."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from benchmarks import cases, cubins, measure, sweep
from benchmarks.occupancy import SM90_RESERVED, SM90_SMEM, padded_smem
from builder.inspect import blocks_per_sm
from kernels.abi import FWD
from tests.benchmarks.fakes import FakeKernel, fake_bind, write_registry

GOOD = "fwd-bf16-d64-dv64-m64-n64-w4-s1"
ALSO = "fwd-fp16-d64-dv64-m128-n64-w8-s1"
WRONG = "fwd-bf16-d64-dv64-m64-n16-w4-s1"
DEADLY = "fwd-bf16-d64-dv64-m64-n8-w4-s1"


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(sweep, "Kernel", FakeKernel)
    monkeypatch.setattr(sweep, "bind_fwd", fake_bind)
    tiny = cases.grid({"tiny": (4, 2, 64)}, (64, 96))
    monkeypatch.setattr(cases, "grid", lambda *_: [cases.Case(**{**vars(c), "batch": 1}) for c in tiny])
    sweep._kernel.cache_clear()


def worker(path, capsys, skip=None, *more):
    options = ["--worker", "--registry", str(path), "--repeats", "3", *more]
    try:
        sweep.main([*options, "--skip", json.dumps(skip or {"candidates": [], "cases": [], "checked": []})])
    finally:
        lines = capsys.readouterr().out.splitlines()
        worker.events = [json.loads(line) for line in lines]
    return worker.events


def test_a_sweep_measures_good_candidates_and_reports_wrong_ones(tmp_path, capsys, on_cpu):
    path = write_registry(tmp_path / "r.db", [GOOD, ALSO, WRONG])
    report = sweep.summarise(worker(path, capsys))
    assert {row["variant"] for row in report["rows"]} == {GOOD, ALSO}
    assert {row["mode"] for row in report["rows"]} == {"free", "sm120"}
    assert len(report["rows"]) == 2 * 2 * 4  # variants, modes, cases
    assert [f["name"] for f in report["failed"]] == [WRONG]
    assert all(math.isclose(r["ratio"], r["peer"] / r["ours"], rel_tol=0.05) for r in report["rows"])
    assert report["errors"][GOOD]["out"] < 1e-2
    text = sweep.table(report)
    assert GOOD in text and f"FAILED {WRONG}" in text and "tiny/S96/causal" in text
    wanted = 2  # what the made-up artifacts state
    assert {r["blocks_wanted"] for r in report["rows"] if r["mode"] == "sm120" and r["variant"] == GOOD} == {wanted}


def test_globs_modes_and_what_is_done_are_left_out(tmp_path, capsys, on_cpu):
    path = write_registry(tmp_path / "r.db", [GOOD, ALSO])
    done = {"candidates": [], "checked": [GOOD], "cases": ["tiny/S64/full bf16"]}
    events = worker(path, capsys, done, "--only", "*bf16*", "--cases", "*/full", "--modes", "free")
    assert [e["event"] for e in events] == ["begin", "measured", "end"]
    assert {(r["case"], r["variant"], r["mode"]) for r in events[1]["rows"]} == {("tiny/S96/full", GOOD, "free")}


def test_the_supervisor_goes_on_without_what_killed_the_worker(tmp_path, capsys, on_cpu, monkeypatch):
    path = write_registry(tmp_path / "r.db", [DEADLY, GOOD])
    starts = []

    def events(options, skip):
        starts.append(json.loads(json.dumps(skip)))
        try:
            yield from worker(path, capsys, skip, "--cases", "*/S64/*")
        except SystemExit:
            yield from worker.events

    monkeypatch.setattr(sweep, "_worker_events", events)
    report = sweep.summarise(list(sweep._supervise(SimpleNamespace())))
    assert [s["candidates"] for s in starts] == [[], [DEADLY]]
    assert {row["variant"] for row in report["rows"]} == {GOOD}
    assert [f["name"] for f in report["failed"]] == [DEADLY]


def test_a_worker_that_never_begins_ends_the_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "_worker_events", lambda options, skip: iter(()))
    events = list(sweep._supervise(SimpleNamespace()))
    assert [e["event"] for e in events] == ["failed"]


def test_a_stalled_worker_is_killed(monkeypatch, capsys):
    script = "import time; print('{\"event\": \"begin\"}', flush=True); print('noise', flush=True); time.sleep(60)"
    monkeypatch.setattr(sweep.sys, "executable", sys.executable)
    real = sweep.subprocess.Popen
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **kw: real([sys.executable, "-c", script], **kw))
    options = sweep._parser().parse_args(["--registry", "r.db", "--stall", "1.5"])
    assert list(sweep._worker_events(options, {})) == [{"event": "begin"}]
    assert "stalls" in capsys.readouterr().err


def test_read_takes_the_newest_row_and_checks_bytes(tmp_path):
    path = write_registry(tmp_path / "r.db", [GOOD, ALSO])
    found = cubins.read(path, "sm_90")
    assert [c.key for c in found] == [GOOD, ALSO]
    assert found[0].sm120 is not None and found[0].sm120.arch == "sm_120"
    assert found[0].abi == FWD
    with pytest.raises(cubins.BenchmarkError, match="no sm_120 artifact"):
        cubins.Candidate(found[0].artifact, None, FWD, b"").target_blocks()


def test_forward_parameters_name_the_whole_abi():
    import torch

    q, k = torch.zeros(2, 5, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 7, 2, 64, dtype=torch.bfloat16)
    o, lse = torch.zeros_like(q), torch.zeros(2, 4, 5)
    values = cubins.fwd_values(FWD, q, k, k, o, lse, causal=True, scale=0.125)
    assert len(FWD.pack(values)) == FWD.nbytes
    assert values["k_stride_b"] == 7 * 2 * 64 and values["seqlen_k"] == 7 and values["lse_stride_h"] == 5
    assert values["window_right"] == 0 and values["window_left"] > 2**20


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("registers", [96, 128, 168, 255])
@pytest.mark.parametrize("smem", [16_384, 33_792, 49_152, 65_536, 98_304, 101_376])
def test_padding_emulates_sm120_whenever_registers_allow(threads, registers, smem):
    target = blocks_per_sm(threads, registers, smem)
    assert target >= 1
    padded = padded_smem(target, static=0)
    assert padded >= smem
    assert SM90_SMEM // (padded + SM90_RESERVED) == target


def test_no_block_cannot_be_emulated():
    with pytest.raises(ValueError, match="target"):
        padded_smem(0, 0)


def test_result_files_have_the_agreed_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    rows = [
        {"case": "a", "ours": 1.0, "peer": 2.0, "ratio": 2.0, "variant": GOOD, "ptx_sha256": "0" * 64},
        {"case": "b", "ours": 2.0, "peer": 1.0, "ratio": 0.5, "variant": GOOD, "ptx_sha256": "0" * 64},
    ]
    value = json.loads(measure.write(tmp_path, "forward.free", measure.result("free", rows)).read_text())
    assert list(value) == ["gpu", "driver", "torch", "commit", "date", "mode", "rows", "geomean"]
    assert value["geomean"] == 1.0
    assert measure.result("free", [])["geomean"] is None


def test_the_grid_is_that_of_the_issue():
    grid = cases.grid()
    assert len(grid) == 5 * 4 * 2
    names = {case.name: case for case in grid}
    assert names["llama3-8b/S2048/causal"].batch == 4
    assert names["qwen2.5-7b/S8192/full"].flops == 4 * 28 * 8192**2 * 128
