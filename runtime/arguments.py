"""The checks of a call's arguments, once per plan; each refusal names the argument and what would be accepted."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from registry.contract import WINDOW_OPEN
from runtime.errors import ArgumentError

LAYOUT = "(batch, seqlen, heads, head_dim)"
STRIDE = 8  # elements: 16 bytes, what one copy of the kernels moves
MIN_SCALE, MAX_SCALE = 1e-30, 1e30  # finite in fp32, and positive: the kernels scale the row's largest score
MAX_TOKENS = WINDOW_OPEN - 1  # seqlen_q + seqlen_k: sums with window bounds stay in 32 bits


class Call(NamedTuple):
    """A checked call. facts: what dispatch rows look at. window: (left, right) in tokens, open is WINDOW_OPEN."""

    facts: dict[str, Any]
    window: tuple[int, int]
    scale: float


def check(q: Any, k: Any, v: Any, causal: Any, softmax_scale: Any, window: Any, return_lse: Any, out: Any,
          torch: Any, device_type: str) -> Call:  # fmt: skip
    """Everything that the call's key determines, and what hot calls check each time. Raises ArgumentError."""
    names: list[tuple[str, Any]] = [("q", q), ("k", k), ("v", v)]
    if out is not None:
        names.append(("out", out))
    for name, tensor in names:
        _check_tensor(name, tensor, torch, device_type)
    for name, tensor in names[1:]:
        if tensor.dtype != q.dtype:
            raise ArgumentError(name, f"dtype {tensor.dtype}, must be q's, {q.dtype}", reason="dtype")
        if tensor.device != q.device:
            raise ArgumentError(name, f"is on {tensor.device}, must be on q's device, {q.device}", reason="device")
    _check_shapes(q, k, v, out)
    for name, tensor in names:
        _check_strides(name, tensor)
        check_storage((name, tensor))
        if tensor.data_ptr() & 15:
            raise misaligned((name, tensor.data_ptr()))
    if out is not None and _overlaps_itself(out):
        raise ArgumentError("out", "elements share memory (an expanded tensor?); give each its own", reason="overlap")
    if torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in names):
        raise wants_grad()
    check_tangents(torch.autograd.forward_ad, *names)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise ArgumentError(name, f"{flag!r:.100} is neither True nor False", reason="type")
    bounds = window_bounds(causal, window)
    dtype = "bf16" if q.dtype == torch.bfloat16 else "fp16"
    return Call(_facts(q, k, dtype, bounds), bounds, _scale(softmax_scale, q.shape[3]))


def wants_grad() -> ArgumentError:
    return ArgumentError(
        "q, k, v",
        "one requires grad, and there is no backward yet; call under torch.no_grad() or pass .detach()ed tensors",
        reason="requires_grad",
    )


def check_tangents(forward_ad: Any, *tensors: tuple[str, Any]) -> None:
    """ArgumentError for a tensor whose tangent of forward-mode AD would be lost. A None is passed over."""
    for name, tensor in tensors:
        if forward_ad._current_level >= 0 and tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            message = "has a forward-mode tangent, and there is no derivative yet; pass its primal (fwAD.unpack_dual)"
            raise ArgumentError(name, message, reason="forward_ad")


def check_storage(*tensors: tuple[str, Any]) -> None:
    """ArgumentError for a tensor that has elements but no memory of its own."""
    for name, tensor in tensors:
        try:
            bare = tensor.data_ptr() == 0 and tensor.numel() > 0
        except RuntimeError:  # of torch.func's wrappers
            bare = True
        if bare:
            message = (
                f"{type(tensor).__name__} without memory of its own (a DTensor, FakeTensor, torch.func wrapper, freed "
                "storage), must be a plain tensor; a DTensor's is .to_local()"
            )
            raise ArgumentError(name, message, reason="storage")


def misaligned(*pointers: tuple[str, int]) -> ArgumentError:
    name, address = next((name, address) for name, address in pointers if address & 15)
    message = f"starts at {address:#x}, must start at a multiple of 16 bytes; .clone() it"
    return ArgumentError(name, message, reason="alignment")


def _check_tensor(name: str, tensor: Any, torch: Any, device_type: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(name, f"{type(tensor).__name__}, must be a torch.Tensor", reason="type")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ArgumentError(name, f"layout {tensor.layout}, must be a plain strided tensor", reason="layout")
    if tensor.is_neg():  # not asked again by warm calls: only as_strided gives one a contiguous head_dim
        raise ArgumentError(name, "is a view still to be negated (is_neg); .resolve_neg() it", reason="layout")
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        raise ArgumentError(name, f"dtype {tensor.dtype}, must be torch.bfloat16 or torch.float16", reason="dtype")
    if tensor.dim() != 4:
        raise ArgumentError(name, f"{tensor.dim()} dimensions, must be the 4 of {LAYOUT}", reason="rank")
    if tensor.device.type != device_type:
        raise ArgumentError(name, f"is on {tensor.device}, must be on a {device_type} device", reason="device")


def _check_shapes(q: Any, k: Any, v: Any, out: Any) -> None:
    batch, seqlen_q, heads_q, head_dim = q.shape
    _, seqlen_k, heads_kv, _ = k.shape
    if head_dim == 0:
        raise ArgumentError("q", "head_dim is 0, must be at least 1", reason="shape")
    if k.shape[0] != batch:
        raise ArgumentError("k", f"batch {k.shape[0]}, must be q's, {batch}", reason="shape")
    if k.shape[3] != head_dim:
        raise ArgumentError("k", f"head_dim {k.shape[3]}, must be q's, {head_dim}", reason="shape")
    if v.shape != k.shape:
        raise ArgumentError("v", f"shape {tuple(v.shape)}, must be k's, {tuple(k.shape)}", reason="shape")
    if (heads_q % heads_kv if heads_kv else heads_q) != 0:
        message = f"{heads_q} heads, must be a multiple of k's and v's {heads_kv}"
        raise ArgumentError("q", message, reason="heads")
    if seqlen_q + seqlen_k > MAX_TOKENS:
        message = f"seqlen_q + seqlen_k is {seqlen_q + seqlen_k}, must be at most {MAX_TOKENS}"
        raise ArgumentError("q", message, reason="too_large")
    if max(batch, heads_q) >= 2**31:
        raise ArgumentError("q", f"batch {batch} and heads {heads_q} must be below 2**31", reason="too_large")
    if out is not None and out.shape != q.shape:
        raise ArgumentError("out", f"shape {tuple(out.shape)}, must be q's, {tuple(q.shape)}", reason="shape")


def _check_strides(name: str, tensor: Any) -> None:
    shape, stride = tensor.shape, tensor.stride()
    if shape[3] > 1 and stride[3] != 1:
        message = f"stride {stride[3]} along head_dim, must be 1; .contiguous() it"
        raise ArgumentError(name, message, reason="contiguity")
    for axis, (n, step) in enumerate(zip(shape[:3], stride[:3], strict=True)):
        if n > 1 and step % STRIDE:
            message = f"stride {step} along dimension {axis}, must be a multiple of {STRIDE} elements; .contiguous() it"
            raise ArgumentError(name, message, reason="stride")


def _overlaps_itself(tensor: Any) -> bool:
    """Whether two elements may share memory: walking the dimensions from the finest, a step fits inside the last."""
    reach = 0
    for step, n in sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


def window_bounds(causal: Any, window: Any) -> tuple[int, int]:
    """(left, right) as the kernels take them. causal bounds the right side by 0."""
    if window is None:
        window = (None, None)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ArgumentError("window", f"{window!r:.100} is not (left, right) or None", reason="type")
    bounds = []
    for side in window:
        try:
            bound = WINDOW_OPEN if side is None else operator.index(side)
        except TypeError:
            bound = -1
        if bound < 0:
            message = f"{side!r:.50} is no bound: each is a number of tokens ≥ 0, or None for an open side (never -1)"
            raise ArgumentError("window", message, reason="value")
        bounds.append(min(bound, WINDOW_OPEN))
    return bounds[0], 0 if causal else bounds[1]


def _scale(softmax_scale: Any, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, (int, float)) or not MIN_SCALE <= softmax_scale <= MAX_SCALE:
        message = f"{softmax_scale!r:.100} is not a number from {MIN_SCALE} to {MAX_SCALE}, or None for head_dim**-0.5"
        raise ArgumentError("softmax_scale", message, reason="value")
    return float(softmax_scale)


def _facts(q: Any, k: Any, dtype: str, bounds: tuple[int, int]) -> dict[str, Any]:
    batch, seqlen_q, heads_q, head_dim = q.shape
    _, seqlen_k, heads_kv, _ = k.shape
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "head_dim_v": head_dim,
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "group": heads_q // heads_kv if heads_kv else 0,
        "causal": int(bounds[1] == 0),
    }


def span(tensor: Any) -> int:
    """Bytes from a tensor's first element to past its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def check_apart(out: Any, *others: tuple[str, Any]) -> None:
    """ArgumentError if `out` shares memory with an input whose span it meets; parts of one packed buffer do not."""
    for name, tensor in others:
        distance = out.data_ptr() - tensor.data_ptr()
        if -span(out) < distance < span(tensor) and not _interleaved(out, tensor, distance):
            raise ArgumentError("out", f"shares memory with {name}; give it its own", reason="overlap")


def _interleaved(out: Any, tensor: Any, distance: int) -> bool:
    """Whether both are disjoint parts of the rows of one packed buffer, e.g. q and out of (batch, seqlen, 4, …)."""
    row = out.stride(1) * out.element_size()
    if out.stride()[:2] != tensor.stride()[:2] or row <= 0 or (out.shape[0] > 1 and out.stride(0) % out.stride(1)):
        return False
    offset = distance % row  # from a row's first byte of `tensor` to the next of `out`
    return offset >= span(tensor[0, 0]) and offset + span(out[0, 0]) <= row
