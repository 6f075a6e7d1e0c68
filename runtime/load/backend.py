"""What the runtime needs of torch and of the CUDA driver, in one object. Tests put another one in its place."""

from __future__ import annotations

from functools import cached_property

from runtime.errors import DriverError, InstallError
from runtime.load import dynamo
from runtime.load.driver import CudaDriver


class TorchBackend:
    """torch's CUDA device. torch is imported here, at the first call, never by `import runtime`.

    device_type: the only one whose tensors are accepted. Raises InstallError when torch is missing, DriverError
    ('fork') in a child of a process that has used CUDA.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            raise InstallError("flash_attn takes torch tensors: pip install 'cubinery[torch]'") from None
        if torch.cuda._is_in_bad_fork():
            message = (
                "CUDA was in use before this process was forked and cannot be used in it; start workers by 'spawn'"
            )
            raise DriverError(message, reason="fork")
        self.torch = torch
        dynamo.tell_torch()
        self.raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent in builds without CUDA
        self.current_device = getattr(torch._C, "_cuda_getDevice", None)
        self.guard = torch.cuda.device
        self.is_capturing = torch.cuda.is_current_stream_capturing
        self.capability = torch.cuda.get_device_capability

    @cached_property
    def driver(self) -> CudaDriver:
        return CudaDriver()
