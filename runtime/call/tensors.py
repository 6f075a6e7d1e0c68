"""The checks of a call's tensors that follow from the ops' descriptions; each refusal names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from registry import ops
from registry.ops.attention import LENGTHS
from registry.ops.describe import CALL, Layout, Tensor
from runtime.call import checks, memory
from runtime.errors import ArgumentError

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "i32": "int32", "e4m3": "float8_e4m3fn"}
FIRST = ("q", "cu_seqlens_q")  # these say what a call's batch is; all others must agree


@cache
def described(op: str) -> dict[str, Tensor]:
    """What a call may be given: the tensors of an op, and of those that are launched with it, by public name."""
    found: dict[str, Tensor] = {}
    for name in (op, *ops.get(op).launched_with):
        found = {**ops.get(name).by_argument, **found}
    return found


def check_kinds(op: str, tensors: Mapping[str, Any], torch: Any, device_type: str) -> None:
    """Types, layouts in memory, dtypes, ranks and devices: what no size changes."""
    known = described(op)
    for name, tensor in tensors.items():
        allowed = known[name].layouts_for(tensors)
        texts = {len(layout.dims): f"{layout}{' with ' + layout.when if layout.when else ''}" for layout in allowed}
        checks.check_tensor(name, tensor, torch, device_type, texts)
        _check_dtype(name, known[name], tensors, torch)
    checks.check_device(tensors.items())


def _check_dtype(name: str, described: Tensor, tensors: Mapping[str, Any], torch: Any) -> None:
    """dtypes of the description are dtypes by name, CALL for q's, or another tensor's name for its dtype."""
    wanted, words = [], []
    for dtype in described.dtypes:
        whose = "q" if dtype == CALL and "q" in tensors else dtype
        if whose in tensors:
            wanted.append(tensors[whose].dtype)
            words.append(f"{whose}'s, {wanted[-1]}" if len(described.dtypes) == 1 else str(wanted[-1]))
        else:
            wanted.append(getattr(torch, TORCH_DTYPES[dtype]))
            words.append(str(wanted[-1]))
    if tensors[name].dtype not in wanted:
        message = f"dtype {tensors[name].dtype}, must be {' or '.join(dict.fromkeys(words))}"
        raise ArgumentError(name, message, reason="dtype")


def layout_of(described: Tensor, tensor: Any, given: Iterable[str]) -> Layout:
    """The layout that a tensor of the right rank has."""
    return next(layout for layout in described.layouts_for(given) if len(layout.dims) == tensor.dim())


def sizes(op: str, tensors: Mapping[str, Any]) -> dict[str, int]:
    """Every dimension's size by name. ArgumentError ('shape') where two tensors disagree."""
    known = described(op)
    found: dict[str, int] = {}
    whose: dict[str, str] = {}
    first = [name for name in FIRST if name in tensors]
    for name in (*first, *(name for name in tensors if name not in first)):
        shape = tensors[name].shape
        for dim, n in zip(layout_of(known[name], tensors[name], tensors).dims, shape, strict=True):
            dim, n = _solve(name, dim, n)
            if found.setdefault(dim, n) != n:
                message = f"shape {tuple(shape)} has {dim} {n}, must be {whose[dim]}'s, {found[dim]}"
                raise ArgumentError(name, message, reason="shape")
            whose.setdefault(dim, name)
    return found


def _solve(name: str, dim: str, n: int) -> tuple[str, int]:
    """(variable, its value) of a dimension such as 'batch + 1' or 'rotary_dim / 2'."""
    if dim.endswith(" + 1"):
        if n == 0:
            raise ArgumentError(name, f"is empty, must have {dim} entries", reason="shape")
        return dim.removesuffix(" + 1"), n - 1
    if dim.endswith(" / 2"):
        return dim.removesuffix(" / 2"), 2 * n
    return dim, n


def check_memory(op: str, tensors: Mapping[str, Any]) -> None:
    """Strides, storage, alignment, and that what is written does not overlap itself."""
    known = described(op)
    for name, tensor in tensors.items():
        described_tensor = known[name]
        if described_tensor.access == "vectors":
            checks.check_vectors(name, tensor)
        elif described_tensor.access == "elements":
            checks.check_elements(name, tensor)
        else:
            memory.check_storage((name, tensor))
            memory.check_alignment(tensor.element_size(), (name, tensor.data_ptr()))
        if described_tensor.role != "in":
            checks.check_apart_within(name, tensor)


def masks(op: str, tensors: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """(name, bits of the address that must be 0) of each tensor: what every call asks again."""
    known = described(op)
    return tuple(
        (name, (memory.ALIGNMENT if known[name].access == "vectors" else tensor.element_size()) - 1)
        for name, tensor in tensors.items()
    )


def family(op: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of the tensors stays as it is where lengths alone change.

    Strides may follow from a length, in whatever order the dimensions lie. What is expanded stays so: K and V of one
    head have other facts.
    """
    known, found = described(op), []
    for name, tensor in tensors.items():
        dims = layout_of(known[name], tensor, tensors).dims
        shape = tuple(0 if dim in LENGTHS else n for dim, n in zip(dims, tensor.shape, strict=True))
        expanded = tuple(step == 0 for step in tensor.stride())
        found.append((name, shape, expanded, tensor.dtype, tensor.get_device()))
    return tuple(found)
