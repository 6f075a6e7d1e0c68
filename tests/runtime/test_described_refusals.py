"""Refusals that follow from the ops' descriptions: for each tensor that a public function takes, everything that its
description forbids. A valid call is built from the descriptions alone, so that a new tensor comes in by itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch

import runtime
from registry import ops
from registry.ops.describe import CALL, Layout, Tensor
from runtime import fa4
from runtime.api import dropin, kvcache
from runtime.call.tensors import layouts
from runtime.errors import ArgumentError
from tests.runtime.fakes import FakeBackend

pytestmark = pytest.mark.usefixtures("cache_registry")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32,
          "e4m3": torch.float8_e4m3fn}  # fmt: skip
# Sizes of dimensions where another than SIZE would be refused, or would hide which of two disagrees.
SIZE = 2
SIZES = {"seqlen_q": 3, "total_q": 6, "seqlen_k": 5, "total_k": 7, "heads_q": 4, "heads": 4, "head_dim": 64,
         "head_dim_v": 128, "pages": 6, "page_size": 4, "max_pages": 3, "rotary_dim": 32, "positions": 9, "tokens": 6,
         "splits": 3, "seqlen": 5}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A public function in one of its forms. names: of the descriptions -> its own. without: tensors that this form is
    not given. low: the first dtypes and layouts of those that a description allows, else the last. kept: tensors that
    it does not copy where the kernels cannot read them; None: none is copied."""

    call: Callable[..., Any]
    op: str
    names: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    low: bool = False
    kept: tuple[str, ...] | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By the descriptions' public names, q and cu_seqlens_q first, which say what the others must agree with."""
        described = ops.get(self.op).by_argument
        for name in ops.get(self.op).launched_with:
            described = described | {k: t for k, t in ops.get(name).by_argument.items() if k not in described}
        taken = inspect.signature(self.call).parameters.keys() - set(self.without)
        order = sorted(described, key=lambda name: ("q", "cu_seqlens_q", name).index(name))
        if "lse" in order:  # a result, which no function takes
            order.remove("lse")
        return {name: described[name] for name in order if self.named(name) in taken}

    def named(self, name: str) -> str:
        return self.names.get(name, name)

    def layout(self, name: str) -> Layout:
        return layouts(self.tensors[name], self.tensors)[0 if self.low else -1]

    def allowed(self, name: str) -> set[torch.dtype]:
        """Sinks and parts of 16 bits are converted."""
        found = {self.dtype(name, dtype) for dtype in self.tensors[name].dtypes}
        return found | {torch.bfloat16, torch.float16} if name in ("sink", "out_partial") else found

    def copies(self, name: str, reason: str) -> bool:
        return self.kept is not None and name not in self.kept and reason in dropin.UNREADABLE

    def dtype(self, name: str, described: str = "") -> torch.dtype:
        """One that the description allows; q's is bf16. described: which."""
        tensors = self.tensors
        described = described or tensors[name].dtypes[0 if self.low else -1]
        if name == "q" or described == CALL:
            return torch.bfloat16 if "q" in tensors else torch.float32
        return self.dtype(described) if described in tensors else DTYPES[described]

    def valid(self) -> dict[str, torch.Tensor]:
        """Arguments by the descriptions' names. All ints are 0, which says that every sequence is empty."""
        return {name: torch.zeros(sizes(self.layout(name)), dtype=self.dtype(name)) for name in self.tensors}

    def run(self, given: dict[str, Any]) -> None:
        self.call(**{self.named(name): tensor for name, tensor in given.items()})


PACKED = ("cu_seqlens_q", "cu_seqlens_k")
FA2, FA4 = dropin.NAMES, dropin.NAMES
FUNCTIONS = {
    "flash_attn": Function(runtime.flash_attn, "fwd"),
    "flash_attn_varlen": Function(runtime.flash_attn_varlen, "fwd"),
    "flash_attn_varlen of dense arrays": Function(runtime.flash_attn_varlen, "fwd", without=PACKED, low=True),
    "flash_attn_varlen over pages": Function(runtime.flash_attn_varlen, "fwd_paged"),
    "flash_attn_varlen, dense over pages": Function(
        runtime.flash_attn_varlen, "fwd_paged", without=(*PACKED, "k_descale", "v_descale"), low=True
    ),
    "flash_attn_with_kvcache": Function(runtime.flash_attn_with_kvcache, "fwd_paged", kvcache.NAMES, kept=kvcache.KEPT),
    "flash_attn_with_kvcache in q's dtype": Function(
        runtime.flash_attn_with_kvcache, "fwd_paged", kvcache.NAMES, ("k_descale", "v_descale"), True, kvcache.KEPT
    ),
    "flash_attn_combine": Function(runtime.flash_attn_combine, "fwd_combine", kept=()),
    "flash_attn_combine of dense arrays": Function(runtime.flash_attn_combine, "fwd_combine", low=True, kept=()),
    "fa2.flash_attn_func": Function(runtime.flash_attn_func, "fwd", FA2, kept=()),
    "fa2.flash_attn_varlen_func": Function(runtime.flash_attn_varlen_func, "fwd", FA2, kept=()),
    "fa2.flash_attn_varlen_func over pages": Function(
        runtime.flash_attn_varlen_func, "fwd_paged", FA2 | {"page_table": "block_table"}, kept=()
    ),
    "fa4.flash_attn_func": Function(fa4.flash_attn_func, "fwd", FA4, kept=()),
    "fa4.flash_attn_varlen_func": Function(fa4.flash_attn_varlen_func, "fwd", FA4, kept=()),
    "fa4.flash_attn_varlen_func over pages": Function(fa4.flash_attn_varlen_func, "fwd_paged", FA4, kept=()),
}
EVERY = [pytest.param(f, name, id=f"{of}: {f.named(name)}") for of, f in FUNCTIONS.items() for name in f.tensors]


def sizes(layout: Layout) -> tuple[int, ...]:
    found = []
    for dim in layout.dims:
        name, _, rest = dim.partition(" ")
        n = SIZES.get(name, SIZE)
        found.append({"": n, "+ 1": n + 1, "/ 2": n // 2}[rest])
    return tuple(found)


# -- what is wrong with a tensor --------------------------------------------------------------------------------------


def misaligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins at an odd address."""
    n = max(math.prod(shape), 1)
    raw = torch.zeros(n * dtype.itemsize + 64, dtype=torch.uint8)
    buffer = memoryview(raw.numpy())  # which keeps the memory
    offset = -raw.data_ptr() % 16 + 1
    return torch.frombuffer(buffer, dtype=dtype, count=n, offset=offset).view(shape)


def odd(shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> torch.Tensor:
    """A tensor that is contiguous within `axis`, whose stride is no multiple of 16 bytes, as all outer ones are."""
    strides, step = [1], 16 // dtype.itemsize
    for i in reversed(range(len(shape) - 1)):
        strides.insert(0, -(-strides[0] * shape[i + 1] // step) * step + (i == axis))
    memory = torch.zeros(1 + sum((n - 1) * along for n, along in zip(shape, strides, strict=True)), dtype=dtype)
    return memory.as_strided(shape, strides)


def faults(f: Function, name: str) -> Iterator[tuple[str, Any, str]]:
    """(what, a value for the argument, the reason of its refusal)."""
    tensor, layout = f.tensors[name], f.layout(name)
    shape, dtype = sizes(layout), f.dtype(name)
    yield "no tensor", [1.0], "type"
    for other in (torch.float64, torch.int64, torch.bool, *DTYPES.values()):
        if other not in f.allowed(name) and not (name == "q" and other is torch.float16):
            yield f"{other}", torch.zeros(shape, dtype=other), "dtype"
    ranks = {len(allowed.dims) for allowed in layouts(tensor, f.tensors)}
    for rank in range(7):
        if rank not in ranks:
            yield f"{rank} dimensions", torch.zeros((*shape[:rank], *[1] * (rank - len(shape))), dtype=dtype), "rank"
    yield "on meta", torch.zeros(shape, dtype=dtype, device="meta"), "device"
    if tensor.access != "anywhere" and shape[-1] > 1:
        yield "every other element", torch.zeros((*shape, 2), dtype=dtype)[..., 0], "contiguity"
    if tensor.access == "vectors" or dtype.itemsize > 1:
        yield "misaligned", misaligned(shape, dtype), "alignment"
    if tensor.access == "vectors":
        for axis, n in enumerate(shape[:-1]):
            if n > 1:
                yield f"stride {axis}", odd(shape, dtype, axis), STRIDES.get((f.op, name, axis), "stride")
    if tensor.role == "out":
        yield "expanded", torch.zeros((1, *shape[1:]), dtype=dtype).expand(shape), "overlap"
    indices, values = torch.zeros(len(shape), 0, dtype=torch.int64), torch.zeros(0, dtype=torch.float32)
    yield "sparse", torch.sparse_coo_tensor(indices, values, shape), "layout"
    yield "nested", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "layout"
    yield "negated", torch._neg_view(torch.zeros(shape, dtype=torch.float32)), "layout"


# flash_attn_combine's parts are contiguous but for their first stride, which no description says.
STRIDES = {("fwd_combine", "out_partial", axis): "contiguity" for axis in (1, 2, 3)}
# A warm call's key has but indices of devices, which are all -1 here: the missing address tells.
WARM = {"on meta": {"device", "storage"}}
COLD = {"negated"}  # is not asked again by a warm call: but for as_strided nothing makes such a view that fits a plan


def check(f: Function, name: str, given: dict[str, Any], what: str, reasons: set[str], argument: str = "") -> None:
    try:
        f.run(given)
    except ArgumentError as error:
        assert error.argument == f.named(argument or name), f"{what}: {error}"
        assert error.reason in reasons, f"{what}: {error} ({error.reason})"
        assert str(error).startswith(f"{error.argument}: "), what
        assert error.__context__ is None or error.__suppress_context__, "the plan cache's own miss must not show"
    else:
        raise AssertionError(f"{what} was not refused")


@pytest.mark.parametrize(("f", "name"), EVERY)
def test_what_a_description_forbids_is_refused(backend: FakeBackend, f: Function, name: str):
    valid = f.valid()
    every = list(faults(f, name))
    wrong = [(what, value, reason) for what, value, reason in every if not f.copies(name, reason)]
    assert len(every) > 10
    for what, value, reason in wrong:
        check(f, name, valid | {name: value}, what, {reason})
    assert not backend.driver.calls and not backend.driver.launches
    f.run(valid)
    launched = len(backend.driver.launches)
    assert launched
    for what, value, reason in wrong:
        if what not in COLD:
            check(f, name, valid | {name: value}, f"{what}, warm", WARM.get(what, {reason}))
    assert len(backend.driver.launches) == launched
    f.run(valid)
    assert len(backend.driver.launches) == 2 * launched
    copied = [value for _, value, reason in every if f.copies(name, reason)]
    for _ in range(2):
        for value in copied:
            f.run(valid | {name: value})
    assert len(backend.driver.launches) == (2 + 2 * len(copied)) * launched


@pytest.mark.parametrize(("f", "name"), EVERY)
def test_sizes_that_disagree_are_refused(backend: FakeBackend, f: Function, name: str):
    """The first tensor that has a dimension says how large it is; the next one that says otherwise is named."""
    valid, layout = f.valid(), f.layout(name)
    for warm in (False, True):
        for axis, dim in enumerate(layout.dims):
            base = dim.partition(" ")[0]
            having = [other for other in valid if any(d.partition(" ")[0] == base for d in f.layout(other).dims)]
            if having == [name]:
                continue
            shape = list(sizes(layout))
            shape[axis] += 1
            changed = torch.zeros(shape, dtype=f.dtype(name))
            named = having[1] if having[0] == name else name
            check(f, name, valid | {name: changed}, f"another {dim}", {"shape"}, named)
        assert warm or not backend.driver.calls
        before = len(backend.driver.launches)
        f.run(valid)
        assert warm or before == 0


def test_every_described_tensor_is_some_function_s():
    """But for what a call returns: a description that nobody can reach is a mistake in it, or in the functions."""
    taken = {(f.op, name) for f in FUNCTIONS.values() for name in f.tensors}
    for op in ("fwd", "fwd_paged", "fwd_combine"):
        for name in {*ops.get(op).by_argument} - {"lse"}:
            assert (op, name) in taken, (op, name)
    assert {("fwd_paged", name) for name in ops.get("kv_append").by_argument} <= taken
