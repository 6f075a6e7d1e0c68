"""The checks of a call's tensors that follow from the ops' descriptions; each refusal names the argument."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

from registry import ops
from registry.ops.attention import LENGTHS
from registry.ops.describe import CALL, Tensor
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


class Dim(NamedTuple):
    """A dimension: n entries of it mean that `name` is n · times − plus."""

    name: str
    times: int = 1
    plus: int = 0


class Expected(NamedTuple):
    """What a tensor must be in a call with certain others. layouts: by the number of dimensions; texts: the same."""

    tensor: Tensor
    layouts: dict[int, tuple[Dim, ...]]
    texts: dict[int, str]


@lru_cache(maxsize=256)
def expected(op: str, given: tuple[str, ...]) -> dict[str, Expected]:
    """By name, for a call with the tensors `given`."""
    return {name: _expected(described(op)[name], given) for name in given}


def _expected(tensor: Tensor, given: tuple[str, ...]) -> Expected:
    layouts, texts = {}, {}
    for layout in tensor.layouts_for(given):
        layouts[len(layout.dims)] = tuple(map(_dim, layout.dims))
        texts[len(layout.dims)] = f"{layout}{f' with {layout.when}' if layout.when else ''}"
    return Expected(tensor, layouts, texts)


def _dim(text: str) -> Dim:
    """Of 'batch', 'batch + 1' or 'rotary_dim / 2'."""
    if text.endswith(" + 1"):
        return Dim(text.removesuffix(" + 1"), plus=1)
    return Dim(text.removesuffix(" / 2"), times=2) if text.endswith(" / 2") else Dim(text)


def check_kinds(op: str, tensors: Mapping[str, Any], torch: Any, device_type: str) -> None:
    """Types, layouts in memory, dtypes, ranks and devices: what no size changes."""
    for name, wanted in expected(op, tuple(tensors)).items():
        checks.check_tensor(name, tensors[name], torch, device_type, wanted.texts)
        _check_dtype(name, wanted.tensor, tensors, torch)
    checks.check_device(tensors.items())


def _check_dtype(name: str, tensor: Tensor, tensors: Mapping[str, Any], torch: Any) -> None:
    """dtypes of the description are dtypes by name, CALL for the first tensor's, or another's name for its dtype."""
    wanted, words, first = [], [], next(iter(tensors))
    for dtype in tensor.dtypes:
        whose = first if dtype == CALL else dtype
        if whose in tensors:
            wanted.append(tensors[whose].dtype)
            words.append(f"{whose}'s, {wanted[-1]}" if len(tensor.dtypes) == 1 else str(wanted[-1]))
        else:
            wanted.append(getattr(torch, TORCH_DTYPES[dtype]))
            words.append(str(wanted[-1]))
    if tensors[name].dtype not in wanted:
        message = f"dtype {tensors[name].dtype}, must be {' or '.join(dict.fromkeys(words))}"
        raise ArgumentError(name, message, reason="dtype")


def sizes(op: str, tensors: Mapping[str, Any]) -> dict[str, int]:
    """Every dimension's size by name. ArgumentError ('shape') where two tensors disagree."""
    table = expected(op, tuple(tensors))
    found: dict[str, int] = {}
    whose: dict[str, str] = {}
    first = [name for name in FIRST if name in tensors]
    for name in (*first, *(name for name in tensors if name not in first)):
        shape = tensors[name].shape
        for (dim, times, plus), n in zip(table[name].layouts[len(shape)], shape, strict=True):
            size = n * times - plus
            if size < 0:
                raise ArgumentError(name, f"is empty, must have {dim} + {plus} entries", reason="shape")
            if found.setdefault(dim, size) != size:
                message = f"shape {tuple(shape)} has {dim} {size}, must be {whose[dim]}'s, {found[dim]}"
                raise ArgumentError(name, message, reason="shape")
            whose.setdefault(dim, name)
    return found


def check_memory(op: str, tensors: Mapping[str, Any]) -> None:
    """Strides, storage, alignment, and that what is written does not overlap itself."""
    for name, (described_as, _, _) in expected(op, tuple(tensors)).items():
        tensor = tensors[name]
        if described_as.access == "vectors":
            checks.check_vectors(name, tensor)
        elif described_as.access == "elements":
            checks.check_elements(name, tensor)
        else:
            memory.check_storage((name, tensor))
            memory.check_alignment(tensor.element_size(), (name, tensor.data_ptr()))
        if described_as.role != "in":
            checks.check_apart_within(name, tensor)


def alignment_masks(op: str, tensors: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """(name, bits of the address that must be 0) of each tensor: what every call asks again."""
    known = described(op)
    return tuple(
        (name, (memory.ALIGNMENT if known[name].access == "vectors" else tensor.element_size()) - 1)
        for name, tensor in tensors.items()
    )


def family(op: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of a plan family's key that tensors make: names, sizes that are no lengths, dtypes, devices, and which
    strides are 0.

    Other strides are left out, since they may follow from a length. Zeros are kept, since K and V that are expanded
    from one head run as one.
    """
    found = []
    for name, wanted in expected(op, tuple(tensors)).items():
        tensor = tensors[name]
        dims = wanted.layouts[tensor.dim()]
        shape = tuple([0 if dim.name in LENGTHS else n for dim, n in zip(dims, tensor.shape, strict=True)])
        expanded = tuple([step == 0 for step in tensor.stride()])
        found.append((name, shape, expanded, tensor.dtype, tensor.get_device()))
    return tuple(found)
