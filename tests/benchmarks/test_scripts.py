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
from benchmarks import (
    backward,
    cases,
    cold_start,
    derived,
    forward,
    held,
    host_overhead,
    large_index,
    measure,
    ours,
    published,
    shapes,
)
from benchmarks.cubins import BenchmarkError
from kernels import dispatch
from registry.contract import DispatchRow, Index
from registry.store import Store
from runtime.load import kernel
from runtime.load.select import select
from runtime.sources.cache import DiskCache
from tests.benchmarks.fakes import FakeHeld, FakeKernel, artifact, attend, fake_bind, tables_read, write_registry
from tests.support.abis import ABIS
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
    monkeypatch.setattr(forward, "HeldPeer", FakeHeld)
    monkeypatch.setattr(shapes, "Kernel", FakeKernel)
    monkeypatch.setattr(shapes, "bind_fwd", fake_bind)
    monkeypatch.setattr(runtime, "flash_attn", attention)
    monkeypatch.setattr(runtime, "flash_attn_varlen", packed_attention, raising=False)
    monkeypatch.setattr(kernel, "SMEM_PADDING", None)
    tiny = cases.grid({"tiny": (4, 2, 64)}, (64,))
    monkeypatch.setattr(cases, "grid", lambda: [c.but(batch=1) for c in tiny])
    yield
    runtime.configure()


def test_forward_writes_a_file_per_mode(tmp_path, on_cpu, monkeypatch, capsys):
    path = write_registry(tmp_path / "r.db", [KEY])
    assert forward.main(["--registry", str(path), "--out", str(tmp_path), "--repeats", "2"]) == 0
    for mode in ("free", "sm120"):
        value = json.loads((tmp_path / f"forward.{mode}.json").read_text())
        assert list(value)[:8] == FIELDS and value["mode"] == mode
        assert [row["case"] for row in value["rows"]] == ["tiny/S64/full", "tiny/S64/causal"]
        assert all(row["variant"] == KEY and len(row["ptx_sha256"]) == 64 for row in value["rows"])
        assert value["geomean"] > 0 and value["bars"][0]["bar"].startswith("geomean >= 1.0")
        assert all(row["peer_held"] == 4.0 and row["ratio_held"] > 0 for row in value["rows"]), "the median of 3 and 5"
        assert value["geomean_held"] > 0 and value["held"] == {"bytes": 101_376, "asked": 1}
    assert "2 of 2" in json.dumps(value["occupancy"]) and "held peer" in capsys.readouterr().out
    tables = tables_read(tmp_path, monkeypatch)
    assert [row[1:3] for row in tables.forward()][1] == [f"{value[name]:.3f}" for name in ("geomean", "geomean_held")]
    assert float(tables.models()[0][5]) == pytest.approx(value["rows"][0]["ratio_held"], abs=0.0015)  # rounded twice


def test_the_held_peer_is_given_each_case_that_is_timed(tmp_path, on_cpu):
    bench, peer = ours.Ours(write_registry(tmp_path / "r.db", [KEY]), "free"), FakeHeld()
    for case in cases.grid():
        row = forward.against_sdpa(bench, peer, case, "bf16", 2)
        assert row["ratio_held"] == pytest.approx(4 / row["ours"], rel=1e-3)
    assert peer.prepared == [("forward", "tiny/S64/full"), ("forward", "tiny/S64/causal")]
    assert "peer_held" not in forward.against_sdpa(bench, None, case, "bf16", 2)


@pytest.mark.parametrize("script", [forward, backward], ids=lambda script: script.__name__)
def test_a_peer_that_cannot_be_held_ends_the_run_with_one_line(tmp_path, on_cpu, monkeypatch, capsys, script):
    path = write_registry(tmp_path / "r.db", [KEY])
    monkeypatch.setattr(script, "HeldPeer", held.HeldPeer)
    monkeypatch.setenv("CC", "no-such-cc")
    options = ["--registry", str(path), "--out", str(tmp_path)]
    assert measure.exit_code(lambda: script.main(options)) == 2
    said = capsys.readouterr()
    assert said.err == "python -m benchmarks: CC: no-such-cc cannot be run (No such file or directory); " \
        "name a C compiler\n"  # fmt: skip
    assert said.out == "" and not list(tmp_path.glob("*.json"))


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
    value["geomean_held"] = 1.0
    bars = published.verdicts("sm120", value)
    assert [(bar["value"], bar["met"]) for bar in bars] == [(0.99, False), (1.0, True), (10, False)]
    assert [bar["bar"] for bar in bars[:2]] == ["geomean >= 1.0", "geomean, held peer >= 1.0"]
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


COLD = ("embedded", "disk_cache", "embedded_40", "disk_cache_40")


def test_cold_start_compares_fresh_processes(tmp_path, on_cpu, monkeypatch, capsys):
    path = write_registry(tmp_path / "r.db", [KEY, OF_8B])
    monkeypatch.setattr(cold_start, "LARGE", 40)
    asked = []

    def child(which, env):
        asked.append((which, env.get("CUBINERY_REGISTRY")))
        if which == "bindings":
            return {"ms": {"import": 30.0 + len(asked)}}
        total = 100.0 if which == "sdpa" else 40.0 + len(asked)
        ms = {"import": 10.0, "first": total - 10, "total": total, "second": 0.1}
        ms |= {"autograd": 900.0, "grad_forward": 3.0, "backward": total - 5, "second_backward": 0.2}
        stages = [] if which == "sdpa" else [{"stage": "load", "what": OF_8B, "ms": 1.0}]
        return {"ms": ms, "stages": stages, "backward_stages": stages}

    monkeypatch.setattr(cold_start, "child", child)
    assert cold_start.main(["--registry", str(path), "--out", str(tmp_path), "--processes", "3"]) == 0
    value = json.loads((tmp_path / "cold_start.free.json").read_text())
    assert list(value)[:8] == FIELDS
    assert [row["case"].split("/")[-1] for row in value["rows"]] == list(COLD)
    assert [row["artifacts"] for row in value["rows"]] == [2, 2, 40, 40]
    assert value["rows"][0]["all"] == [48.0, 55.0, 62.0] and value["rows"][0]["ours"] == 55.0
    assert value["bindings_all"] == [44.0, 51.0, 58.0] and {row["bindings"] for row in value["rows"]} == {51.0}
    assert [which for which, _ in asked] == ["ours", "ours", "ours", "ours", "sdpa", "whole", "bindings"] * 4
    where = [where for _, where in asked[:7]]
    assert where[1] == where[3] == where[5] == cold_start.NO_SERVER and where[4] is where[6] is None
    assert where[0] != where[2] and all(Path(file).suffix == ".db" for file in (where[0], where[2]))
    assert [row["backward"] for row in value["rows"]] == [50.0, 51.0, 52.0, 53.0] and value["backward"]["peer"] == 95.0
    assert (value["backward"]["whole"], value["backward"]["peer_autograd"]) == (55.0, 900.0)
    assert "load" in capsys.readouterr().out
    tables = tables_read(tmp_path, monkeypatch)
    monkeypatch.setattr(tables, "LARGE", 40)
    assert [row[3] for row in tables.cold_start()] == ["55.0", "56.0", "57.0", "58.0", "51.0", "100.0"]
    assert [row[1:] for row in tables.first_backward()] == [
        ["900.0", "50.0"], ["900.0", "51.0"], ["900.0", "95.0"], ["–", "55.0"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bindings", "small", "large"),
    [(12.5, 8.0, 10.0), (15.0, 8.0, 10.0), (15.1, 9.664, 12.08), (25.0, 16.0, 20.0), (3.0, 8.0, 10.0)],
)
def test_on_a_slow_host_the_bars_beyond_the_bindings_grow(bindings, small, large):
    """The first backward's does not."""
    cases = [(f"x/{name}", most) for name, most in (("embedded", small), (f"disk_cache_{cold_start.LARGE}", large))]
    for over in (0.0, 0.01):
        rows = [{"case": c, "ours": bindings + m + over, "bindings": bindings, "backward": 10 + over} for c, m in cases]
        bars = cold_start.bars(rows)
        assert [bar["met"] for bar in bars] == [over == 0] * 3
        assert [bar["bar"].split("<= ")[1] for bar in bars] == [str(small), "10.0", str(large)]


def test_a_large_index_serves_real_calls_as_before(tmp_path):
    """Of the table as it is: the same rows in the same order, among those of other head dims."""
    keys = [variant.key for variant in dispatch.variants()]
    small = Index(
        "sm_90", "test", tuple(artifact(key, "sm_90")[0] for key in keys), dispatch.rows(), tuple(ABIS.values())
    )
    index = large_index.grown(small, 2000)
    assert len(index.artifacts) == 2000 and set(small.artifacts) < set(index.artifacts)
    real = set(small.rows)
    assert tuple(row for row in index.rows if row in real) == small.rows
    assert {row.variant for row in index.rows} == set(index.by_variant)
    assert 0.8 < len(index.rows) / 2000 / (len(small.rows) / len(keys)) < 1.25, "as many rows an artifact"
    for op in ("fwd", "fwd_paged", "bwd"):
        places = [i for i, row in enumerate(row for row in index.rows if row.op == op) if row in real]
        assert places[0] > 0 and places != list(range(places[0], places[0] + len(places))), "among the made-up ones"
    for case in (cold_start.CASE, *cases.grid()):
        for op in ("fwd", "bwd", "bwd_preprocess"):
            assert select(index, op, case.facts()) == select(small, op, case.facts())
    odd = {**cold_start.CASE.facts(), "head_dim": 200, "head_dim_v": 40}
    assert select(index, "fwd", odd) != select(small, "fwd", odd), "others have tiles of their own"
    with pytest.raises(BenchmarkError, match=f"count 10: the index has {len(keys)} artifacts already"):
        large_index.grown(small, 10)


def test_an_index_of_which_no_more_can_be_made_is_refused(monkeypatch):
    monkeypatch.setattr(large_index, "HEAD_DIMS", (8, 16))
    made = [artifact(key, "sm_90")[0] for key in (KEY, OF_8B)]
    index = Index("sm_90", "test", tuple(made), tuple(DispatchRow("fwd", (), a.variant) for a in made), (ABIS["fwd"],))
    assert len(large_index.grown(index, 6).artifacts) == 6, "two, and those of four pairs"
    with pytest.raises(BenchmarkError, match="count 7: an index made of this one has at most 6 artifacts"):
        large_index.grown(index, 7)


def test_an_enlarged_registry_has_every_frame_that_it_names(tmp_path):
    path = write_registry(tmp_path / "r.db", [KEY, OF_8B])
    index = large_index.enlarge(path, "sm_90", 30)
    assert derived.read_index(path, "sm_90").digest == index.digest and len(index.artifacts) == 30
    with Store(path) as store:
        assert store.put_index(index, None) == index.digest, "it names no blob that is not there"
    digest = cold_start.fill_cache(path, "sm_90", tmp_path / "cache")
    cache = DiskCache(str(tmp_path / "cache"))
    assert digest == index.digest and cache.usage().entries == 3, "the index and two frames"


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
    for which in ("ours", "sdpa", "whole", "bindings"):
        command = [sys.executable, str(script), which, "cpu"]
        done = subprocess.run(
            command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=100, check=True
        )
        answer = json.loads(done.stdout)
        if which == "bindings":
            assert answer["ms"].keys() == {"import"} and 0 < answer["ms"]["import"] < 5000
            continue
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
