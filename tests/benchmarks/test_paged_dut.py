"""The checks of calls over KV caches through the real runtime, on its tests' CPU backend: all but the GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests.gpu import checks, small_calls
from tests.gpu.dut import Gpu
from tests.runtime.cache_kernels import write_cache_registry
from tests.support.dut import backend
from tests.support.threads import one_thread

__all__ = ["backend", "one_thread"]  # fixtures

KEYS = {
    "fwd_paged": ("fwd_paged-bf16-d64-dv64-m16-n32-w1-s2-q8", "fwd_paged-fp16-d64-dv64-m16-n32-w1-s2-q8-e4m3kv"),
    "fwd_combine": ("fwd_combine-bf16-d256-dv256-m4", "fwd_combine-fp32-d256-dv256-m4"),
    "kv_append": ("kv_append-fp16-d256-dv256-m4", "kv_append-bf16-d256-dv256-m4-e4m3kv"),
}
CASES = [(key, name) for op, keys in KEYS.items() for key in keys for name in checks.OPS[op] if name != "graph_capture"]


@pytest.fixture
def dut(tmp_path, monkeypatch, backend):
    monkeypatch.setenv("CUBINERY_CACHE", str(tmp_path / "cache"))
    write_cache_registry(tmp_path / "registry.db", "sm_90")
    (tmp_path / "scratch").mkdir(mode=0o700)
    return Gpu(tmp_path / "registry.db", tmp_path / "scratch", "sm_90", device="cpu")


@pytest.mark.parametrize(("key", "name"), CASES)
def test_a_check_runs_its_variant_and_no_other_of_its_op(key, name, dut, backend):
    op = key.split("-")[0]
    dut.force(key)
    checks.OPS[op][name](dut, key, checks.TINY)
    launched = {launch["variant"] for launch in backend.driver.launches}
    assert {variant for variant in launched if variant.split("-")[0] == op} == {key}
    assert {variant.split("-")[0] for variant in launched} <= set(KEYS)


@pytest.mark.parametrize("key", [key for keys in KEYS.values() for key in keys])
def test_the_sanitizers_small_calls_end(key, dut, backend):
    dut.force(key, pack=True)
    small_calls.launch(dut, key, device="cpu")
    assert key in {launch["variant"] for launch in backend.driver.launches}
