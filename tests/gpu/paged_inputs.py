"""KV caches that hurt: pages in any order, NaN in every row that no sequence owns, garbage in unused table entries."""

from __future__ import annotations

import math
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.inputs import DTYPES, around
from tests.support.call import Cache

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
NAN_BYTE = 0x7F  # of e4m3
GARBAGE = (-1, 2**31 - 1, -(2**31), 2**30)  # in a table where nothing is to be looked up
CANARIES = 3  # pages at least that nobody owns


def is_low(key: str) -> bool:
    """Whether a variant's cache is e4m3."""
    return "e4m3kv" in Variant.parse(key).features


def cache_dtype(key: str) -> torch.dtype:
    variant = Variant.parse(key)
    return E4M3 if is_low(key) else DTYPES.get(variant.dtype, torch.float32)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: equal bits compare equal then, NaN too, and any dtype can be scattered."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def take(tensor: torch.Tensor, place: Any) -> torch.Tensor:
    """tensor[place]; not every torch can index float8."""
    return raw(tensor)[place].view(tensor.dtype)


def canaries(size: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """All NaN."""
    if dtype == E4M3:
        return torch.full(size, NAN_BYTE, dtype=torch.uint8, device=device).view(E4M3)
    return torch.full(size, math.nan, dtype=dtype, device=device)


def quantised(x: torch.Tensor) -> torch.Tensor:
    """x as e4m3, saturated, rounded to nearest even."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def descales(size: tuple[int, ...], device: Any, seed: int) -> torch.Tensor:
    """fp32 factors from 0.4 to 1.6, (heads_kv,) or (batch, heads_kv)."""
    drawn = torch.rand(size, generator=torch.Generator(device).manual_seed(seed), device=device)
    return around(0.4 + 1.2 * drawn, torch.float32, math.nan)


class Pages:
    """Which page and row each token of each entry lies in.

    rooms: int64 (batch,), rows that an entry owns; shareable: of these, how many from the start may be another's too,
    where the order says so. table: int32 (batch, columns), garbage beyond an entry's pages and
    around. capacity: rows that a row of the table has room for. pages: how many there are, some nobody's.
    """

    def __init__(self, rooms: torch.Tensor, shareable: torch.Tensor, cache: Cache, device: Any, seed: int):
        longest = int(rooms.max()) if rooms.numel() else 0
        self.contiguous = cache.page_size is None
        self.page_size = max(longest + cache.spare, 1) if cache.page_size is None else cache.page_size
        self.rooms, self.device, self.batch = rooms, device, rooms.numel()
        used = torch.ones_like(rooms) if self.contiguous else (rooms + self.page_size - 1) // self.page_size
        needed = int(used.sum())
        in_order = self.contiguous and cache.order == "in order"
        self.pages = needed if in_order else needed + CANARIES + needed // 8
        columns = 1 if self.contiguous else max(-(-longest // self.page_size) + cache.spare, 1)
        self.capacity = columns * self.page_size
        entry = torch.repeat_interleave(torch.arange(self.batch, device=device), used)
        column = torch.arange(needed, device=device) - (used.cumsum(0) - used)[entry]
        generator = torch.Generator(device).manual_seed(seed)
        ids = torch.arange(self.pages, device=device)
        if cache.order != "in order":
            ids = torch.randperm(self.pages, generator=generator, device=device)
        table = torch.tensor(GARBAGE, device=device).repeat(-(-self.batch * columns // len(GARBAGE)))
        table = table[: self.batch * columns].view(self.batch, columns).clone()
        table[entry, column] = ids[:needed]
        self.common = torch.zeros_like(rooms)  # rows of each entry that are those of entry `first`
        self.first = int(shareable.argmax()) if self.batch else 0
        if cache.order == "shared" and self.batch and not self.contiguous:
            self.common = shareable // self.page_size * self.page_size  # whole pages: the rest of one is another's
            shared = torch.arange(columns, device=device) < (self.common // self.page_size)[:, None]
            table = torch.where(shared, table[self.first], table)
        self.table = around(table, torch.int32, GARBAGE[1])

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, seqlen, heads, dim) with the rows that entries have in common made the same."""
        if not bool(self.common.any()):
            return x
        common = torch.arange(x.shape[1], device=x.device) < self.common[:, None]
        return torch.where(common[..., None, None], raw(x)[self.first], raw(x)).view(x.dtype)

    def places(self, start: torch.Tensor, end: torch.Tensor) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """(entry, token) and (page, row) of tokens start to end of every entry."""
        counts = (end - start).clamp(min=0)
        entry = torch.repeat_interleave(torch.arange(self.batch, device=self.device), counts)
        token = torch.arange(entry.numel(), device=self.device) - (counts.cumsum(0) - counts - start)[entry]
        return (entry, token), (self.table[entry, token // self.page_size].long(), token % self.page_size)

    def empty(self, heads: int, dims: tuple[int, int], dtype: torch.dtype, cache: Cache) -> tuple[Any, Any]:
        """k and v, all NaN, amid NaN: (pages, page_size, heads, dim). Offsets and strides are multiples of 16."""
        rows = (heads + 1, self.page_size + 1) if cache.heads_first else (self.page_size + 1, heads + 1)
        if cache.halves:
            both = canaries((self.pages + 1, 2, *rows, max(dims) + 32), dtype, self.device)[1:]
            parts = [both[:, 0], both[:, 1]]
        else:
            parts = [canaries((self.pages + 1, *rows, dim + 32), dtype, self.device)[1:] for dim in dims]
        parts = [part.transpose(1, 2) if cache.heads_first else part for part in parts]
        k, v = (part[:, : self.page_size, :heads, 16 : 16 + dim] for part, dim in zip(parts, dims, strict=True))
        return k, v
