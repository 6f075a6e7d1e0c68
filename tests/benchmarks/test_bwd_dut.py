"""The checks of gradients through the real runtime, on its tests' CPU backend: all but the GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import bwd_small_calls, calls, checks, small_calls
from tests.gpu.dut import Gpu
from tests.runtime.backward_kernels import write_backward_registry
from tests.support.dut import backend
from tests.support.threads import one_thread

__all__ = ["backend", "one_thread"]  # fixtures

KEYS = (
    "bwd-bf16-d64-dv64-m64-n64-w4-s1",
    "bwd_preprocess-fp16-d256-dv256-m128",
    "bwd_postprocess-bf16-d256-dv256-m128",
    "bwd_sum-fp16-d256-dv256-m8",
)
# Graphs are a GPU's. The two ops around `bwd` run in its checks too.
CASES = [(KEYS[0], name) for name in checks.OPS["bwd"] if name != "graph_capture"]
CASES += [(key, name) for key in KEYS[1:3] for name in ("varlen", "determinism", "largest")]
CASES += [(KEYS[3], name) for name in ("splits", "varlen", "determinism", "largest")]


@pytest.fixture
def dut(tmp_path, monkeypatch, backend):
    monkeypatch.setenv("CUBINERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calls, "ALL_DIMS", ((64, 64), (128, 128)))
    write_backward_registry(tmp_path / "registry.db", "sm_90")
    (tmp_path / "scratch").mkdir(mode=0o700)
    return Gpu(tmp_path / "registry.db", tmp_path / "scratch", "sm_90", device="cpu")


@pytest.mark.parametrize(("key", "name"), CASES)
def test_a_check_runs_its_variant_and_no_other_of_its_op(key, name, dut, backend):
    op = key.split("-")[0]
    dut.force(key)
    checks.OPS[op][name](dut, key, checks.TINY)
    launched = {launch["variant"] for launch in backend.driver.launches}
    assert {variant for variant in launched if variant.split("-")[0] == op} == {key}
    ops = {variant.split("-")[0] for variant in launched}
    assert ops - {"bwd_sum"} == {"fwd", "bwd_preprocess", "bwd", "bwd_postprocess"}
    if op == "bwd_sum" or name == "splits":
        assert "bwd_sum" in ops


@pytest.mark.parametrize("key", KEYS)
def test_the_sanitizers_small_calls_end(key, dut, backend, monkeypatch):
    dut.force(key, pack=True)
    lengths = {"cu_seqlens_q": [0, 9, 40], "cu_seqlens_k": [0, 30, 40]}  # that do not lie, for kernels that do not cut
    given = {name: torch.ones(40, 1, 64, dtype=bwd_small_calls.DTYPES[key.split("-")[1]]) for name in "qkv"}
    given |= {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in lengths.items()}
    monkeypatch.setattr(bwd_small_calls, "astray", lambda *_: dict(given))
    small_calls.launch(dut, key, device="cpu")
    assert key in {launch["variant"] for launch in backend.driver.launches}
