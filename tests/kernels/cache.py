"""The memory of keys and values that lie in a cache of pages, of which nothing foreign may be read.

`seqused_k` are lengths before new tokens came. A call without a page table has a page of `seqlen_k` tokens for each
entry, with the entry's number; else `seqlen_k`, a table row's room, is a multiple of the page size. In 'shared' order
every other page of an entry is the first one's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from registry.contract import fast_divmod
from tests.kernels.arrays import put_exact
from tests.ptx.interpreter import Device
from tests.reference import Array, gather
from tests.support.call import Cache, Call

SPARE_PAGES = 2  # pages of nobody
UNUSED = (-1, 2**31 - 1, -(2**31))  # what a page table holds behind an entry's last page
CACHE_PAD, PAGE_GAP = 16, 2**32 + 16  # elements; multiples of 16, as an e4m3 cache wants its strides


def of(case: Call) -> Cache:
    assert case.cache is not None
    return case.cache


def rows_of_a_page(case: Call) -> int:
    size = of(case).page_size
    return case.seqlen_k if size is None else size


def ends(case: Call) -> list[int]:
    """Where each entry's tokens end."""
    return [part.stop for _, part in case.keys.entries]


@lru_cache(maxsize=32)
def page_table(case: Call) -> Array:
    """(batch, pages of a row): the entries' pages, unused places filled with `UNUSED`."""
    size = rows_of_a_page(case)
    counts = [-(-length // size) if size else 0 for length in ends(case)]
    table = np.resize(np.array(UNUSED, np.int64), (case.batch, max(case.seqlen_k // size if size else 0, 1)))
    numbers = iter(np.random.default_rng(5).permutation(sum(counts) + SPARE_PAGES))
    for b, count in enumerate(counts):
        for j in range(count):
            shared = of(case).order == "shared" and b and j % 2 == 0 and j < counts[0]
            table[b, j] = b if of(case).page_size is None else table[0, j] if shared else next(numbers)
    if of(case).order == "first":
        table[...] = 0
    for b, padding in enumerate(case.keys.paddings):
        pages = slice(table.shape[1] if padding == ends(case)[b] else padding // max(size, 1))
        table[b, pages] = np.resize(UNUSED, table[b, pages].shape)
    return table


def page_count(case: Call) -> int:
    """Pages of the cache."""
    if of(case).page_size is None:
        return case.batch
    return sum(-(-length // rows_of_a_page(case)) for length in ends(case)) + SPARE_PAGES


def pages_shape(case: Call) -> tuple[int, int]:
    return page_count(case), rows_of_a_page(case)


def owned(case: Call) -> Array:
    """Which tokens of which page belong to an entry: (pages, page_size)."""
    mine, table = np.zeros((page_count(case), rows_of_a_page(case)), bool), page_table(case)
    for b, length in enumerate(ends(case)):
        token = np.arange(case.keys.paddings[b], length)
        mine[table[b][token // max(rows_of_a_page(case), 1)], token % max(rows_of_a_page(case), 1)] = True
    return mine


def descales(case: Call) -> tuple[Array, Array] | None:
    """Of k and of v: (1 or batch, heads_kv) in fp32."""
    if not of(case).descale:
        return None
    rows = case.batch if of(case).descale == "batch" else 1
    k, v = np.random.default_rng(6).uniform(0.5, 1.5, (2, rows, case.heads_kv)).astype(np.float32)
    return k, v


def table_on(device: Device, case: Call) -> dict[str, int]:
    """The page table on the device: of its rows what the lengths need can be read."""
    size = rows_of_a_page(case)
    magic, shift = fast_divmod(max(size, 1))
    values = {"page_size": size, "page_magic": magic, "page_shift": shift}
    if of(case).page_size is None:
        return values
    table = page_table(case)
    rows = np.full((len(table), table.shape[1] + 3), UNUSED[0], np.int32)
    rows[:, 1:-2] = table
    used = np.zeros(rows.shape, bool)
    for b, (padding, length) in enumerate(zip(case.keys.paddings, ends(case), strict=True)):
        if padding < length:
            used[b, 1 + padding // size : 1 + -(-length // size)] = True
    if of(case).order == "first":
        rows[used] = np.resize((-1, -(2**31)), used.sum())
    return values | {"page_table": device.put(rows, used) + 4, "page_table_stride": rows.shape[1]}


def pages_on(device: Device, case: Call, k: Array, v: Array) -> dict[str, int]:
    """The pages on the device, 0xFF and not to be loaded wherever they belong to no entry: addresses and strides."""
    if of(case).halves:
        pages, size, heads, _ = k.shape
        shape = (pages, 2, size, heads, max(k.shape[-1], v.shape[-1]))
        return put_pages(device, case, shape, {
            "k": (k, lambda buffer: buffer[:, 0, :, :, : k.shape[-1]]),
            "v": (v, lambda buffer: buffer[:, 1, :, :, : v.shape[-1]]),
        })  # fmt: skip
    values: dict[str, int] = {}
    for name, bits in (("k", k), ("v", v)):
        pages, size, heads, dim = bits.shape
        heads_first = of(case).heads_first
        outer = (heads + 1, size + 1) if heads_first else (size + 1, heads + 1)

        def inside(buffer: Array, heads_first: bool = heads_first) -> Array:
            part = buffer[:, 1:, 1:, CACHE_PAD:]
            return part.swapaxes(1, 2) if heads_first else part

        values |= put_pages(device, case, (pages, *outer, dim + CACHE_PAD), {name: (bits, inside)})
    return values


def put_pages(
    device: Device, case: Call, shape: tuple[int, ...], tensors: dict[str, tuple[Array, Callable[[Array], Array]]]
) -> dict[str, int]:
    """Addresses and strides of tensors (pages, page_size, heads, dim) that are parts of one buffer.

    tensors: their bits, and which part of the buffer each is.
    """
    kind = next(iter(tensors.values()))[0].dtype
    buffer, mine = np.full(shape, np.iinfo(kind).max, kind), owned(case)
    defined = np.zeros(shape, bool)
    for bits, part in tensors.values():
        part(buffer)[mine], part(defined)[mine] = bits[mine], True
    first, stride = device.next, PAGE_GAP if of(case).far else buffer.strides[0] // kind.itemsize
    if of(case).far:
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


def descales_on(device: Device, case: Call) -> dict[str, int]:
    """Null where absent."""
    values: dict[str, int] = {}
    for name, rows in zip(("k_descale", "v_descale"), descales(case) or (), strict=False):
        stride = rows.shape[1] + 1 if of(case).descale == "batch" else 0
        values |= {name: put_exact(device, rows), f"{name}_stride_b": stride}
    return values


def gathered(case: Call, k: Array, v: Array) -> list[tuple[Array, Array]]:
    """The keys and values of each entry, (1, tokens, heads_kv, dim). k, v: values of the pages, which the descales have
    still to be put to."""
    factors = descales(case) or (np.ones((1, case.heads_kv), np.float32),) * 2
    found = []
    for b in range(case.batch):
        keys, values = (
            gather(pages, page_table(case)[b], ends(case)[b], case.keys.paddings[b])[None]
            * factor[b % len(factor), :, None]
            for pages, factor in zip((k, v), factors, strict=True)
        )
        found.append((keys, values))
    return found
