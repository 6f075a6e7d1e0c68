"""The driver's edge: loading, the ABI check, and what the real bindings must offer."""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path

import pytest
import torch

import runtime
from registry.contract import Abi, Param
from runtime.errors import DriverError, InstallError, IntegrityError
from runtime.load import driver, kernel
from tests.runtime.fakes import TABLE, FakeBackend, FakeDriver, toy_artifact, toy_cubin
from tests.support.abis import FWD

VARIANT = TABLE[0][-1]
ARTIFACT, _ = toy_artifact(VARIANT, "sm_120")


def changed(*params: Param) -> Abi:
    return FWD.replace(params=params)


N = len(FWD.params)


@pytest.mark.parametrize(("abi", "says"), [
    (changed(*FWD.params[:-1]), f"{N - 1} parameters instead of {N}"),
    (changed(*FWD.params, Param("more", "ptr")), f"{N + 1} parameters instead of {N}"),
    (changed(*FWD.params[:5], Param("cu_seqlens_q", "i32"), *FWD.params[6:]), "cu_seqlens_q has"),
], ids=["fewer", "more", "smaller"])  # fmt: skip
def test_a_cubin_of_another_abi_is_refused_and_unloaded(abi, says):
    fake = FakeDriver()
    with pytest.raises(IntegrityError, match=says) as error:
        kernel.load(fake, toy_cubin(VARIANT, "sm_120", abi), ARTIFACT, FWD, 0)
    assert error.value.reason == "abi" and fake.calls == ["context", "load_library", "unload_library"]


def test_an_old_driver_is_refused_before_anything_is_loaded():
    fake = FakeDriver(version=12040)
    with pytest.raises(DriverError, match=r"CUDA 12\.8, this one is for 12\.4") as error:
        kernel.load(fake, b"", ARTIFACT, FWD, 0)
    assert error.value.reason == "old_driver" and fake.calls == []


def test_an_image_that_the_driver_refuses(backend: FakeBackend, registry: Path):
    backend.driver.refuse_image = True
    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(DriverError) as error:
        runtime.flash_attn(q, q, q)
    assert error.value.status == 200
    backend.driver.refuse_image = False
    runtime.flash_attn(q, q, q)


class Bindings(types.SimpleNamespace):
    """cuda.bindings.driver as far as CudaDriver uses it: statuses in tuples."""

    CUDA_SUCCESS = 0

    def __init__(self, **functions):
        super().__init__(**functions)
        self.CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
        self.cuGetErrorName = lambda status: (0, b"CUDA_ERROR_TOY")
        self.cuGetErrorString = lambda status: (0, None)


def real(**functions) -> driver.CudaDriver:
    made = object.__new__(driver.CudaDriver)
    made._cu = Bindings(**functions)
    made.success = 0
    made._primary = {}
    return made


def test_every_status_is_checked():
    with pytest.raises(DriverError, match=r"cuDriverGetVersion: CUDA_ERROR_TOY \(3\): unknown") as error:
        real(cuDriverGetVersion=lambda: (3, 0)).version()
    assert error.value.status == 3
    assert real(cuDriverGetVersion=lambda: (0, 13000)).version() == 13000


def test_no_libcuda_is_a_typed_error():
    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(DriverError) as error:
        real(cuDriverGetVersion=missing).version()
    assert error.value.reason == "no_driver"


def test_parameters_are_asked_for_until_there_are_no_more():
    places = [(0, 8), (8, 4)]

    def ask(kernel, i):
        return (0, *places[i]) if i < len(places) else (driver.INVALID_VALUE, 0, 0)

    assert real(cuKernelGetParamInfo=ask).params("kernel") == tuple(places)
    with pytest.raises(DriverError):
        real(cuKernelGetParamInfo=lambda kernel, i: (801, 0, 0)).params("kernel")


def test_resident_blocks_are_those_of_each_multiprocessor():
    asked = []
    made = real(
        cuDeviceGet=lambda ordinal: (0, ordinal + 0x10),
        cuDeviceGetAttribute=lambda name, device: (0, {("count", 0x12): 170}[name, device]),
        cuOccupancyMaxActiveBlocksPerMultiprocessor=lambda *arguments: asked.append(arguments) or (0, 3),
    )
    made._cu.CUdevice_attribute = types.SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="count")
    assert made.resident_blocks(2, "function", 128, 50_000) == (170, 3) and asked == [("function", 128, 50_000)]


class Contexts:
    """A thread's stack of current contexts, and how often each device's primary one was retained."""

    def __init__(self, *stack: int):
        self.stack, self.retained = list(stack), []
        self.driver = real(
            cuCtxGetCurrent=lambda: (0, self.stack[-1] if self.stack else 0),
            cuDeviceGet=lambda ordinal: (0, ordinal),
            cuDevicePrimaryCtxRetain=lambda device: (self.retained.append(device) or 0, 0xC0 + device),
            cuCtxSetCurrent=lambda context: (self.stack.__setitem__(slice(-1, None), [context]) or 0,),
            cuCtxPushCurrent=lambda context: (self.stack.append(context) or 0,),
            cuCtxPopCurrent=lambda: (0, self.stack.pop()),
        )


@pytest.mark.parametrize(("before", "after"), [
    ([], [0xC2]),  # none: the primary one stays
    ([0xC2], [0xC2]),
    ([0xC1], [0xC1]),  # another device's
    ([0xC2, 0xF0], [0xC2, 0xF0]),  # a library's own
], ids=["none", "primary", "other", "foreign"])  # fmt: skip
def test_the_primary_context_is_current_within(before, after):
    contexts = Contexts(*before)
    for _ in range(2):
        with contexts.driver.context(2):
            assert contexts.stack[-1] == 0xC2
        assert contexts.stack == after
    with pytest.raises(KeyError), contexts.driver.context(2):
        raise KeyError
    assert contexts.stack == after and contexts.retained == [2]


def test_the_installed_bindings_offer_what_is_used():
    """Names and argument counts, without a driver: both supported major versions state them in their docs."""
    from cuda.bindings import driver as cu

    counts = {
        "cuInit": 1,
        "cuLibraryLoadData": 7,
        "cuLibraryUnload": 1,
        "cuLibraryGetKernel": 2,
        "cuKernelGetFunction": 1,
        "cuKernelGetParamInfo": 2,
        "cuFuncSetAttribute": 3,
        "cuLaunchKernel": 11,
        "cuCtxGetCurrent": 0,
        "cuCtxPopCurrent": 0,
        "cuCtxPushCurrent": 1,
        "cuCtxSetCurrent": 1,
        "cuDevicePrimaryCtxRetain": 1,
        "cuDeviceGet": 1,
        "cuDeviceGetCount": 0,
        "cuDeviceGetName": 2,
        "cuDeviceGetAttribute": 2,
        "cuDriverGetVersion": 0,
        "cuOccupancyMaxActiveBlocksPerMultiprocessor": 3,
        "cuGetErrorName": 1,
        "cuGetErrorString": 1,
    }
    used = set(re.findall(r"\bcu[A-Z]\w+", inspect.getsource(driver)))
    assert used == set(counts)
    for name, count in counts.items():
        signature = re.search(r"\((.*)\)", getattr(cu, name).__doc__.splitlines()[0])[1]
        plain = re.sub(r"\[[^]]*\]", "", signature)
        assert len([part for part in plain.split(",") if part.strip()]) == count, signature
    assert int(cu.CUresult.CUDA_ERROR_INVALID_VALUE) == driver.INVALID_VALUE
    assert cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert int(cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) == 75
    assert int(cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) == 16


def test_without_cuda_bindings(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InstallError, match="cuda-bindings"):
        driver.CudaDriver()
