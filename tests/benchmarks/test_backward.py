"""The backward's benchmark without a GPU: its rows, files, bars and failures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch

import runtime
from benchmarks import backward, cases, derived, measure, ours, published
from benchmarks.cases import dense, varlen
from benchmarks.cubins import BenchmarkError
from registry.contract import Variant
from runtime.load import kernel
from tests.benchmarks.fakes import FakeHeld, FakeKernel, attend, tables_read, write_registry

FORWARD = [f"fwd-bf16-d{d}-dv{dv}-m64-n64-w4-s1" for d, dv in ((64, 64), (64, 32))]
KEY = "bwd-bf16-d64-dv64-m64-n64-w4-s1"
AROUND = [*(f"bwd_{part}process-bf16-d256-dv256-m128" for part in ("pre", "post")), "bwd_sum-bf16-d256-dv256-m8"]
TINY = cases.grid({"tiny": (4, 2, 64)}, (64,))
SMALL = (
    dense("tiny", 80, False, 4, 2, 64, 1, window=9),
    varlen("tiny", (4, 2, 64), (30, 50), True),
    dense("d64-dv32", 64, True, 4, 2, 64, 1, head_dim_v=32),
)


class Plain:
    """Attention in float64 behind our API. asked: the `deterministic` of each call."""

    def __init__(self):
        self.asked = []

    def flash_attn(self, q, k, v, *, causal=False, window=None, deterministic=False):
        self.asked.append(deterministic)
        return attend(q, k, v, causal, window and window[0], None)[0].to(q.dtype)

    def flash_attn_varlen(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        return attend(q, k, v, causal, None, (cu_seqlens_q, cu_seqlens_k))[0].to(q.dtype)


@pytest.fixture
def plain(monkeypatch):
    made = Plain()
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(ours, "Kernel", FakeKernel)
    monkeypatch.setattr(backward, "HeldPeer", FakeHeld)
    monkeypatch.setattr(runtime, "flash_attn", made.flash_attn)
    monkeypatch.setattr(runtime, "flash_attn_varlen", made.flash_attn_varlen)
    monkeypatch.setattr(kernel, "SMEM_PADDING", None)
    monkeypatch.setattr(cases, "grid", lambda *_: [replace(case, batch=1) for case in TINY])
    monkeypatch.setattr(cases, "spine", lambda: frozenset({"tiny/S64/causal"}))
    monkeypatch.setattr(backward, "DETERMINISTIC", frozenset({"tiny/S64/causal"}))
    monkeypatch.setattr(backward, "EXTRA", SMALL)
    yield made
    runtime.configure()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return write_registry(tmp_path_factory.mktemp("backward") / "r.db", [*FORWARD, KEY, *AROUND])


def test_a_file_per_mode(registry, tmp_path, plain, capsys, monkeypatch):
    assert backward.main(["--registry", str(registry), "--out", str(tmp_path), "--repeats", "2"]) == 0
    for mode in ("free", "sm120"):
        value = json.loads((tmp_path / f"backward.{mode}.json").read_text())
        assert list(value)[:8] == ["gpu", "driver", "torch", "commit", "date", "mode", "rows", "geomean"]
        assert value["mode"] == mode and [row["case"] for row in value["rows"]] == ["tiny/S64/full", "tiny/S64/causal"]
        assert all(row["variant"] == KEY and len(row["ptx_sha256"]) == 64 for row in value["rows"])
        assert value["geomean_spine"] == value["rows"][1]["ratio"] and value["geomean"] > 0
        assert ["deterministic_ratio" in row for row in value["rows"]] == [False, True]
        assert [row["case"] for row in value["extra"]] == [case.name for case in SMALL]
        assert value["occupancy"].keys() == {*FORWARD, KEY, *AROUND}
        assert value["geomean_spine_held"] == value["rows"][1]["ratio_held"] and value["geomean_held"] > 0
        assert value["held"]["bytes"] == 101_376
        over = "geomean over the spine's grid"
        assert [bar["bar"].split(" >=")[0].split(" <=")[0] for bar in value["bars"]] == [
            over, *([f"{over}, held peer"] if mode == "sm120" else []),
            "every cell ahead of FA4/FA2", "deterministic over default, slowest cell",
        ]  # fmt: skip
    assert "2 of 2" in json.dumps(value["occupancy"]) and True in plain.asked
    assert "deterministic" in capsys.readouterr().out
    tables = tables_read(tmp_path, monkeypatch)
    ordered = f"{value['rows'][1]['deterministic_ratio']:.2f}"
    assert [(row[0], len(row)) for row in tables.backward()] == [("`free`", 10), ("`sm120`", 10)]
    means = ("geomean", "geomean_held", "geomean_spine", "geomean_spine_held")
    assert tables.backward()[1][1:5] == [f"{value[name]:.3f}" for name in means]
    assert tables.backward()[1][9] == ordered
    said = [f"{row[name]:.3f}" for name in ("ratio", "ratio_held") for row in value["rows"]]
    assert tables.backward_models()[0][0::3] == ["tiny", said[0], said[3]]


def test_a_row_counts_the_backwards_work(registry, plain, monkeypatch):
    monkeypatch.setattr(
        backward, "_medians", lambda runs, repeats, elsewhere=None: {"ours": 1e-4, "peer": 2e-4, "peer_held": 3e-4}
    )
    case = replace(TINY[1], batch=1)
    row = backward.against_sdpa(ours.Ours(registry, "free"), FakeHeld(), case, "bf16", 1)
    assert case.flops == 2 * 64 * 64 * 4 * 64
    assert (row["tflops"], row["peer_tflops"], row["ratio"], row["ratio_held"]) == (52.4, 26.2, 2.0, 3.0)
    assert backward.alone(ours.Ours(registry, "free"), SMALL[0], "bf16", 1)["tflops"] > 2.4 * SMALL[0].flops / 1e5


def test_only_small_calls_go_through_float64(registry, plain, monkeypatch):
    seen, exact = [], backward.exact
    monkeypatch.setattr(backward, "exact", lambda case, qkv, dout: (seen.append(case), exact(case, qkv, dout))[1])
    for case in SMALL:
        backward.alone(ours.Ours(registry, "free"), case, "bf16", 1)
    assert seen == [backward.small_of(case) for case in SMALL]


@pytest.mark.parametrize("of", ["q", "k", "v"])
@pytest.mark.parametrize("case", [TINY[1], SMALL[0]], ids=lambda case: case.name)
def test_a_wrong_gradient_fails_its_case(registry, plain, monkeypatch, case, of):
    """The forward is right: only the gradient of one input is 3 % too large."""

    def flash_attn(q, k, v, **more):
        x = {"q": q, "k": k, "v": v}
        x[of] = x[of] * 1.03 - (x[of] * 0.03).detach()
        return plain.flash_attn(**x, **more)

    monkeypatch.setattr(runtime, "flash_attn", flash_attn)
    bench = ours.Ours(registry, "free")
    with pytest.raises(BenchmarkError, match=f"d{of} differs by"):
        if case.left is None:
            backward.against_sdpa(bench, FakeHeld(), case, "bf16", 1)
        else:
            backward.alone(bench, case, "bf16", 1)


def test_a_wrong_deterministic_gradient_fails_its_case(registry, plain, monkeypatch, tmp_path, capsys):
    def flash_attn(q, k, v, *, deterministic=False, **more):
        return plain.flash_attn(q, k.detach() if deterministic else k, v * 1, **more) + 0 * k.sum()

    monkeypatch.setattr(runtime, "flash_attn", flash_attn)
    options = ["--registry", str(registry), "--out", str(tmp_path), "--repeats", "1", "--modes", "free"]
    assert backward.main([*options, "--cases", "tiny/S64/*"]) == 1
    assert "FAILED benchmark: tiny/S64/causal, deterministic: dk" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "backward.free.json").read_text())["rows"]) == 1


def test_the_forward_is_not_in_the_time(registry, plain, monkeypatch):
    """It has run before the clock starts, once for each input set."""
    bench, case = ours.Ours(registry, "free"), replace(TINY[0], batch=1)
    timed = []
    real = measure.interleaved

    def interleaved(runs, sets, repeats, **more):
        timed.append(len(plain.asked))
        return real(runs, sets, repeats, **more)

    monkeypatch.setattr(measure, "interleaved", interleaved)
    peer = FakeHeld()
    backward.against_sdpa(bench, peer, case, "bf16", 5)
    assert peer.prepared == [("backward", "tiny/S64/full")]
    assert timed == [2] and len(plain.asked) == 2


def test_every_extra_case_has_a_small_one_of_its_kind():
    for case in (*backward.EXTRA, *SMALL):
        small = backward.small_of(case)
        assert (small.left is None, small.lengths is None) == (case.left is None, case.lengths is None)
        assert (small.dims, small.group, small.causal) == (case.dims, case.group, case.causal)
        assert small.flops < 5e9 and (small.lengths is None or small.batch == len(small.lengths))


def test_the_spine_is_40_cells_of_the_grid():
    names = {case.name for case in cases.grid()}
    assert len(cases.spine()) == 40 and cases.spine() < names and names >= backward.DETERMINISTIC
    assert not [name for name in cases.spine() if "hd256" in name or "S16384" in name or "S512" in name]
    assert published.BACKWARD_FA2_FA4.keys() <= cases.spine()


def test_the_bars():
    cells = published.BACKWARD_FA2_FA4
    rows = [{"case": case, "ratio": fa4 / fa2 + 1e-6} for case, (fa2, fa4) in cells.items()]
    rows[0]["deterministic_ratio"], rows[1]["deterministic_ratio"] = 1.2, 1.36
    fa4 = published.against_fa4(rows, cells, "backward")
    assert len(fa4["cells"]) == 10 and "backward" in fa4["source"]
    for mode, least in (("free", 0.95), ("sm120", 0.85)):
        value = {"rows": rows, "geomean_spine": least, "geomean_spine_held": least - 0.001, "against_fa4": fa4}
        held = [False] if mode == "sm120" else []  # only there the held peer has a bar
        assert [bar["met"] for bar in published.backward_verdicts(mode, value)] == [True, *held, True, False]
        value |= {"geomean_spine": least - 0.001, "geomean_spine_held": least, "rows": rows[2:]}
        assert [bar["met"] for bar in published.backward_verdicts(mode, value)] == [
            False,
            *(not met for met in held),
            True,
        ]
    rows[3]["ratio"] -= 2e-6
    fa4 = published.against_fa4(rows, cells, "backward")
    assert [cell["met"] for cell in fa4["cells"]].count(False) == 1


def test_a_backward_variant_has_its_companions_beside_it(registry):
    index = derived.read_index(registry, "sm_90")
    only = derived.only_one(index, index.by_variant[KEY])
    assert {Variant.parse(key).op for key in only.by_variant} == set(backward.OPS)
    assert [row.when for row in only.rows if row.op == "bwd"] == [()]
    alone = derived.only_one(index, index.by_variant[FORWARD[0]])
    assert [row.op for row in alone.rows] == ["fwd"]


class Clock:
    """torch.cuda as far as a round needs it. The device needs `late` waits of the shortest kind to be behind."""

    def __init__(self, late):
        self.late, self.waits = late, []

    def _sleep(self, cycles):
        self.waits.append(cycles)

    def synchronize(self):
        pass

    def Event(self, enable_timing):
        return self

    def record(self):
        pass

    def query(self):
        return self.waits[-1] < self.late

    def elapsed_time(self, end):
        return 1.5


@pytest.mark.parametrize(("late", "rounds"), [(1, 1), (measure.WAITS[1], 2), (measure.WAITS[2], 3)])
def test_a_round_in_which_the_device_caught_up_is_repeated(monkeypatch, late, rounds):
    clock, ran = Clock(late), []
    monkeypatch.setattr(torch, "cuda", clock)
    times = measure._cuda_round({"a": ran.append, "b": ran.append}, 3, 2)
    assert times == {"a": 1.5, "b": 1.5} and clock.waits == list(measure.WAITS[:rounds]) and ran == [1, 0] * rounds


def test_a_host_that_is_always_late_is_told(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Clock(measure.WAITS[-1] + 1))
    with pytest.raises(BenchmarkError, match="cannot enqueue a, b before"):
        measure._cuda_round({"a": int, "b": int}, 0, 1)
