"""The only place that touches cuda.bindings. `Driver` is what the rest of the runtime sees of it.

cuda-bindings 12.9 and 13.x are both served: every function returns (status, values...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from runtime import stages
from runtime.errors import DriverError, InstallError
from runtime.load import bindings

INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE: also 'there is no such parameter'


class Driver(Protocol):
    """What the runtime asks of the CUDA driver. Handles are opaque. All but `launch` raise DriverError.

    launch: cuLaunchKernel with the parameters' `void*[]` as a raw address; returns (status,), which is `success` by
    identity on success and otherwise goes to `check`.
    """

    success: Any
    launch: Callable[..., tuple[Any]]

    def check(self, status: Any, call: str) -> None: ...
    def version(self) -> int: ...
    def context(self, device: int) -> AbstractContextManager[None]: ...
    def load_library(self, cubin: bytes) -> Any: ...
    def unload_library(self, library: Any) -> None: ...
    def kernel(self, library: Any, symbol: str) -> Any: ...
    def params(self, kernel: Any) -> tuple[tuple[int, int], ...]: ...
    def function(self, kernel: Any) -> Any: ...
    def allow_dynamic_smem(self, function: Any, nbytes: int) -> None: ...
    def resident_blocks(self, device: int, function: Any, threads: int, smem: int) -> tuple[int, int]: ...


class CudaDriver:
    """The real one. Raises InstallError without cuda-bindings, DriverError ('no_driver') without libcuda."""

    def __init__(self) -> None:
        with stages.stage("import bindings"), bindings.without_pathfinder():
            try:
                from cuda.bindings import driver
            except ImportError:
                raise InstallError("cuda-bindings is missing; pip install cubinery installs it") from None
        self._cu = driver
        self.success = driver.CUresult.CUDA_SUCCESS
        self.launch = driver.cuLaunchKernel
        self._primary: dict[int, Any] = {}
        self._call("cuInit", 0)

    def check(self, status: Any, call: str) -> None:
        """DriverError unless `status` is CUDA_SUCCESS."""
        if status != self.success:
            name, meaning = self._explain(status)
            raise DriverError(f"{call}: {name} ({int(status)}): {meaning}", status=int(status))

    def version(self) -> int:
        """As cuDriverGetVersion states it: 12080 is CUDA 12.8."""
        return self._call("cuDriverGetVersion")

    def device_count(self) -> int:
        return self._call("cuDeviceGetCount")

    def device_name(self, device: int) -> str:
        return self._call("cuDeviceGetName", 256, self._call("cuDeviceGet", device)).split(b"\0", 1)[0].decode()

    def capability(self, device: int) -> tuple[int, int]:
        """(major, minor) of a device's compute capability."""
        names, handle = self._cu.CUdevice_attribute, self._call("cuDeviceGet", device)
        major = self._call("cuDeviceGetAttribute", names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)
        minor = self._call("cuDeviceGetAttribute", names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)
        return major, minor

    @contextmanager
    def context(self, device: int) -> Iterator[None]:
        """Within, the device's primary context, which is torch's, is current in this thread.

        It stays so afterwards if none was before: a thread that has only used cached memory has none yet, and a launch
        would fail. Another one, such as a library's own, comes back.
        """
        if device not in self._primary:  # retained once, as long as the process
            self._primary[device] = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
        primary, before = self._primary[device], int(self._call("cuCtxGetCurrent"))
        if before == 0:
            self._call("cuCtxSetCurrent", primary)
        foreign = before not in (0, int(primary))
        if foreign:
            self._call("cuCtxPushCurrent", primary)
        try:
            yield
        finally:
            if foreign:
                self._call("cuCtxPopCurrent")

    def load_library(self, cubin: bytes) -> Any:
        """A library in every context of this process. No JIT options: a cubin is all that is ever handed over."""
        return self._call("cuLibraryLoadData", cubin, [], [], 0, [], [], 0)

    def unload_library(self, library: Any) -> None:
        self._call("cuLibraryUnload", library)

    def kernel(self, library: Any, symbol: str) -> Any:
        return self._call("cuLibraryGetKernel", library, symbol.encode())

    def params(self, kernel: Any) -> tuple[tuple[int, int], ...]:
        """(offset, size) of each parameter, as the driver read them from the cubin."""
        places: list[tuple[int, int]] = []
        while True:
            status, *place = self._function("cuKernelGetParamInfo")(kernel, len(places))
            if int(status) == INVALID_VALUE:
                return tuple(places)
            self.check(status, "cuKernelGetParamInfo")
            places.append((int(place[0]), int(place[1])))

    def function(self, kernel: Any) -> Any:
        """The kernel in the current context; this moves its code to the GPU, so that no launch has to."""
        return self._call("cuKernelGetFunction", kernel)

    def allow_dynamic_smem(self, function: Any, nbytes: int) -> None:
        attribute = self._cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, nbytes)

    def resident_blocks(self, device: int, function: Any, threads: int, smem: int) -> tuple[int, int]:
        """(multiprocessors, blocks of a function with `smem` bytes of dynamic shared memory that each runs at once)."""
        count = self._cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        multiprocessors = self._call("cuDeviceGetAttribute", count, self._call("cuDeviceGet", device))
        return multiprocessors, self._call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, smem)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            status, *values = self._function(name)(*arguments)
        except (RuntimeError, OSError) as error:  # bindings raise when libcuda, or a function in it, is not there
            raise DriverError(f"{name}: no CUDA driver that has it: {error}", reason="no_driver") from None
        self.check(status, name)
        return values[0] if values else None

    def _function(self, name: str) -> Callable[..., Any]:
        return getattr(self._cu, name)

    def _explain(self, status: Any) -> tuple[str, str]:
        texts = []
        for ask in (self._cu.cuGetErrorName, self._cu.cuGetErrorString):
            _, text = ask(status)
            texts.append(text.decode() if text else "unknown")
        return texts[0], texts[1]
