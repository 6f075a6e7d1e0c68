"""The training benchmark without a GPU: runs, the measure, its bars and memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import measure, training, transformer
from benchmarks.cubins import BenchmarkError
from benchmarks.transformer import Sizes
from tests.benchmarks.fakes import attend, tables_read

TINY = Sizes(layers=2, width=32, heads_q=4, heads_kv=2, head_dim=8, vocabulary=16, seqlen=16)
STEPS = 20


def flash_attn(q, k, v, causal):
    return attend(q, k, v, causal, None, None)[0].to(q.dtype)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(transformer, "Sizes", lambda: TINY)
    monkeypatch.setattr(training, "LONG", training.dense("tiny", 16, True, 4, 2, 8, 1))
    yield
    torch.set_num_threads(threads)


def test_the_file(monkeypatch, tmp_path, capsys):
    registry = tmp_path / "r.db"
    registry.touch()
    runtime = SimpleNamespace(flash_attn=flash_attn)
    monkeypatch.setattr(training, "Ours", lambda path, mode: SimpleNamespace(runtime=runtime, mode=mode))
    options = ["--registry", str(registry), "--out", str(tmp_path), "--steps", str(STEPS), "--seeds", "0", "5"]
    assert training.main(options) == 0
    value = json.loads((tmp_path / "training.free.json").read_text())
    assert list(value)[:6] == ["gpu", "driver", "torch", "commit", "date", "mode"]
    assert value["steps"] == STEPS and value["seeds"] == [0, 5] and value["model"]["width"] == 32
    assert value["deviation"].keys() == {"ours", "flash", "reference_again"}
    assert value["deviation"]["reference_again"] == {"mean": 0, "max": 0}
    assert all(len(curve) == STEPS and curve[-1] < 0.9 * curve[0] for curve in value["curves"].values())
    assert value["memory"].keys() == {"ours", "flash", "reference", "attention"}
    assert len(value["bars"]) == 4 and all(bar["met"] for bar in value["bars"])
    assert "met" in capsys.readouterr().out
    rows = tables_read(tmp_path, monkeypatch).training()
    assert [(len(row), row[1:]) for row in rows[2:]] == [(4, ["0.00", "0.00", "0.0"])]
    assert [row[1] for row in rows[:2]] == [f"{value['deviation'][n]['mean'] * 1e3:.2f}" for n in ("ours", "flash")]


@pytest.mark.parametrize("lost", ["q", "k", "v"])
def test_a_lost_gradient_is_seen(lost):
    def broken(q, k, v):
        x = {"q": q, "k": k, "v": v}
        x[lost] = x[lost].detach()
        return flash_attn(**x, causal=True)

    found = training.compare(
        {"ours": broken, "flash": training._flash, "reference": training._reference}, TINY, [0], STEPS
    )
    assert [bar["met"] for bar in found["bars"][:2]] == [False, False]


def test_the_reference_is_fp32_under_autocast(monkeypatch):
    seen = []
    real = measure.sdpa
    monkeypatch.setattr(measure, "sdpa", lambda *qkv: (seen.append(real(*qkv)), seen[-1])[1])
    q, k, v = (torch.randn(1, 8, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = training._reference(q, k, v)
    assert seen[0].dtype == torch.float32 and out.dtype == torch.bfloat16 and out.shape == q.shape
    exact = attend(q, k, v, True, None, None)[0]
    assert measure.relative_error(seen[0].transpose(1, 2), exact) < 1e-6


def test_a_loss_that_is_no_number_is_told():
    with pytest.raises(BenchmarkError, match="seed 3: the loss is"):
        training.train(lambda q, k, v: q * float("nan"), TINY, 3, 2)


def test_the_measure_and_its_bars():
    assert training.deviation([1.0, 2.0, 3.0], [1.0, 2.5, 2.9]) == {"mean": 0.2, "max": 0.5}
    falling, flat = training.Run([4.0, 3.0], 0), training.Run([4.0, 3.9], 0)
    found = {"ours": {"mean": 0.005, "max": 0.021}, "flash": {"mean": 0.002, "max": 0.01}}
    bars = training.bars(found, {"ours": 7, "flash": 7}, [falling, flat])
    assert [bar["met"] for bar in bars] == [True, True, True, False]
    found["ours"] = {"mean": 0.0051, "max": 0.0211}
    bars = training.bars(found, {"ours": 8, "flash": 7}, [falling])
    assert [bar["met"] for bar in bars] == [False, False, False, True]


class Cuda:
    """torch.cuda's memory: `now` bytes, of which a step takes 100 more for a while."""

    def __init__(self):
        self.now = self.peak = 1000

    def step(self):
        self.peak = max(self.peak, self.now + 100)

    def synchronize(self):
        pass

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.now


def test_memory_is_what_a_step_takes_beyond_what_was_there(monkeypatch):
    cuda = Cuda()
    cuda.peak = 5000  # of what ran before
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    assert training._peak_of(cuda.step) == 100
