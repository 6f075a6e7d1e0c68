"""The raw launcher against a stand-in for the driver: what it asks for, and what the kernel would read."""

from __future__ import annotations

import ctypes
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import cubins
from registry.contract import PARAM_FORMATS
from tests.benchmarks.fakes import write_registry
from tests.support.abis import FWD

KEY = "fwd-bf16-d64-dv64-m64-n64-w4-s1"


class Driver(ModuleType):
    """cuda.bindings.driver as far as it is used: each call is noted and answered (0, value)."""

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="smem", CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT="out"
    )

    def __init__(self):
        super().__init__("driver")
        self.calls, self.fail, self.seen = [], "", {}

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cuLaunchKernel":
                self.seen = self.read(arguments[9])
            status = 700 if name == self.fail else 0
            return (status, *([3] if name not in ("cuLaunchKernel", "cuFuncSetAttribute") else []))

        return call

    @staticmethod
    def read(address):
        """Every parameter's value, through the table of pointers, as the driver copies them."""
        values = {}
        for i, param in enumerate(FWD.params):
            pointer = ctypes.c_void_p.from_address(address + 8 * i).value
            values[param.name] = struct.unpack("<" + PARAM_FORMATS[param.type], ctypes.string_at(pointer, param.size))[
                0
            ]
        return values


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    package = ModuleType("cuda.bindings")
    package.driver = made
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return made


def tensors():
    q, k = torch.zeros(2, 100, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 90, 2, 64, dtype=torch.bfloat16)
    return q, k, k.clone(), torch.zeros_like(q), torch.zeros(2, 4, 100)


def test_a_launch_hands_over_every_parameter(tmp_path, driver):
    (candidate,) = cubins.read(write_registry(tmp_path / "r.db", [KEY]), "sm_90")
    kernel = cubins.Kernel(candidate, smem=100_000, carveout=100)
    q, k, v, o, lse = tensors()
    launch = cubins.bind_fwd(kernel, q, k, v, o, lse, causal=True)
    launch()
    name, arguments = driver.calls[-1]
    assert name == "cuLaunchKernel"
    assert arguments[1:9] == (2 * 4 * 2, 1, 1, 128, 1, 1, 100_000, 77)  # ⌈100 / 64⌉ tiles · heads · batch
    expected = {"q": q.data_ptr(), "lse": lse.data_ptr(), "k_stride_b": 90 * 2 * 64, "seqlen_k": 90, "window_right": 0}
    assert {name: driver.seen[name] for name in expected} == expected
    assert driver.seen["scale_log2"] == pytest.approx(0.125 * 1.4426950408889634)
    settings = [arguments[1:] for name, arguments in driver.calls if name == "cuFuncSetAttribute"]
    assert settings == [("smem", 100_000), ("out", 100)]


def test_packed_heads_and_windows_reach_the_kernel(tmp_path, driver):
    (candidate,) = cubins.read(write_registry(tmp_path / "r.db", [KEY]), "sm_90")
    q, k, v, o, lse = tensors()
    q, o, lse = q[:, :30], o[:, :30], lse[..., :30]
    cubins.bind_fwd(cubins.Kernel(candidate), q, k, v, o, lse, window=40, pack=True)()
    assert driver.calls[-1][1][1] == 1 * 2 * 2  # ⌈30 · 2 / 64⌉ tiles · groups · batch
    magic, shift = driver.seen["pack_magic"], driver.seen["pack_shift"]
    assert driver.seen["pack"] == 2 and all(n * magic >> shift == n // 2 for n in (0, 1, 2, 3, 199, 2**31 - 1))
    assert (driver.seen["window_left"], driver.seen["window_right"], driver.seen["head_dim"]) == (40, 0, 64)


def test_packed_sequences_have_no_batch_stride_and_blocks_enough(tmp_path, driver):
    (candidate,) = cubins.read(write_registry(tmp_path / "r.db", [KEY]), "sm_90")
    q, k = torch.zeros(300, 4, 64, dtype=torch.bfloat16), torch.zeros(280, 2, 64, dtype=torch.bfloat16)
    v, o, lse = torch.zeros(280, 2, 32, dtype=torch.bfloat16), torch.zeros(300, 4, 32), torch.zeros(4, 300)
    cu = torch.tensor([0, 100, 300], dtype=torch.int32), torch.tensor([0, 0, 280], dtype=torch.int32)
    cubins.bind_fwd(cubins.Kernel(candidate), q, k, v, o, lse, cu_seqlens=cu)()
    assert driver.calls[-1][1][1] == (300 // 64 + 2) * 4
    expected = {
        "cu_seqlens_q": cu[0].data_ptr(), "cu_seqlens_k": cu[1].data_ptr(), "seqused_q": 0, "batch": 2,
        "q_stride_b": 0, "o_stride_b": 0, "lse_stride_b": 0, "lse_stride_h": 300, "seqlen_q": 300, "seqlen_k": 280,
        "q_stride_s": 256, "v_stride_s": 64, "v_stride_h": 32, "heads_q": 4, "heads_kv": 2, "head_dim": 64,
        "head_dim_v": 32, "window_left": 2**30, "window_right": 2**30, "pack": 1, "softcap_scale": 0.0,
    }  # fmt: skip
    assert {name: driver.seen[name] for name in expected} == expected


def test_the_cubin_that_is_loaded_is_the_verified_one(tmp_path, driver):
    (candidate,) = cubins.read(write_registry(tmp_path / "r.db", [KEY]), "sm_90")
    assert cubins.Kernel(candidate).occupancy == 3
    assert driver.calls[0][0] == "cuLibraryLoadData" and driver.calls[0][1][0] == candidate.cubin
    assert driver.calls[1][1] == (3, candidate.artifact.symbol.encode())
    assert driver.calls[-1][1][1:] == (128, candidate.artifact.smem)


def test_a_refusal_of_the_driver_is_an_error(tmp_path, driver):
    (candidate,) = cubins.read(write_registry(tmp_path / "r.db", [KEY]), "sm_90")
    driver.fail = "cuLibraryLoadData"
    with pytest.raises(cubins.BenchmarkError, match="CUDA driver: 700"):
        cubins.Kernel(candidate)
