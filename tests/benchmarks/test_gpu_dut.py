"""The conformance checks through the real runtime, on its tests' CPU backend: what a GPU run does, but for the GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import checks
from tests.gpu.dut import Gpu
from tests.runtime.fakes import KERNELS, write_registry
from tests.support.dut import backend
from tests.support.threads import one_thread

__all__ = ["backend", "one_thread"]  # fixtures

KEYS = ("fwd-bf16-d64-dv64-m64-n64-w4-s1", "fwd-fp16-d64-dv64-m128-n64-w4-s1")


@pytest.fixture
def dut(tmp_path, monkeypatch, backend):
    monkeypatch.setenv("CUBINERY_CACHE", str(tmp_path / "cache"))
    write_registry(tmp_path / "registry.db", "sm_90")
    (tmp_path / "scratch").mkdir(mode=0o700)
    return Gpu(tmp_path / "registry.db", tmp_path / "scratch", "sm_90", device="cpu")


@pytest.mark.parametrize("name", sorted(set(checks.CHECKS) - {"graph_capture"}))
def test_a_check_runs_its_variant_and_no_other(name, dut, backend):
    for key in KEYS:
        dut.force(key)
        checks.CHECKS[name](dut, key, checks.TINY)
        assert {launch["variant"] for launch in backend.driver.launches} == {key}
        backend.driver.launches.clear()


def test_heads_are_packed_when_forced(dut, backend):
    def pack(heads_q, heads_kv):
        q, k = (torch.zeros(1, 5, heads, 64, dtype=torch.bfloat16) for heads in (heads_q, heads_kv))
        dut.attn(q, k, k)
        return backend.driver.launches[-1]["params"]["pack"]

    dut.force(KEYS[0], pack=True)
    assert [pack(4, 2), pack(14, 2), pack(2, 2)] == [2, 7, 1]
    dut.force(KEYS[0])
    assert pack(4, 2) == 1


def test_what_a_kernel_leaves_unwritten_is_nan(dut, backend, monkeypatch):
    monkeypatch.setitem(KERNELS, "fwd", lambda variant, params: None)
    dut.force(KEYS[0])
    q = torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16)
    out, lse = dut.attn(q, q, q, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
