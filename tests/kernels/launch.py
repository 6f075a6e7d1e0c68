"""Launch a forward variant in the PTX interpreter, with inputs and outputs laid out to show every stray access."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from registry.contract import WINDOW_OPEN, Artifact, Variant, fast_divmod
from tests.ptx.interpreter import Device, Kernel
from tests.reference import Array, Reference, Scores, Window, decode, encode, join, reference
from tests.support.abis import FWD

PAD = 8  # elements of NaN beside each row of head_dim; a multiple of 8, as strides must be
FAR_TOKENS = 2**26  # skipped in front of a far packed array: times any stride of a token, more than 32 bits can count


@dataclass(frozen=True)
class Case:
    """One call.

    seqlen_q, seqlen_k: tokens of an entry, or of the whole array where cu_seqlens places its entries. head_dim,
    head_dim_v: 0 for the variant's. family: 'normal', 'x4' or 'low' (all logits far below 0). heads_first: each array
    is (heads, seqlen, dim) in memory. far: batch entries lie 2**32 elements apart, packed keys as far into their array.
    sink: '', 'fp32' or 'low' (the variant's dtype). alibi: '', 'heads' or 'entries' (slopes of each entry's own).
    pack: the query heads of a key/value head share tiles. leftpad_k: how many of each entry's first keys do not exist.
    """

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
    head_dim: int = 0
    head_dim_v: int = 0
    softcap: float = 0.0
    sink: str = ""
    alibi: str = ""
    pack: bool = False
    cu_seqlens_q: tuple[int, ...] = ()
    cu_seqlens_k: tuple[int, ...] = ()
    seqused_q: tuple[int, ...] = ()
    seqused_k: tuple[int, ...] = ()
    leftpad_k: tuple[int, ...] = ()

    @property
    def queries(self) -> Tokens:
        return Tokens.of(self.seqlen_q, self.batch, self.cu_seqlens_q, self.seqused_q)

    @property
    def keys(self) -> Tokens:
        return Tokens.of(self.seqlen_k, self.batch, self.cu_seqlens_k, self.seqused_k).from_the_left(self.leftpad_k)

    @property
    def paddings(self) -> list[int]:
        """Of each entry, as the device clamps them."""
        whole = Tokens.of(self.seqlen_k, self.batch, self.cu_seqlens_k, self.seqused_k)
        starts = zip(whole.entries, self.keys.entries, strict=True)
        return [part.start - all_keys.start for (_, all_keys), (_, part) in starts]

    def dims(self, variant: Variant) -> tuple[int, int]:
        """(head_dim, head_dim_v)."""
        return self.head_dim or variant.head_dim, self.head_dim_v or variant.head_dim_v


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of the batch entries lie: (array, tokens) of each. A packed array holds all entries."""

    seqlen: int
    arrays: int
    is_packed: bool
    entries: tuple[tuple[int, slice], ...]

    @classmethod
    def of(cls, seqlen: int, batch: int, cu_seqlens: Sequence[int], seqused: Sequence[int]) -> Tokens:
        """Bad lengths are clamped to the array, as the device does."""
        entries = []
        for b in range(batch):
            stop = min(max(cu_seqlens[b + 1], 0), seqlen) if cu_seqlens else seqlen
            start = min(max(cu_seqlens[b], 0), stop) if cu_seqlens else 0
            length = min(max(seqused[b], 0), stop - start) if seqused else stop - start
            entries.append((0 if cu_seqlens else b, slice(start, start + length)))
        return cls(seqlen, 1 if cu_seqlens else batch, bool(cu_seqlens), tuple(entries))

    def from_the_left(self, leftpad: Sequence[int]) -> Tokens:
        """Without the first tokens of each entry, as many as `leftpad` says and there are."""
        if not leftpad:
            return self
        entries = [
            (array, slice(min(part.start + max(pad, 0), part.stop), part.stop))
            for (array, part), pad in zip(self.entries, leftpad, strict=True)
        ]
        return replace(self, entries=tuple(entries))


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
    """What a launch left behind: values in fp32 of all entries end to end, out (tokens, heads_q, head_dim_v) and lse
    (heads_q, tokens); stray: bytes changed outside of them; steps: instructions executed, counted once a block."""

    out: Array
    lse: Array | None
    stray: int
    steps: int


class Tensor:
    """(arrays, seqlen, heads, dim) on the device, each array inside a larger buffer of NaN of its own.

    Loading a byte of a buffer that is no part of an entry is a fault, as is an address outside the buffers.
    """

    def __init__(
        self, device: Device, case: Case, tokens: Tokens, heads: int, dim: int, values: Array | None = None,
        kind: type = np.uint16,
    ):  # fmt: skip
        """values: bits for an input; an output has none, and loading it before it is stored is a fault.

        kind: the integers that hold an element's bits.
        """
        self.device, self.heads_first, self.tokens, self.kind = device, case.heads_first, tokens, kind
        self.nothing = np.iinfo(kind).max
        outer = (heads + 1, tokens.seqlen + 1) if case.heads_first else (tokens.seqlen + 1, heads + 1)
        self.buffer_shape = (*outer, dim + PAD)
        buffer = np.full(self.buffer_shape, self.nothing, kind)
        self.array_stride = batch_stride(buffer.size, case.far)
        first = device.next
        self.bases = []
        for array in range(tokens.arrays):
            filled, defined = buffer.copy(), np.zeros(self.buffer_shape, bool)
            if values is not None:
                for part in parts(tokens, array):
                    self.inside(filled)[part] = values[array, part]
                    self.inside(defined)[part] = True
            self.bases.append(device.put(filled, defined, at=first + buffer.itemsize * array * self.array_stride))
        stride_s, stride_h, _ = (stride // buffer.itemsize for stride in self.inside(buffer).strides)
        self.strides = {"b": 0 if tokens.is_packed else self.array_stride, "s": stride_s, "h": stride_h}
        self.address = first + sum(buffer.strides[:2]) + buffer.itemsize * PAD

    def inside(self, buffer: Array) -> Array:
        """The tensor's own part of a buffer, as (seqlen, heads, dim)."""
        part = buffer[1:, 1:, PAD:]
        return part.swapaxes(0, 1) if self.heads_first else part

    def result(self) -> tuple[Array, int]:
        """(bits of all entries, (tokens, heads, dim); bytes changed outside them)."""
        buffers = [self.device.get(base, self.kind).reshape(self.buffer_shape).copy() for base in self.bases]
        bits = [self.inside(buffers[array])[part].copy() for array, part in self.tokens.entries]
        for array, part in self.tokens.entries:
            self.inside(buffers[array])[part] = self.nothing
        return np.concatenate(bits), changed_bytes(buffers)


class Statistics:
    """The LSE, (arrays, heads, seqlen_q) in fp32, with room around each row."""

    def __init__(self, device: Device, case: Case, tokens: Tokens | None = None):
        """tokens: the call's queries by default."""
        self.device, self.tokens = device, tokens or case.queries
        self.shape = (case.heads_q + 1, case.seqlen_q + 3)
        buffer = np.full(self.shape, 0xFFFFFFFF, np.uint32)
        self.array_stride = batch_stride(buffer.size, case.far)
        first = device.next
        nothing = np.zeros(self.shape, bool)
        places = (first + 4 * array * self.array_stride for array in range(self.tokens.arrays))
        self.bases = [device.put(buffer, nothing, at=place) for place in places]
        self.stride_b, self.stride_h = 0 if self.tokens.is_packed else self.array_stride, self.shape[1]
        self.address = first + 4

    def result(self) -> tuple[Array, int]:
        """(values of all entries, (heads, tokens); bytes changed outside them)."""
        buffers = [self.device.get(base, np.float32).reshape(self.shape).copy() for base in self.bases]
        values = [buffers[array][:-1, 1:-2][:, part].copy() for array, part in self.tokens.entries]
        for array, part in self.tokens.entries:
            buffers[array][:-1, 1:-2][:, part].view(np.uint32)[...] = 0xFFFFFFFF
        return np.concatenate(values, axis=1), changed_bytes(buffers)


def parts(tokens: Tokens, array: int) -> list[slice]:
    """The tokens of an array that belong to entries."""
    return [part for number, part in tokens.entries if number == array]


def changed_bytes(buffers: list[Array]) -> int:
    return sum(int(np.count_nonzero(buffer.view(np.uint8) != 0xFF)) for buffer in buffers)


def batch_stride(size: int, far: bool) -> int:
    """Elements between batch entries of `size` elements: with a wide gap, or beyond what 32 bits can count."""
    return (2**32 if far else -(-size // 8) * 8 + 2**20) + 8


def put_exact(device: Device, rows: Array) -> int:
    """The address of (rows, columns), aligned like one element only; there is nothing to load around each row."""
    buffer = np.zeros((len(rows) + 1, rows.shape[1] + 1), rows.dtype)
    defined = np.zeros(buffer.shape, bool)
    buffer[:-1, 1:], defined[:-1, 1:] = rows, True
    return device.put(buffer, defined) + rows.itemsize


def inputs(case: Case, variant: Variant) -> tuple[Array, Array, Array]:
    """q, k, v as uint16 bits, always the same ones."""
    random = np.random.default_rng(0)
    dim, dim_v = case.dims(variant)
    q = random.standard_normal((case.queries.arrays, case.seqlen_q, case.heads_q, dim))
    k = random.standard_normal((case.keys.arrays, case.seqlen_k, case.heads_kv, dim))
    v = random.standard_normal((case.keys.arrays, case.seqlen_k, case.heads_kv, dim_v))
    if case.family == "x4":
        q, k, v = 4 * q, 4 * k, 4 * v
    elif case.family == "low":
        q, k = q + 2, k - 2
    return encode(q, variant.dtype), encode(k, variant.dtype), encode(v, variant.dtype)


def sink(case: Case, variant: Variant) -> Array | None:
    """(heads_q,) in fp32, or as uint16 bits of the variant's dtype: near the largest logits, so that it counts."""
    if not case.sink:
        return None
    level = {"normal": 3.0, "x4": 30.0, "low": -4 * case.dims(variant)[0] ** 0.5}[case.family]
    if case.softcap:
        level = case.softcap * math.tanh(level / case.softcap)
    values = (level + np.random.default_rng(1).standard_normal(case.heads_q)).astype(np.float32)
    return encode(values, variant.dtype) if case.sink == "low" else values


def slopes(case: Case) -> Array | None:
    """(1 or batch, heads_q) in fp32, of either sign; biases stay small enough for distant keys to count."""
    if not case.alibi:
        return None
    rows = case.batch if case.alibi == "entries" else 1
    return np.random.default_rng(2).uniform(-0.03, 0.05, (rows, case.heads_q)).astype(np.float32)


def pack(case: Case) -> int:
    """Query heads that share a tile."""
    return case.heads_q // case.heads_kv if case.pack else 1


def run(
    compiled: Compiled,
    case: Case,
    kernel: Kernel | None = None,
    changed: Mapping[str, int] | None = None,
) -> Outcome:
    """Run one case. kernel: another than the variant's own; changed: parameters to falsify. Raises PtxError."""
    variant, artifact, device = compiled.variant, compiled.artifact, Device()
    o = Tensor(device, case, case.queries, case.heads_q, case.dims(variant)[1])
    lse = Statistics(device, case)
    values: dict[str, Any] = dict.fromkeys((p.name for p in FWD.params), 0) | scalars(case, variant)
    values |= inputs_on(device, case, variant) | options_on(device, case, variant) | lengths_on(device, case)
    values |= {"o": o.address} | {f"o_stride_{axis}": stride for axis, stride in o.strides.items()}
    values |= {"lse": lse.address if case.lse else 0, "lse_stride_b": lse.stride_b, "lse_stride_h": lse.stride_h}
    steps = 0
    if grid := blocks(compiled, case):  # a launch without blocks is an error: the runtime does nothing
        steps = (kernel or compiled.kernel).run(
            device,
            grid=(grid, 1, 1),
            block=(artifact.threads, 1, 1),
            params=FWD.pack(values | dict(changed or {})),
            smem=artifact.smem,
        )
    out, stray = o.result()
    statistics, more = lse.result()
    return Outcome(decode(out, variant.dtype), statistics if case.lse else None, stray + more, steps)


def blocks(compiled: Compiled, case: Case) -> int:
    """Blocks that the runtime launches."""
    facts = {"batch": case.batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv, "seqlen_q": case.seqlen_q}
    facts |= {"varlen": int(case.queries.is_packed), "total_q": case.queries.arrays * case.seqlen_q}
    return compiled.artifact.grid.blocks(facts, pack(case))


def scalars(case: Case, variant: Variant) -> dict[str, Any]:
    """Sizes, window and scale."""
    dim, dim_v = case.dims(variant)
    left, right = (WINDOW_OPEN if side is None else side for side in case.window)
    magic, shift = fast_divmod(pack(case))
    scale = softmax_scale(case, variant)
    values = {"batch": case.batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv}
    values |= {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k + skipped_keys(case)}
    values |= {"head_dim": dim, "head_dim_v": dim_v, "window_left": left, "window_right": right}
    values |= {"pack": pack(case), "pack_magic": magic, "pack_shift": shift}
    if case.softcap:
        log2_e = math.log2(math.e)
        return values | {"scale_log2": case.softcap * log2_e, "softcap_scale": 2 * log2_e * scale / case.softcap}
    return values | {"scale_log2": scale * math.log2(math.e)}


def inputs_on(device: Device, case: Case, variant: Variant) -> dict[str, int]:
    """q, k and v on the device: addresses and strides."""
    values: dict[str, int] = {}
    sides = ((case.queries, case.heads_q), (case.keys, case.heads_kv), (case.keys, case.heads_kv))
    for name, bits, (tokens, heads) in zip("qkv", inputs(case, variant), sides, strict=True):
        tensor = Tensor(device, case, tokens, heads, bits.shape[-1], bits)
        before = 0 if name == "q" else 2 * skipped_keys(case) * tensor.strides["s"]
        values |= {name: tensor.address - before}
        values |= {f"{name}_stride_{axis}": stride for axis, stride in tensor.strides.items()}
    return values


def lengths_on(device: Device, case: Case) -> dict[str, int]:
    """cu_seqlens, seqused and leftpad on the device; null where absent."""
    values: dict[str, int] = {}
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k"):
        if lengths := getattr(case, name):
            before = skipped_keys(case) if name == "cu_seqlens_k" else 0
            values[name] = put_exact(device, np.array([lengths], np.int32) + before)
    return values


def options_on(device: Device, case: Case, variant: Variant) -> dict[str, int]:
    """Sink and ALiBi slopes on the device; null where absent."""
    values: dict[str, int] = {}
    if (weights := sink(case, variant)) is not None:
        values |= {"sink": put_exact(device, weights[None]), "sink_low": int(case.sink == "low")}
    if (rows := slopes(case)) is not None:
        stride = rows.shape[1] + 1 if case.alibi == "entries" else 0
        values |= {"alibi_slopes": put_exact(device, rows), "alibi_stride_b": stride}
    return values


def skipped_keys(case: Case) -> int:
    """Tokens in front of the keys that exist in the address space alone."""
    return FAR_TOKENS if case.far and case.keys.is_packed else 0


@lru_cache(maxsize=32)
def expected(case: Case, variant: Variant) -> Reference:
    """Every entry by itself, then end to end, as in `Outcome`."""
    q, k, v = (decode(x, variant.dtype) for x in inputs(case, variant))
    weights, rows = sink(case, variant), slopes(case)
    if weights is not None and case.sink == "low":
        weights = decode(weights, variant.dtype)
    entries = []
    for b, ((i, tokens), (j, keys)) in enumerate(zip(case.queries.entries, case.keys.entries, strict=True)):
        alibi, pad = None if rows is None else rows[b % len(rows)], case.paddings[b]
        keys = slice(keys.start - pad, keys.stop)
        scores = Scores(softmax_scale(case, variant), case.window, case.softcap, alibi, weights, pad)
        entries.append(reference(q[i : i + 1, tokens], k[j : j + 1, keys], v[j : j + 1, keys], variant.dtype, scores))
    return join(entries)


def softmax_scale(case: Case, variant: Variant) -> float:
    return case.dims(variant)[0] ** -0.5
