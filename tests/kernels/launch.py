"""Launch a forward variant, dense or over a cache, in the PTX interpreter, and judge what it left behind.

Inputs and outputs are laid out to show every stray access. What differs where keys lie in a cache is in `cache`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from registry.contract import WINDOW_OPEN, Abi, Artifact, Variant, fast_divmod
from tests.kernels import cache, faults
from tests.kernels.arrays import Statistics, Tensor, put_exact
from tests.ptx.interpreter import Device, Kernel
from tests.reference import Array, Reference, Scores, combine, decode, encode, join, reference, yardstick
from tests.support.abis import ABIS
from tests.support.call import Call, Dims, Tokens

FAR_TOKENS = 2**26  # skipped in front of a far packed array: times any stride of a token, more than 32 bits can count


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
    """What a launch left behind: values in fp32 of each split, of all entries end to end, out (splits, tokens, heads_q,
    head_dim_v) and lse (splits, heads_q, tokens); stray: bytes changed outside of them; steps: instructions executed,
    counted once a block."""

    out: Array
    lse: Array | None
    stray: int
    steps: int

    def combined(self, dtype: str) -> tuple[Array, Array | None]:
        """(out, lse) of all splits as values of the output dtype."""
        if len(self.out) == 1 or self.lse is None:
            return self.out[0], None if self.lse is None else self.lse[0]
        out, lse = combine(self.out, self.lse.swapaxes(1, 2))
        return decode(encode(out, dtype), dtype), lse.T


# ---- inputs ----------------------------------------------------------------------------------------------------------
def dims(case: Call, variant: Variant) -> Dims:
    return case.head_dim or variant.head_dim, case.head_dim_v or variant.head_dim_v


def kv_dtype(variant: Variant) -> str:
    """Of the keys and values."""
    return "e4m3" if "e4m3kv" in variant.features else variant.dtype


def softmax_scale(case: Call, variant: Variant) -> float:
    return dims(case, variant)[0] ** -0.5


def pack(case: Call) -> int:
    """Query heads that share a tile."""
    return case.heads_q // case.heads_kv if case.pack else 1


def splits(case: Call) -> int:
    return max(case.num_splits, 1)


def inputs(case: Call, variant: Variant) -> tuple[Array, Array, Array]:
    """Bits of q, k, v, always the same ones; of a cache k and v are (pages, page_size, heads_kv, dim).

    Families of the cache alone: 'codes' are all of e4m3 one after the other, but no NaN in k; 'huge', for bf16, are q
    beyond fp16's range and small k.
    """
    random, (dim, dim_v) = np.random.default_rng(0), dims(case, variant)
    rows = cache.pages_shape(case) if case.cache else (case.keys.arrays, case.seqlen_k)
    q = random.standard_normal((case.queries.arrays, case.seqlen_q, case.heads_q, dim))
    k, v = (random.standard_normal((*rows, case.heads_kv, d)) for d in (dim, dim_v))
    if case.family == "times4":
        q, k, v = 4 * q, 4 * k, 4 * v
    elif case.family == "far_below":  # all logits
        q, k = q + 2, k - 2
    elif case.family == "huge":
        q, k = q * 2.0**20, k * 2.0**-8
    elif case.family == "codes":
        k, v = (np.resize(np.arange(256, dtype=np.uint8), x.shape) for x in (k, v))
        return encode(q, variant.dtype), np.where(k & 0x7F == 0x7F, np.uint8(0), k), v
    return encode(q, variant.dtype), encode(k, kv_dtype(variant)), encode(v, kv_dtype(variant))


def sink(case: Call, variant: Variant) -> Array | None:
    """(heads_q,) in fp32, or as uint16 bits of the variant's dtype: near the largest logits, so that it counts."""
    if not case.sink:
        return None
    level = {"normal": 3.0, "times4": 30.0, "far_below": -4 * dims(case, variant)[0] ** 0.5}[case.family]
    if case.softcap:
        level = case.softcap * math.tanh(level / case.softcap)
    values = (level + np.random.default_rng(1).standard_normal(case.heads_q)).astype(np.float32)
    return encode(values, variant.dtype) if case.sink == "low" else values


def sink_values(case: Call, variant: Variant) -> Array | None:
    """(heads_q,) in fp32."""
    values = sink(case, variant)
    return decode(values, variant.dtype) if values is not None and case.sink == "low" else values


def slopes(case: Call) -> Array | None:
    """(1 or batch, heads_q) in fp32, of either sign; biases stay small enough for distant keys to count."""
    if not case.alibi:
        return None
    rows = case.batch if case.alibi == "batch" else 1
    return np.random.default_rng(2).uniform(-0.03, 0.05, (rows, case.heads_q)).astype(np.float32)


def skipped_keys(case: Call) -> int:
    """Tokens in front of the keys that exist in the address space alone."""
    return FAR_TOKENS if case.far and case.keys.is_packed else 0


# ---- parameters: sizes, and what lies on the device, by name; null where absent --------------------------------------
def scalars(case: Call, variant: Variant) -> dict[str, Any]:
    """Sizes, window and scale."""
    dim, dim_v = dims(case, variant)
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


def queries_on(device: Device, case: Call, variant: Variant) -> dict[str, int]:
    q, _, _ = inputs(case, variant)
    return placed("q", Tensor(device, case, case.queries, case.heads_q, q.shape[-1], q))


def keys_on(device: Device, case: Call, variant: Variant) -> dict[str, int]:
    """k and v that lie in no cache."""
    values: dict[str, int] = {}
    for name, bits in zip("kv", inputs(case, variant)[1:], strict=True):
        tensor = Tensor(device, case, case.keys, case.heads_kv, bits.shape[-1], bits)
        values |= placed(name, tensor, 2 * skipped_keys(case) * tensor.strides["s"])
    return values


def cache_on(device: Device, case: Call, variant: Variant) -> dict[str, int]:
    """The page table, the pages that k and v lie in, their descales."""
    _, k, v = inputs(case, variant)
    return cache.table_on(device, case) | cache.pages_on(device, case, k, v) | cache.descales_on(device, case)


def placed(name: str, tensor: Tensor, before: int = 0) -> dict[str, int]:
    """before: bytes in front of the tensor that the address space alone has."""
    strides = {f"{name}_stride_{axis}": stride for axis, stride in tensor.strides.items()}
    return {name: tensor.address - before, **strides}


def options_on(device: Device, case: Call, variant: Variant) -> dict[str, int]:
    """Sink and ALiBi slopes."""
    values: dict[str, int] = {}
    if (weights := sink(case, variant)) is not None:
        values |= {"sink": put_exact(device, weights[None]), "sink_low": int(case.sink == "low")}
    if (rows := slopes(case)) is not None:
        stride = rows.shape[1] + 1 if case.alibi == "batch" else 0
        values |= {"alibi_slopes": put_exact(device, rows), "alibi_stride_b": stride}
    return values


def lengths_on(device: Device, case: Call, variant: Variant | None = None) -> dict[str, int]:
    values: dict[str, int] = {"seqlen_k_new": case.append.tokens if case.append else 0}
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k"):
        if (lengths := getattr(case, name)) is not None:
            before = skipped_keys(case) if name == "cu_seqlens_k" else 0
            values[name] = put_exact(device, np.array([lengths], np.int32) + before)
    return values


DENSE = (queries_on, keys_on, options_on, lengths_on)
CACHED = (queries_on, options_on, lengths_on, cache_on)


# ---- runs ------------------------------------------------------------------------------------------------------------
def launch(
    compiled: Compiled, device: Device, abi: Abi, values: Mapping[str, Any], grid: int, kernel: Kernel | None = None,
    changed: Mapping[str, int] | None = None, order: Sequence[int] | None = None,
) -> int:  # fmt: skip
    """Run a variant's kernel, or another in its place, and return the instructions executed. Raises PtxError.

    values: parameters by name, 0 for others; changed: of them, some to falsify.
    """
    values = {**values, **(changed or {})}
    return (kernel or compiled.kernel).run(
        device, grid=(grid, 1, 1), block=(compiled.artifact.threads, 1, 1), smem=compiled.artifact.smem, order=order,
        params=abi.pack({p.name: values.get(p.name, 0) for p in abi.params}),
    )  # fmt: skip


def run(
    compiled: Compiled, case: Call, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> Outcome:
    """Run one case. kernel: another than the variant's own; changed: parameters to falsify. Raises PtxError."""
    variant, device, split = compiled.variant, Device(), splits(case) > 1
    tokens, has_lse = queries_of_splits(case), split or case.lse
    o = Tensor(device, case, tokens, case.heads_q, dims(case, variant)[1], kind=np.uint32 if split else np.uint16)
    lse = Statistics(device, case, tokens)
    values: dict[str, Any] = scalars(case, variant)
    for on_device in CACHED if case.cache else DENSE:
        values |= on_device(device, case, variant)
    values |= placed("o", o) | {"lse": lse.address if has_lse else 0, "num_splits": splits(case)}
    values |= {"lse_stride_b": lse.stride_b, "lse_stride_h": lse.stride_h}
    for name, outcome in (("o", o), ("lse", lse)):
        values[f"{name}_stride_split"] = case.queries.arrays * outcome.array_stride
    steps = 0
    if grid := blocks(compiled, case) * splits(case):  # a launch without blocks is an error: the runtime does nothing
        steps = launch(compiled, device, ABIS[variant.op], values, grid, kernel, changed)
    bits, stray = o.result()
    statistics, more = lse.result()
    out = bits.view(np.float32) if split else decode(bits, variant.dtype)
    parts = statistics.reshape(case.heads_q, splits(case), -1).swapaxes(0, 1)
    size = (splits(case), len(out) // splits(case), *out.shape[1:])
    return Outcome(out.reshape(size), parts if has_lse else None, stray + more, steps)


def blocks(compiled: Compiled, case: Call) -> int:
    """Blocks that the runtime launches for a split."""
    facts = {"batch": case.batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv, "seqlen_q": case.seqlen_q}
    facts |= {"varlen": int(case.queries.is_packed), "total_q": case.queries.arrays * case.seqlen_q}
    return compiled.artifact.grid.blocks(facts, pack(case))


def queries_of_splits(case: Call) -> Tokens:
    """The queries of every split's own output, one behind the other."""
    tokens, count = case.queries, splits(case)
    entries = [(j * tokens.arrays + array, part) for j in range(count) for array, part in tokens.entries]
    return replace(tokens, arrays=count * tokens.arrays, entries=tuple(entries), paddings=tokens.paddings * count)


@lru_cache(maxsize=32)
def expected(case: Call, variant: Variant) -> Reference:
    """Every entry by itself, then end to end, as in `Outcome`."""
    q, weights, rows = decode(inputs(case, variant)[0], variant.dtype), sink_values(case, variant), slopes(case)
    entries = []
    for b, ((i, tokens), (k, v, pad)) in enumerate(zip(case.queries.entries, keys_of(case, variant), strict=True)):
        alibi = None if rows is None else rows[b % len(rows)]
        scores = Scores(softmax_scale(case, variant), case.window, case.softcap, alibi, weights, pad)
        entries.append(reference(q[i : i + 1, tokens], k, v, variant.dtype, scores))
    return join(entries)


def keys_of(case: Call, variant: Variant) -> list[tuple[Array, Array, int]]:
    """(k, v, how many in front are padding) of each entry: those of a cache without their padding."""
    k, v = (decode(x, kv_dtype(variant)) for x in inputs(case, variant)[1:])
    if case.cache:
        return [(keys, values, 0) for keys, values in cache.gathered(case, k, v)]
    found = []
    for (array, part), pad in zip(case.keys.entries, case.keys.paddings, strict=True):
        at = slice(array, array + 1), slice(part.start - pad, part.stop)
        found.append((k[at], v[at], pad))
    return found


def problems(outcome: Outcome, case: Call, variant: Variant, rms_rows: int = 0) -> list[str]:
    """What is wrong with it; empty if nothing is."""
    right, (out, lse) = expected(case, variant), outcome.combined(variant.dtype)
    found = [f"{outcome.stray} bytes outside the output or the LSE were written"] if outcome.stray else []
    found += yardstick(out, right, lse, rms_rows)
    if not np.isfinite(outcome.out).all():
        found.append("not all of the output, or of its parts, is finite")
    if outcome.out[:, ~right.out.any(-1)].any():
        found.append("a row that sees no key is not exactly 0")
    if outcome.lse is not None and outcome.out[np.isneginf(outcome.lse.swapaxes(1, 2))].any():
        found.append("a part without keys is not exactly 0")
    return found


def check(compiled: Compiled, case: Call, rms_rows: int = 0) -> Outcome:
    """The case's outcome, which has nothing wrong."""
    outcome = run(compiled, case)
    assert problems(outcome, case, compiled.variant, rms_rows) == []
    return outcome


def caught(
    compiled: Compiled, cases: Iterable[Call], kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> str:
    """What gave a fault away, or '' if nothing did."""
    return faults.caught(cases, lambda case: problems(run(compiled, case, kernel, changed), case, compiled.variant))
