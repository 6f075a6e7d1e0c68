"""Checks of one tensor at a time, which every public function shares; each refusal names the argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from registry.ops.describe import Op
from runtime.call import memory
from runtime.errors import ArgumentError

STRIDE = 8  # elements: 16 bytes, what one copy of the kernels moves
MAX_HEAD_DIM = 256
MAX_I32 = 2**31 - 1


def check_tensor(name: str, tensor: Any, torch: Any, device_type: str, layouts: dict[int, str]) -> None:
    """A plain tensor of one of these ranks on the right kind of device. layouts: dimensions -> their names."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(name, f"{type(tensor).__name__}, must be a torch.Tensor", reason="type")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ArgumentError(name, f"layout {tensor.layout}, must be a plain strided tensor", reason="layout")
    if tensor.is_neg():  # not asked again by warm calls: only as_strided gives one a contiguous head_dim
        raise ArgumentError(name, "is a view still to be negated (is_neg); .resolve_neg() it", reason="layout")
    if tensor.dim() not in layouts:
        wanted = " or ".join(f"the {n} of {layout}" for n, layout in layouts.items())
        raise ArgumentError(name, f"{tensor.dim()} dimensions, must be {wanted}", reason="rank")
    if tensor.device.type != device_type:
        raise ArgumentError(name, f"is on {tensor.device}, must be on a {device_type} device", reason="device")


def check_device(tensors: Iterable[tuple[str, Any]]) -> None:
    """All on the first one's device."""
    (first, tensor), *others = tensors
    device = tensor.device
    for name, tensor in others:
        if tensor.device != device:
            raise ArgumentError(name, f"is on {tensor.device}, must be on {first}'s device, {device}", reason="device")


def check_head_dim(name: str, head_dim: int, step: int = STRIDE) -> None:
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % step:
        message = f"head_dim {head_dim}, must be a multiple of {step} from {step} to {MAX_HEAD_DIM}"
        raise ArgumentError(name, message, reason="head_dim")


def check_vectors(name: str, tensor: Any) -> None:
    """What the kernels copy 16 bytes at a time: strides, storage and alignment."""
    step = memory.ALIGNMENT // tensor.element_size()
    *shape, last_size = tensor.shape
    *stride, last = tensor.stride()
    if last_size > 1 and last != 1:
        message = f"stride {last} along head_dim, must be 1; .contiguous() it"
        raise ArgumentError(name, message, reason="contiguity")
    for axis, (n, along) in enumerate(zip(shape, stride, strict=True)):
        if n > 1 and along % step:
            message = f"stride {along} along dimension {axis}, must be a multiple of {step} elements; .contiguous() it"
            raise ArgumentError(name, message, reason="stride")
    memory.check_storage((name, tensor))
    memory.check_alignment(memory.ALIGNMENT, (name, tensor.data_ptr()))


def check_elements(name: str, tensor: Any) -> None:
    """What the kernels read element by element."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        message = f"stride {tensor.stride(-1)} along its last dimension, must be 1; .contiguous() it"
        raise ArgumentError(name, message, reason="contiguity")
    if tensor.dim() == 2 and tensor.stride(0) > MAX_I32:
        raise ArgumentError(name, f"batch stride {tensor.stride(0)}, must be below 2**31", reason="stride")
    memory.check_storage((name, tensor))
    memory.check_alignment(tensor.element_size(), (name, tensor.data_ptr()))


def check_apart_within(name: str, tensor: Any) -> None:
    """For a tensor that is written."""
    if memory.overlaps_itself(tensor):
        raise ArgumentError(name, "elements share memory (an expanded tensor?); give each its own", reason="overlap")


def check_differentiable(op: Op, tensors: Iterable[tuple[str, Any]]) -> None:
    """ArgumentError for a tensor that requires grad where an op has no gradients."""
    for name, tensor in tensors:
        if not op.backward and tensor.requires_grad:
            message = f"requires grad, and gradients are not implemented {op.no_gradient}; call under torch.no_grad() "
            raise ArgumentError(name, message + "or .detach() it", reason="requires_grad")


def check_tangents(forward_ad: Any, tensors: Iterable[tuple[str, Any]]) -> None:
    """ArgumentError for a tensor whose tangent of forward-mode AD would be lost."""
    for name, tensor in tensors:
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            message = "has a forward-mode tangent, which is not implemented; pass its primal (fwAD.unpack_dual)"
            raise ArgumentError(name, message, reason="forward_ad")


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, int) or flag not in (0, 1):
        raise ArgumentError(name, f"{flag!r:.100} is neither True nor False", reason="type")
