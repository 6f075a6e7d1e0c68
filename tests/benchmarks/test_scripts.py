"""forward, host_overhead and cold_start without a GPU: their rows, files and failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

import runtime
from benchmarks import __main__ as every
from benchmarks import cases, cold_start, derived, forward, host_overhead, measure, ours, published, shapes
from benchmarks.cubins import BenchmarkError
from registry.contract import Index
from runtime.load import kernel
from runtime.sources.cache import DiskCache
from tests.benchmarks.fakes import FakeKernel, attend, fake_bind, tables_read, write_registry
from tests.support.call import packed

KEY = "fwd-bf16-d64-dv64-m64-n64-w4-s1"
OF_8B = "fwd-bf16-d128-dv128-m64-n64-w4-s1"
FIELDS = ["gpu", "driver", "torch", "commit", "date", "mode", "rows", "geomean"]


def attention(q, k, v, *, causal=False, window=None, return_lse=False, out=None):
    result, lse = attend(q, k, v, causal, window and window[0], None)
    result = result.to(q.dtype).contiguous() if out is None else out.copy_(result)
    return (result, lse.float()) if return_lse else result


def packed_attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    lengths = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k and cu_seqlens_k.tolist() == cu_seqlens_q.tolist()
    return attend(q, k, v, causal, None, (cu_seqlens_q, cu_seqlens_k))[0].to(q.dtype)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(ours, "Kernel", FakeKernel)
    monkeypatch.setattr(shapes, "Kernel", FakeKernel)
    monkeypatch.setattr(shapes, "bind_fwd", fake_bind)
    monkeypatch.setattr(runtime, "flash_attn", attention)
    monkeypatch.setattr(runtime, "flash_attn_varlen", packed_attention, raising=False)
    monkeypatch.setattr(kernel, "SMEM_PADDING", None)
    tiny = cases.grid({"tiny": (4, 2, 64)}, (64,))
    monkeypatch.setattr(cases, "grid", lambda: [c.but(batch=1) for c in tiny])
    yield
    runtime.configure()


def test_forward_writes_a_file_per_mode(tmp_path, on_cpu, capsys):
    path = write_registry(tmp_path / "r.db", [KEY])
    assert forward.main(["--registry", str(path), "--out", str(tmp_path), "--repeats", "2"]) == 0
    for mode in ("free", "sm120"):
        value = json.loads((tmp_path / f"forward.{mode}.json").read_text())
        assert list(value)[:8] == FIELDS and value["mode"] == mode
        assert [row["case"] for row in value["rows"]] == ["tiny/S64/full", "tiny/S64/causal"]
        assert all(row["variant"] == KEY and len(row["ptx_sha256"]) == 64 for row in value["rows"])
        assert value["geomean"] > 0 and value["bars"][0]["bar"].startswith("geomean >= 1.0")
    assert "2 of 2" in json.dumps(value["occupancy"]) and "geomean" in capsys.readouterr().out


def test_the_padding_is_what_emulates_sm120(tmp_path, on_cpu):
    bench = ours.Ours(write_registry(tmp_path / "r.db", [KEY]), "sm120")
    artifact = bench.candidates[KEY].artifact
    assert kernel.SMEM_PADDING is not None
    assert artifact.smem + kernel.SMEM_PADDING(artifact) == bench.candidates[KEY].emulated_smem()
    assert ours.Ours(tmp_path / "r.db", "free").mode == "free" and kernel.SMEM_PADDING is None


def test_a_wrong_result_or_a_missing_kernel_fails_its_case_alone(tmp_path, on_cpu, monkeypatch, capsys):
    path = write_registry(tmp_path / "r.db", [KEY])
    monkeypatch.setattr(runtime, "flash_attn", lambda q, k, v, causal=False, window=None: attention(q, k, v))
    options = ["--registry", str(path), "--out", str(tmp_path), "--repeats", "1", "--modes", "free"]
    assert forward.main(options) == 1
    assert "tiny/S64/causal            FAILED benchmark" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "forward.free.json").read_text())["rows"]) == 1
    assert forward.main([*options, "--dtype", "fp16"]) == 1
    assert "FAILED row" in capsys.readouterr().out


def row(case, ratio):
    return {"case": case, "ratio": ratio}


def test_bars_are_judged_and_fa4_is_met_cell_by_cell():
    cells = published.FA2_FA4
    rows = [row(case, 1.5) for case in cells] + [row("llama3-8b/S512/full", 0.94)]
    value = {"rows": rows, "geomean": 1.08, "against_fa4": published.against_fa4(rows, cells, "forward")}
    assert len(value["against_fa4"]["cells"]) == len(cells) == 10
    assert [bar["met"] for bar in published.verdicts("free", value)] == [True, True, False]
    rows = [row(case, fa4 / fa2) for case, (fa2, fa4) in cells.items()]
    value = {"rows": rows, "geomean": 0.99, "against_fa4": published.against_fa4(rows, cells, "forward")}
    assert [(bar["value"], bar["met"]) for bar in published.verdicts("sm120", value)] == [(0.99, False), (10, False)]
    assert "MISSED" in published.line(published.at_most("x", 1.36, 1.35))


def test_the_published_cells_are_of_the_grid():
    names = {case.name for case in cases.grid()}
    assert published.FA2_FA4.keys() <= names and published.BACKWARD_FA2_FA4.keys() == published.FA2_FA4.keys()


def test_shapes_measures_every_part_in_both_modes(tmp_path, on_cpu, monkeypatch, capsys):
    keys = [
        f"fwd-bf16-d{d}-dv{dv}-m64-n64-w4-s1" for d, dv in ((64, 64), (128, 128), (128, 64), (192, 128), (256, 128))
    ]
    path = write_registry(tmp_path / "r.db", keys)
    monkeypatch.setattr(shapes, "WINDOW_TOKENS", 96)
    monkeypatch.setattr(shapes, "WINDOW", 15)
    monkeypatch.setattr(shapes, "CHECKED_ROWS", 32)
    monkeypatch.setattr(shapes, "lengths", lambda count: (30, 5, 40)[: 2 + count % 2])
    monkeypatch.setattr(shapes, "DENSE_TOKENS", 16)
    real = cases.Case.__init__

    def small(self, *values, **named):
        real(self, *values, **named)
        for side in "qk":
            seqlen, ends = (getattr(self, f"{name}_{side}") for name in ("seqlen", "cu_seqlens"))
            seqlen = min(seqlen, 96)
            if ends is not None:
                seqlen, ends = packed([min(b - a, 96) for a, b in pairwise(ends)])
            object.__setattr__(self, f"seqlen_{side}", seqlen)
            object.__setattr__(self, f"cu_seqlens_{side}", ends)

    monkeypatch.setattr(cases.Case, "__init__", small)
    assert shapes.main(["--registry", str(path), "--out", str(tmp_path), "--repeats", "1"]) == 0
    for mode in ("free", "sm120"):
        value = json.loads((tmp_path / f"shapes.{mode}.json").read_text())
        assert value["mode"] == mode and not any("error" in value[part] for part in shapes.PARTS)
        assert [len(value[part]["rows"]) for part in shapes.PARTS] == [2, 4, 6, 7]
        assert [len(value[part].get("bars", [])) for part in shapes.PARTS] == [2, 2, 0, 0]
        assert all(r["padded"] > 0 and r["dense_256"] > 0 for r in value["varlen"]["rows"][::2])
        assert {r["variant"] for r in value["asymmetric"]["rows"]} == set(keys[2:])
    assert "factor <= 1.35" in capsys.readouterr().out


def test_a_part_whose_output_is_wrong_fails_alone(tmp_path, on_cpu, monkeypatch, capsys):
    path = write_registry(tmp_path / "r.db", [KEY, OF_8B])
    monkeypatch.setattr(shapes, "WINDOW_TOKENS", 96)
    monkeypatch.setattr(shapes, "WINDOW", 15)
    monkeypatch.setattr(runtime, "flash_attn", lambda q, k, v, causal=False, window=None: attention(q, k, v))
    options = ["--registry", str(path), "--out", str(tmp_path), "--repeats", "1", "--modes", "free", "--only", "window"]
    assert shapes.main(options) == 1
    assert "FAILED benchmark: llama3-8b/S96/window15: ours differs from the reference" in capsys.readouterr().out


def test_work_is_rounded_up_to_tiles():
    assert shapes.tile_pairs((64, 65, 0), False) == 64 * 64 * (1 + 4)
    assert shapes.tile_pairs((64, 65, 129), True) == 64 * 64 * (1 + 3 + 6)


def test_no_registry_is_told(monkeypatch):
    monkeypatch.delenv("CUBINERY_REGISTRY", raising=False)
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    with pytest.raises(BenchmarkError, match="give --registry"):
        measure.registry_path(None)


def test_host_overhead_measures_three_forms_of_the_call_and_the_backward(tmp_path, on_cpu, monkeypatch, capsys):
    path = write_registry(tmp_path / "r.db", [KEY, KEY.replace("fwd", "bwd")])
    tiny, grouped = cases.dense("tiny", 8, True, 4, 2, 64, 1), cases.dense("mqa", 16, True, 4, 1, 64, 1)
    monkeypatch.setattr(host_overhead, "CASES", (tiny,))
    monkeypatch.setattr(host_overhead, "BACKWARD_CASES", (tiny, grouped))
    options = ["--registry", str(path), "--out", str(tmp_path), "--series", "2", "--calls", "3"]
    assert host_overhead.main(options) == 0
    value = json.loads((tmp_path / "host_overhead.free.json").read_text())
    assert list(value) == [*FIELDS, "bars"]
    forms, backwards = value["rows"][:3], value["rows"][3:]
    assert [row["case"] for row in forms] == [f"tiny/S8/causal{x}" for x in ("", "/lse", "/out")]
    assert [row["case"] for row in backwards] == ["tiny/S8/causal/backward", "mqa/S16/causal/backward"]
    for row, bar in zip(backwards, value["bars"], strict=True):
        assert row["variant"] == KEY.replace("fwd", "bwd") and min(row["both_ours"], row["both_peer"]) > 0
        assert bar["value"] == round(row["ours"] / row["peer"], 4) and bar["met"] == (bar["value"] <= 1)
    assert "with the forward" in capsys.readouterr().out
    (line,) = tables_read(tmp_path, monkeypatch).host_time()
    assert line[0] == "tiny/S8/causal" and len(line) == 5


def test_the_backward_is_timed_alone_and_with_its_forward(tmp_path, on_cpu, monkeypatch):
    """A series is shorter than the queue of launches, and a backward that is timed alone keeps its graph."""
    asked, grad = [], torch.autograd.grad

    def recorded(out, leaves, dout, **options):
        asked.append((tuple(x.shape for x in leaves), options.get("retain_graph", False)))
        return grad(out, leaves, dout, **options)

    def series_us(runs, series, calls):
        assert calls == host_overhead.BACKWARD_CALLS < 1024 / 8
        for run in runs.values():
            run()
        return {name: [float(i + 1)] for i, name in enumerate(runs)}

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    monkeypatch.setattr(host_overhead, "series_us", series_us)
    bench = ours.Ours(write_registry(tmp_path / "r.db", [KEY, KEY.replace("fwd", "bwd")]), "free")
    row = host_overhead.backward_row(bench, cases.dense("tiny", 8, True, 4, 2, 64, 1), 2, 1000)
    of_ours, of_peer = (((1, 8, h, 64) for h in (4, 2, 2)), ((1, h, 8, 64) for h in (4, 2, 2)))
    shapes = tuple(of_ours), tuple(of_peer)
    assert asked == [(shape, alone) for shape in shapes for alone in (True, False)]
    assert (row["ours"], row["both_ours"], row["peer"], row["both_peer"]) == (0.001, 0.002, 0.003, 0.004)
    assert row["ratio"] == 3.0


def test_cold_start_compares_fresh_processes(tmp_path, on_cpu, monkeypatch, capsys):
    path = write_registry(tmp_path / "r.db", [OF_8B])
    asked = []

    def child(which, env):
        asked.append((which, env.get("CUBINERY_REGISTRY")))
        total = 100.0 if which == "sdpa" else 40.0 + len(asked)
        ms = {"import": 10.0, "first": total - 10, "total": total, "second": 0.1}
        ms |= {"autograd": 900.0, "grad_forward": 3.0, "backward": total - 5, "second_backward": 0.2}
        stages = [] if which == "sdpa" else [{"stage": "load", "what": OF_8B, "ms": 1.0}]
        return {"ms": ms, "stages": stages, "backward_stages": stages}

    monkeypatch.setattr(cold_start, "child", child)
    assert cold_start.main(["--registry", str(path), "--out", str(tmp_path), "--processes", "3"]) == 0
    value = json.loads((tmp_path / "cold_start.free.json").read_text())
    assert list(value)[:8] == FIELDS
    assert [row["case"].split("/")[-1] for row in value["rows"]] == ["embedded", "disk_cache"]
    assert value["rows"][0]["all"] == [45.0, 49.0, 53.0] and value["rows"][0]["ours"] == 49.0
    assert [which for which, _ in asked] == ["ours", "ours", "sdpa", "whole"] * 4
    assert [where for _, where in asked[1:4]] == [cold_start.NO_SERVER, None, cold_start.NO_SERVER]
    assert [row["backward"] for row in value["rows"]] == [44.0, 45.0] and value["backward"]["peer"] == 95.0
    assert (value["backward"]["whole"], value["backward"]["peer_autograd"]) == (47.0, 900.0)
    assert [bar["met"] for bar in value["bars"]] == [False, False]
    assert "load" in capsys.readouterr().out
    tables = tables_read(tmp_path, monkeypatch)
    assert len(tables.cold_start()) == 3 and [row[1:] for row in tables.first_backward()] == [
        ["900.0", "44.0"], ["900.0", "45.0"], ["900.0", "95.0"], ["–", "47.0"]
    ]  # fmt: skip


def test_a_first_backward_of_40_ms_is_soon_enough(tmp_path, on_cpu, monkeypatch):
    path = write_registry(tmp_path / "r.db", [OF_8B])
    parts = ("import", "first", "total", "second", "autograd", "grad_forward", "backward", "second_backward")
    answer = {"ms": {**dict.fromkeys(parts, 1000.0), "backward": 40.0}, "stages": [], "backward_stages": []}
    monkeypatch.setattr(cold_start, "child", lambda which, env: answer)
    assert [bar["met"] for bar in cold_start.run(path, tmp_path, 1)["bars"]] == [True, True]


def test_the_prefilled_cache_holds_every_byte(tmp_path):
    path = write_registry(tmp_path / "r.db", [KEY, OF_8B])
    digest = cold_start.fill_cache(path, "sm_90", tmp_path / "cache")
    cache = DiskCache(str(tmp_path / "cache"))
    index = Index.from_bytes(cache.get("indexes", digest, 1 << 20))
    assert index == derived.read_index(path, "sm_90")
    assert all(cache.get("blobs", a.frame_sha256, a.frame_size) for a in index.artifacts)


def test_a_fresh_process_reports_its_times(tmp_path):
    """The child as it runs, with a stand-in for `runtime` that is imported after the clock has started."""
    (tmp_path / "runtime.py").write_text(
        "import time; time.sleep(0.05)\n"
        "calls = []\n"
        "flash_attn = lambda q, k, v, causal: (calls.append(q.requires_grad), q * k.sum() * v.sum())[1]\n"
        "ledger = lambda: [{'stage': f'load {grad}', 'what': '', 'ms': 1.0} for grad in calls]\n"
    )
    script = Path(cold_start.__file__).with_name("cold_child.py")
    for which in ("ours", "sdpa", "whole"):
        command = [sys.executable, str(script), which, "cpu"]
        done = subprocess.run(
            command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=100, check=True
        )
        answer = json.loads(done.stdout)
        assert answer["ms"]["total"] == pytest.approx(answer["ms"]["import"] + answer["ms"]["first"], abs=0.01)
        assert (answer["ms"]["import"] >= 50) == (which != "sdpa") == bool(answer["stages"])
        stages = [[found["stage"] for found in answer[part]] for part in ("stages", "backward_stages")]
        assert stages == ([[], []] if which == "sdpa" else [["load False"] * 2, ["load True"] * 2])
        assert ("autograd" in answer["ms"]) == (which != "whole")
        assert all(answer["ms"][part] > 0 for part in cold_start.BACKWARD if part in answer["ms"])


def test_a_child_that_fails_tells_why(monkeypatch):
    monkeypatch.setattr(cold_start.measure, "DEVICE", "no such device")
    with pytest.raises(BenchmarkError, match="no such device"):
        cold_start.child("sdpa", {})


def test_a_private_copy_holds_what_is_in_the_wal(tmp_path):
    path = write_registry(tmp_path / "r.db", [KEY])
    copy = derived.private_copy(path, tmp_path / "copy.db")
    assert copy.stat().st_mode & 0o077 == 0
    assert derived.read_index(copy, "sm_90") == derived.read_index(path, "sm_90")
    with pytest.raises(BenchmarkError, match="build it with --arch sm_89"):
        derived.read_index(copy, "sm_89")


@pytest.mark.parametrize("name", ["benchmarks", "benchmarks.forward"])
def test_without_a_gpu_it_ends_with_one_line(name):
    """In a process of its own that sees no device, even on a machine that has one."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", name], cwd=measure.ROOT, env=env, capture_output=True, text=True)
    line = "python -m benchmarks: nothing can be measured here: no CUDA device\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_all_benchmarks_run_even_if_one_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    path, ran = write_registry(tmp_path / "r.db", [KEY]), []

    class Done:
        def __init__(self, command):
            ran.append(command[2])
            assert command[3:] == ["--registry", str(path), "--out", str(tmp_path)]
            self.returncode = int(command[2] == "benchmarks.forward")

    monkeypatch.setattr(every.subprocess, "run", lambda command, **_: Done(command))
    assert every.main(["--registry", str(path), "--out", str(tmp_path)]) == 1
    names = ("forward", "backward", "shapes", "decode", "prefill", "training", "host_overhead", "cold_start")
    assert ran == [f"benchmarks.{name}" for name in names]
    assert "failed: forward" in capsys.readouterr().out
