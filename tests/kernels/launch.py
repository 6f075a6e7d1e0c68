"""Launch a forward variant in the PTX interpreter, with inputs and outputs laid out to show every stray access."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from kernels.abi import FWD
from registry.contract import WINDOW_OPEN, Artifact, Variant
from tests.ptx.interpreter import Device, Kernel
from tests.reference import Array, Reference, Window, decode, encode, reference

PAD = 8  # elements of NaN beside each row of head_dim; a multiple of 8, as strides must be


@dataclass(frozen=True)
class Case:
    """One call. family: 'normal', 'x4' or 'low' (all logits far below 0); heads_first: each batch entry is (heads,
    seqlen, dim) in memory; far: batch entries lie 2**32 elements apart."""

    name: str
    seqlen_q: int
    seqlen_k: int
    heads_q: int = 2
    heads_kv: int = 2
    batch: int = 1
    window: Window = (None, None)
    family: str = "normal"
    lse: bool = True
    heads_first: bool = False
    far: bool = False


@dataclass(frozen=True)
class Compiled:
    """A variant as the registry holds it."""

    artifact: Artifact
    ptx: str

    @property
    def variant(self) -> Variant:
        return Variant.parse(self.artifact.variant)

    @cached_property
    def kernel(self) -> Kernel:
        return Kernel(self.ptx)


@dataclass(frozen=True)
class Outcome:
    """What a launch left behind. out, lse: values in fp32; stray: bytes changed outside of them; steps: instructions
    executed, counted once a block."""

    out: Array
    lse: Array | None
    stray: int
    steps: int


class Tensor:
    """(batch, seqlen, heads, dim) on the device, each batch entry inside a larger buffer of NaN of its own.

    Loading a byte of a buffer outside the tensor is a fault, as is an address outside the buffers.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], case: Case, values: Array | None = None):
        """values: uint16 bits for an input; an output has none, and loading it before it is stored is a fault."""
        self.device, self.heads_first = device, case.heads_first
        batch, seqlen, heads, dim = shape
        self.buffer_shape = (*((heads + 1, seqlen + 1) if case.heads_first else (seqlen + 1, heads + 1)), dim + PAD)
        buffer = np.full(self.buffer_shape, 0xFFFF, np.uint16)
        stride_b = batch_stride(buffer.size, case.far)
        first = device.next
        self.bases = []
        for b in range(batch):
            defined = np.zeros(self.buffer_shape, bool)
            if values is not None:
                self.inside(buffer)[...] = values[b]
                self.inside(defined)[...] = True
            self.bases.append(device.put(buffer, defined, at=first + 2 * b * stride_b))
        stride_s, stride_h, _ = (stride // 2 for stride in self.inside(buffer).strides)
        self.strides = {"b": stride_b, "s": stride_s, "h": stride_h}
        self.address = first + sum(buffer.strides[:2]) + 2 * PAD

    def inside(self, buffer: Array) -> Array:
        """The tensor's own part of a buffer, as (seqlen, heads, dim)."""
        part = buffer[1:, 1:, PAD:]
        return part.swapaxes(0, 1) if self.heads_first else part

    def result(self) -> tuple[Array, int]:
        """(the values' bits, bytes changed outside them)."""
        bits, stray = [], 0
        for base in self.bases:
            buffer = self.device.get(base, np.uint16).reshape(self.buffer_shape).copy()
            bits.append(self.inside(buffer).copy())
            self.inside(buffer)[...] = 0xFFFF
            stray += int(np.count_nonzero(buffer.view(np.uint8) != 0xFF))
        return np.stack(bits), stray


class Statistics:
    """The LSE, (batch, heads, seqlen_q) in fp32, with room around each row."""

    def __init__(self, device: Device, case: Case):
        self.device, self.shape = device, (case.heads_q + 1, case.seqlen_q + 3)
        buffer = np.full(self.shape, 0xFFFFFFFF, np.uint32)
        self.stride_b, self.stride_h = batch_stride(buffer.size, case.far), self.shape[1]
        first = device.next
        nothing = np.zeros(self.shape, bool)
        self.bases = [device.put(buffer, nothing, at=first + 4 * b * self.stride_b) for b in range(case.batch)]
        self.address = first + 4

    def result(self) -> tuple[Array, int]:
        """(the values, bytes changed outside them)."""
        values, stray = [], 0
        for base in self.bases:
            buffer = self.device.get(base, np.float32).reshape(self.shape).copy()
            inside = buffer[:-1, 1:-2]
            values.append(inside.copy())
            inside.view(np.uint32)[...] = 0xFFFFFFFF
            stray += int(np.count_nonzero(buffer.view(np.uint8) != 0xFF))
        return np.stack(values), stray


def batch_stride(size: int, far: bool) -> int:
    """Elements between batch entries of `size` elements: with a wide gap, or beyond what 32 bits can count."""
    return (2**32 if far else -(-size // 8) * 8 + 2**20) + 8


def inputs(case: Case, variant: Variant) -> tuple[Array, Array, Array]:
    """q, k, v as uint16 bits, always the same ones."""
    random = np.random.default_rng(0)
    q = random.standard_normal((case.batch, case.seqlen_q, case.heads_q, variant.head_dim))
    k = random.standard_normal((case.batch, case.seqlen_k, case.heads_kv, variant.head_dim))
    v = random.standard_normal((case.batch, case.seqlen_k, case.heads_kv, variant.head_dim_v))
    if case.family == "x4":
        q, k, v = 4 * q, 4 * k, 4 * v
    elif case.family == "low":
        q, k = q + 2, k - 2
    return encode(q, variant.dtype), encode(k, variant.dtype), encode(v, variant.dtype)


def run(compiled: Compiled, case: Case, kernel: Kernel | None = None, changed: dict[str, int] | None = None) -> Outcome:
    """Run one case. kernel: another than the variant's own; changed: parameters to falsify. Raises PtxError."""
    variant, artifact = compiled.variant, compiled.artifact
    device = Device()
    q, k, v = (Tensor(device, x.shape, case, x) for x in inputs(case, variant))
    o = Tensor(device, (case.batch, case.seqlen_q, case.heads_q, variant.head_dim_v), case)
    lse = Statistics(device, case)
    facts: dict[str, int | float] = {
        "batch": case.batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv,
        "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k,
    }  # fmt: skip
    left, right = (WINDOW_OPEN if side is None else side for side in case.window)
    values: dict[str, int | float] = dict.fromkeys((p.name for p in FWD.params), 0) | facts
    values |= {"window_left": left, "window_right": right, "scale_log2": softmax_scale(variant) * math.log2(math.e)}
    values |= {"lse": lse.address if case.lse else 0, "lse_stride_b": lse.stride_b, "lse_stride_h": lse.stride_h}
    for name, tensor in zip("qkvo", (q, k, v, o), strict=True):
        values[name] = tensor.address
        values |= {f"{name}_stride_{axis}": stride for axis, stride in tensor.strides.items()}
    steps = (kernel or compiled.kernel).run(
        device,
        grid=(artifact.grid.blocks(facts), 1, 1),
        block=(artifact.threads, 1, 1),
        params=FWD.pack(values | (changed or {})),
        smem=artifact.smem,
    )
    out, stray = o.result()
    statistics, more = lse.result()
    return Outcome(decode(out, variant.dtype), statistics if case.lse else None, stray + more, steps)


@lru_cache(maxsize=32)
def expected(case: Case, variant: Variant) -> Reference:
    q, k, v = (decode(x, variant.dtype) for x in inputs(case, variant))
    return reference(q, k, v, variant.dtype, window=case.window, scale=softmax_scale(variant))


def softmax_scale(variant: Variant) -> float:
    return variant.head_dim**-0.5
