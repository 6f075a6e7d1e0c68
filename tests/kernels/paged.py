"""Launch a variant of `fwd_paged` in the PTX interpreter: caches of pages, of which nothing foreign may be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from kernels.abi import FWD_PAGED
from registry.contract import Variant, division
from tests.kernels import launch
from tests.kernels.launch import Case, Compiled, Statistics, Tensor, Tokens, put_exact
from tests.ptx.interpreter import Device, Kernel
from tests.reference import Array, Reference, Scores, combine, decode, encode, gather, join, reference

SPARE_PAGES = 2  # pages of nobody
UNUSED = (-1, 2**31 - 1, -(2**31))  # what a page table holds behind an entry's last page
CACHE_PAD, PAGE_GAP = 16, 2**32 + 16  # elements; multiples of 16, as an e4m3 cache wants its strides


@dataclass(frozen=True)
class PagedCase(Case):
    """One call, see `Case`. Keys are no packed array: `seqused_k` are the lengths before `new` tokens came.

    page_size: 0 for no page table: an entry's keys are a page of `seqlen_k` tokens with the entry's number. Else
    seqlen_k, a table row's room, is a multiple of it. pages: how the entries' pages lie: 'permuted'; 'shared': every
    other page of an entry is the first one's; 'first': all are page 0, by numbers below 0. layout: 'apart', K and V in
    arrays of their own; 'halves' of one array; 'heads-first'; 'far', as 'apart' with pages 2**32 elements apart.
    descale: '', 'heads' or 'entries', for e4m3, as is the family 'codes': every code one after the other, but no NaN in
    k. The family 'huge', for bf16: q beyond fp16's range, k small.
    """

    page_size: int = 16
    pages: str = "permuted"
    layout: str = "apart"
    splits: int = 1
    new: int = 0
    descale: str = ""

    @property
    def keys(self) -> Tokens:
        return self.keys_and_paddings.from_the_left(self.leftpad_k)

    @property
    def keys_and_paddings(self) -> Tokens:
        used = tuple(min(max(length + self.new, -(2**31)), 2**31 - 1) for length in self.seqused_k)
        return Tokens.of(self.seqlen_k, self.batch, (), used)

    @property
    def paddings(self) -> list[int]:
        return [part.start for _, part in self.keys.entries]

    @property
    def lengths(self) -> list[int]:
        return [part.stop for _, part in self.keys.entries]

    @property
    def rows_of_a_page(self) -> int:
        return self.page_size or self.seqlen_k

    @property
    def queries_of_splits(self) -> Tokens:
        """The queries of every split's own output, one behind the other."""
        tokens = self.queries
        entries = [(j * tokens.arrays + array, part) for j in range(self.splits) for array, part in tokens.entries]
        return replace(tokens, arrays=self.splits * tokens.arrays, entries=tuple(entries))


@dataclass(frozen=True)
class PagedOutcome:
    """out (splits, tokens, heads_q, head_dim_v) and lse (splits, heads_q, tokens), of all entries end to end; the rest
    as in `launch.Outcome`."""

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


def kv_dtype(variant: Variant) -> str:
    """Of the cache."""
    return "e4m3" if "e4m3kv" in variant.features else variant.dtype


@lru_cache(maxsize=32)
def page_table(case: PagedCase) -> Array:
    """(batch, pages of a row): the entries' pages, unused places filled with `UNUSED`."""
    size = case.rows_of_a_page
    counts = [-(-length // size) if size else 0 for length in case.lengths]
    table = np.resize(np.array(UNUSED, np.int64), (case.batch, max(case.seqlen_k // size if size else 0, 1)))
    numbers = iter(np.random.default_rng(5).permutation(sum(counts) + SPARE_PAGES))
    for b, count in enumerate(counts):
        for j in range(count):
            shared = case.pages == "shared" and b and j % 2 == 0 and j < counts[0]
            table[b, j] = b if not case.page_size else table[0, j] if shared else next(numbers)
    if case.pages == "first":
        table[...] = 0
    for b, padding in enumerate(case.paddings):
        pages = slice(table.shape[1] if padding == case.lengths[b] else padding // max(size, 1))
        table[b, pages] = np.resize(UNUSED, table[b, pages].shape)
    return table


def page_count(case: PagedCase) -> int:
    """Pages of the cache."""
    if not case.page_size:
        return case.batch
    return sum(-(-length // case.page_size) for length in case.lengths) + SPARE_PAGES


def owned(case: PagedCase) -> Array:
    """Which tokens of which page belong to an entry: (pages, page_size)."""
    mine, table = np.zeros((page_count(case), case.rows_of_a_page), bool), page_table(case)
    for b, length in enumerate(case.lengths):
        token = np.arange(case.paddings[b], length)
        mine[table[b][token // max(case.rows_of_a_page, 1)], token % max(case.rows_of_a_page, 1)] = True
    return mine


def inputs(case: PagedCase, variant: Variant) -> tuple[Array, Array, Array]:
    """q, as `launch.inputs` has it, and the pages of k and v, (pages, page_size, heads_kv, dim), in bits."""
    random = np.random.default_rng(0)
    pages = page_count(case), case.rows_of_a_page, case.heads_kv
    dim, dim_v = case.dims(variant)
    q = random.standard_normal((case.queries.arrays, case.seqlen_q, case.heads_q, dim))
    k, v = (random.standard_normal((*pages, d)) for d in (dim, dim_v))
    if case.family == "huge":
        q, k = q * 2.0**20, k * 2.0**-8
    factor = 4 if case.family == "x4" else 1
    shift = 2 if case.family == "low" else 0
    cache = kv_dtype(variant)
    if case.family == "codes":
        k, v = (np.resize(np.arange(256, dtype=np.uint8), x.shape) for x in (k, v))
        return encode(q, variant.dtype), np.where(k & 0x7F == 0x7F, np.uint8(0), k), v
    return encode(factor * q + shift, variant.dtype), encode(factor * k - shift, cache), encode(factor * v, cache)


def descales(case: PagedCase) -> tuple[Array, Array] | None:
    """Of k and of v: (1 or batch, heads_kv) in fp32."""
    if not case.descale:
        return None
    rows = case.batch if case.descale == "entries" else 1
    k, v = np.random.default_rng(6).uniform(0.5, 1.5, (2, rows, case.heads_kv)).astype(np.float32)
    return k, v


def run(
    compiled: Compiled, case: PagedCase, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> PagedOutcome:
    """As `launch.run`."""
    variant, device = compiled.variant, Device()
    split = case.splits > 1
    bits = np.uint32 if split else np.uint16
    o = Tensor(device, case, case.queries_of_splits, case.heads_q, case.dims(variant)[1], kind=bits)
    lse = Statistics(device, case, case.queries_of_splits)
    q, *_ = inputs(case, variant)
    queries = Tensor(device, case, case.queries, case.heads_q, q.shape[-1], q)
    scalars = launch.scalars(case, variant) | launch.options_on(device, case, variant)
    values: dict[str, Any] = {p.name: scalars.get(p.name, 0) for p in FWD_PAGED.params}
    values |= {"q": queries.address, "o": o.address, "lse": lse.address if split or case.lse else 0}
    values |= {f"q_stride_{axis}": stride for axis, stride in queries.strides.items()}
    values |= {f"o_stride_{axis}": stride for axis, stride in o.strides.items()}
    values |= {"lse_stride_b": lse.stride_b, "lse_stride_h": lse.stride_h, "num_splits": case.splits}
    for name, outcome in (("o", o), ("lse", lse)):
        values[f"{name}_stride_split"] = case.queries.arrays * outcome.array_stride
    values |= lengths_on(device, case) | cache_on(device, case, variant) | descales_on(device, case)
    steps = 0
    if grid := launch.blocks(compiled, case) * case.splits:
        artifact = compiled.artifact
        steps = (kernel or compiled.kernel).run(
            device,
            grid=(grid, 1, 1),
            block=(artifact.threads, 1, 1),
            params=FWD_PAGED.pack(values | dict(changed or {})),
            smem=artifact.smem,
        )
    out, stray = o.result()
    statistics, more = lse.result()
    out = out.view(np.float32) if split else decode(out, variant.dtype)
    parts = statistics.reshape(case.heads_q, case.splits, -1).swapaxes(0, 1)
    has_lse = split or case.lse
    return PagedOutcome(out.reshape(case.splits, -1, *out.shape[1:]), parts if has_lse else None, stray + more, steps)


def lengths_on(device: Device, case: PagedCase) -> dict[str, int]:
    """Lengths of queries and keys and the page table on the device: of its rows what the lengths need can be read."""
    values = {"seqlen_k_new": case.new}
    for name in ("cu_seqlens_q", "seqused_q", "seqused_k", "leftpad_k"):
        if lengths := getattr(case, name):
            values[name] = put_exact(device, np.array([lengths], np.int32))
    magic, shift = division(max(case.rows_of_a_page, 1))
    values |= {"page_size": case.rows_of_a_page, "page_magic": magic, "page_shift": shift}
    if not case.page_size:
        return values
    table = page_table(case)
    rows = np.full((len(table), table.shape[1] + 3), UNUSED[0], np.int32)
    rows[:, 1:-2] = table
    used = np.zeros(rows.shape, bool)
    for b, (padding, length) in enumerate(zip(case.paddings, case.lengths, strict=True)):
        if padding < length:
            used[b, 1 + padding // case.page_size : 1 + -(-length // case.page_size)] = True
    if case.pages == "first":
        rows[used] = np.resize((-1, -(2**31)), used.sum())
    return values | {"page_table": device.put(rows, used) + 4, "page_table_stride": rows.shape[1]}


def cache_on(device: Device, case: PagedCase, variant: Variant) -> dict[str, int]:
    """The pages on the device, 0xFF and not to be loaded wherever they belong to no entry: addresses and strides."""
    _, k, v = inputs(case, variant)
    if case.layout == "halves":
        pages, size, heads, _ = k.shape
        shape = (pages, 2, size, heads, max(k.shape[-1], v.shape[-1]))
        return put_pages(device, case, shape, {
            "k": (k, lambda buffer: buffer[:, 0, :, :, : k.shape[-1]]),
            "v": (v, lambda buffer: buffer[:, 1, :, :, : v.shape[-1]]),
        })  # fmt: skip
    values: dict[str, int] = {}
    for name, bits in (("k", k), ("v", v)):
        pages, size, heads, dim = bits.shape
        heads_first = case.layout == "heads-first"
        outer = (heads + 1, size + 1) if heads_first else (size + 1, heads + 1)

        def inside(buffer: Array, heads_first: bool = heads_first) -> Array:
            part = buffer[:, 1:, 1:, CACHE_PAD:]
            return part.swapaxes(1, 2) if heads_first else part

        values |= put_pages(device, case, (pages, *outer, dim + CACHE_PAD), {name: (bits, inside)})
    return values


def put_pages(
    device: Device, case: PagedCase, shape: tuple[int, ...], tensors: dict[str, tuple[Array, Callable[[Array], Array]]]
) -> dict[str, int]:
    """Addresses and strides of tensors (pages, page_size, heads, dim) that are parts of one buffer.

    tensors: their bits, and which part of the buffer each is.
    """
    kind = next(iter(tensors.values()))[0].dtype
    buffer, mine = np.full(shape, np.iinfo(kind).max, kind), owned(case)
    defined = np.zeros(shape, bool)
    for bits, part in tensors.values():
        part(buffer)[mine], part(defined)[mine] = bits[mine], True
    first, stride = device.next, PAGE_GAP if case.layout == "far" else buffer.strides[0] // kind.itemsize
    if case.layout == "far":
        for page in range(len(buffer)):
            device.put(buffer[page], defined[page], at=first + page * stride * kind.itemsize)
    else:
        device.put(buffer, defined)
    values: dict[str, int] = {}
    for name, (_, part) in tensors.items():
        view = part(buffer)
        offset = view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
        strides = [size // kind.itemsize for size in view.strides]
        values |= {name: first + offset, f"{name}_stride_b": stride}
        values |= {f"{name}_stride_s": strides[1], f"{name}_stride_h": strides[2]}
    return values


def descales_on(device: Device, case: PagedCase) -> dict[str, int]:
    """Null where absent."""
    values: dict[str, int] = {}
    for name, rows in zip(("k_descale", "v_descale"), descales(case) or (), strict=False):
        stride = rows.shape[1] + 1 if case.descale == "entries" else 0
        values |= {name: put_exact(device, rows), f"{name}_stride_b": stride}
    return values


@lru_cache(maxsize=32)
def expected(case: PagedCase, variant: Variant) -> Reference:
    """Every entry by itself, its pages gathered, then end to end. An e4m3 cache counts as what it stands for."""
    q, k, v = inputs(case, variant)
    q, k, v = decode(q, variant.dtype), decode(k, kv_dtype(variant)), decode(v, kv_dtype(variant))
    weights, rows = launch.sink(case, variant), launch.slopes(case)
    if weights is not None and case.sink == "low":
        weights = decode(weights, variant.dtype)
    factors = descales(case) or (np.ones((1, case.heads_kv), np.float32),) * 2
    entries = []
    for b, (i, tokens) in enumerate(case.queries.entries):
        alibi = None if rows is None else rows[b % len(rows)]
        scores = Scores(launch.softmax_scale(case, variant), case.window, case.softcap, alibi, weights)
        keys, values = (
            gather(pages, page_table(case)[b], case.lengths[b], case.paddings[b])[None]
            * factor[b % len(factor), :, None]
            for pages, factor in zip((k, v), factors, strict=True)
        )
        entries.append(reference(q[i : i + 1, tokens], keys, values, variant.dtype, scores))
    return join(entries)
