"""From verified bytes to a kernel that can be launched."""

from collections.abc import Callable
from typing import Any, NamedTuple

from registry.contract import Abi, Artifact
from runtime.errors import DriverError, IntegrityError
from runtime.load.driver import Driver

DEFAULT_SMEM = 48 << 10  # bytes of shared memory, static and dynamic, that a function has without asking for more

# For benchmarks: artifact -> bytes to add to the dynamic shared memory, so that an H200 SM holds as many blocks as an
# SM120 SM would. Set it before the first call; configure() forgets the kernels that were loaded before.
SMEM_PADDING: Callable[[Artifact], int] | None = None


class Kernel(NamedTuple):
    """A kernel loaded for one device. smem: dynamic shared memory of a launch, in bytes."""

    artifact: Artifact
    abi: Abi
    function: Any
    smem: int


def load(driver: Driver, cubin: bytes, artifact: Artifact, abi: Abi, device: int) -> Kernel:
    """Load into the device's primary context.

    cubin: verified bytes. Raises DriverError (old driver, refused image), IntegrityError ('abi') when the cubin's
    parameters are not the ABI's.
    """
    have = driver.version()
    if have < artifact.min_driver:
        raise DriverError(
            f"{artifact.variant} needs a driver for CUDA {_cuda(artifact.min_driver)}, this one is for {_cuda(have)}: "
            "update the NVIDIA driver, or rebuild with an older toolkit",
            reason="old_driver",
        )
    smem = artifact.smem + (SMEM_PADDING(artifact) if SMEM_PADDING else 0)
    with driver.context(device):
        library = driver.load_library(cubin)
        try:
            kernel = driver.kernel(library, artifact.symbol)
            found = driver.params(kernel)
            if found != abi.layout:
                raise IntegrityError(
                    f"{artifact.variant}: the cubin's parameters are not those of ABI {abi.op} v{abi.version}: "
                    + _difference(found, abi),
                    reason="abi",
                )
            function = driver.function(kernel)
            if smem + artifact.static_smem > DEFAULT_SMEM:
                driver.allow_dynamic_smem(function, smem)
        except BaseException:
            driver.unload_library(library)
            raise
    return Kernel(artifact, abi, function, smem)  # the library stays loaded as long as the process


def _difference(found: tuple[tuple[int, int], ...], abi: Abi) -> str:
    if len(found) != len(abi.layout):
        return f"{len(found)} parameters instead of {len(abi.layout)}"
    i = next(i for i, (a, b) in enumerate(zip(found, abi.layout, strict=True)) if a != b)
    return f"{abi.params[i].name} has (offset, size) {found[i]} instead of {abi.layout[i]}"


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
