"""A call that appends keys and values to the cache, rotates them and the queries, and attends: inputs and judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tests.gpu.cases import Call
from tests.gpu.inputs import DTYPES, Shape, integers, place, values
from tests.gpu.paged_cases import PagedCall, PagedCase, paged
from tests.gpu.paged_inputs import E4M3, E4M3_MAX, Cache, canaries, quantised, raw, take

ROTARY_BASE = 10_000.0
FP32_ERROR = 2.0**-21  # relative to the terms of a rotation, or to a quotient


@dataclass(frozen=True)
class Append:
    """tokens: new ones of every entry. before: of each entry, tokens that its cache has. rotary: '', 'halves' or
    'interleaved'; rotary_dim: even, at most head_dim. rows: of the cos and sin tables; None: enough."""

    tokens: int
    before: tuple[int, ...]
    rotary: str = ""
    rotary_dim: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class AppendCase:
    paged: PagedCase
    new: Append

    def on(self, device: Any) -> AppendCall:
        return AppendCall(self, device)


def append(
    key: str,
    heads: tuple[int, int],
    seqlen_q: int,
    before: Sequence[int],
    tokens: int,
    cache: Cache,
    *,
    capacity: int | None = None,
    rotary: str = "",
    rotary_dim: int = 0,
    rows: int | None = None,
    **more: Any,
) -> AppendCase:
    """capacity: of the cache, if some of the new tokens shall find no room; a multiple of the page size.

    more: keywords of `paged`.
    """
    room = capacity or 2**30
    after = [min(n + tokens, room) for n in before]
    if capacity:
        after = [*after[:-1], capacity]
        before = [*before[:-1], capacity - tokens // 2]
        cache = replace(cache, spare=0)
    case = paged(key, heads, seqlen_q, after, cache, **more)
    return AppendCase(case, Append(tokens, tuple(before), rotary, rotary_dim, rows))


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x with rotary embedding in float64, what its rounding errors are relative to).

    x: (batch, tokens, heads, dim); cos, sin: (rows, rotary_dim / 2); positions: (batch, tokens), cut to the rows.
    """
    half = cos.shape[1]
    at = positions.clamp(0, len(cos) - 1)
    c, s = (table.double()[at][:, :, None] for table in (cos, sin))
    first = slice(0, 2 * half, 2) if interleaved else slice(half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out = x.double()
    size, (a, b) = out.abs(), (out[..., first].clone(), out[..., second].clone())
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    size[..., first], size[..., second] = (a * c).abs() + (b * s).abs(), (a * s).abs() + (b * c).abs()
    return out, size


def misrounded(
    got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, dtype: torch.dtype, error: float
) -> torch.Tensor:
    """Which of `got` are no rounding to `dtype` of anything within error · size of `exact`; NaN is."""

    def low(x: torch.Tensor) -> torch.Tensor:
        return quantised(x).double() if dtype == E4M3 else x.to(dtype).double()

    return ~((low(exact - error * size) <= got.double()) & (got.double() <= low(exact + error * size)))


def tables(rows: int, rotary_dim: int, dtype: torch.dtype, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (rows, rotary_dim / 2), their surroundings NaN."""
    half = rotary_dim // 2
    speed = ROTARY_BASE ** (-torch.arange(half, device=device) / max(half, 1))
    angle = torch.arange(rows, device=device)[:, None] * speed
    made = []
    for table in (angle.cos(), angle.sin()):
        buffer = canaries((rows + 2, half), dtype, device)
        buffer[1:-1] = table
        made.append(buffer[1:-1])
    return made[0], made[1]


class AppendCall(PagedCall):
    """An AppendCase made real. What it attends to is judged by what it left in the cache, that by float64."""

    def __init__(self, case: AppendCase, device: Any):
        self.appended = new = case.new
        super().__init__(case.paged, device)
        shape, attention = self.shape, case.paged.attention
        self.still = attention.window == (None, None)
        self.start = self.shareable(device)
        at, self.place = self.pages.places(self.start, self.k.ends)
        self.at = (at[0], at[1] - self.start[at[0]])  # entry and number of each new token that finds room
        for name in "kv":
            empty = canaries((1,), case.paged.dtype, device)
            raw(self.tensors[name])[self.place] = raw(empty)
        self.snapshot()
        self.queries = self.clean["q"]
        drawn = values(_only_keys(shape, new.tokens), attention.family, device, attention.seed + 1)
        if case.paged.dtype == E4M3 and attention.seed % 3 == 0:
            drawn["v"] *= 200  # beyond what e4m3 holds
        self.fresh = {name: place(drawn[name]) for name in "kv"}
        self.cos_sin: tuple[torch.Tensor, ...] = ()
        if new.rotary:
            rows = new.rows or self.pages.capacity + new.tokens
            self.cos_sin = tables(rows, new.rotary_dim, DTYPES[shape.dtype], device)
        self.cache_seqlens = integers(new.before, device)

    def shareable(self, device: Any) -> torch.Tensor:
        return torch.tensor(self.appended.before, dtype=torch.int64, device=device)

    @cached_property
    def options(self) -> dict[str, Any]:
        options = dict(super().options) | self.fresh | {"cache_seqlens": self.cache_seqlens}
        if self.cos_sin:
            options |= {"rotary_cos": self.cos_sin[0], "rotary_sin": self.cos_sin[1]}
            options["rotary_interleaved"] = self.appended.rotary == "interleaved"
        return options

    def _rotated(self, x: torch.Tensor, still: bool, stays: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if stays or not self.cos_sin:
            return x.double(), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        steps = torch.arange(x.shape[1], device=x.device) * (not still)
        positions = self.start[:, None] + steps
        return rotated(x, *self.cos_sin, positions, self.appended.rotary == "interleaved")

    def lose(self, lost: torch.Tensor) -> None:
        """Make the pages of these columns, bool (batch, columns), -1: nothing arrives in them."""
        entry, number = self.at
        kept = ~lost[entry, (self.start[entry] + number) // self.pages.page_size]
        self.pages.table[lost] = -1
        self.at = entry[kept], number[kept]
        self.place = tuple(x[kept] for x in self.place)

    def restore(self) -> None:
        """Take the new rows out of the cache again."""
        for name, before in self.before.items():
            raw(self.tensors[name]._base).copy_(before)

    def problems(self, out: torch.Tensor, lse: torch.Tensor) -> list[str]:
        found = self.cache_problems()
        all_at, all_place = self.places(torch.zeros_like(self.start), self.k.ends)
        for name in "kv":
            self.clean[name][all_at] = take(self.tensors[name], all_place).to(self.clean[name].dtype)
        self.clean["q"] = self._rotated(self.queries, self.still)[0].to(self.queries.dtype)
        return found + Call.problems(self, out, lse)

    def cache_problems(self) -> list[str]:
        """New rows against float64; all other bytes against what was there."""
        found = []
        for name in "kv":
            exact, size = self._rotated(self.fresh[name], still=False, stays=name == "v")
            if (factor := self.by_entry(name)) is not None:
                exact, size = (x / factor.double()[:, None, :, None] for x in (exact, size + exact.abs()))
            got = take(self.tensors[name], self.place)
            if self.paged.dtype == E4M3:
                exact = exact.clamp(-E4M3_MAX, E4M3_MAX)
            wrong = misrounded(got, exact[self.at], size[self.at], self.paged.dtype, FP32_ERROR)
            if bool(wrong.any()):
                found.append(f"{int(wrong.sum())} of {wrong.numel()} new elements of {name} are wrong in the cache")
        kept = {name: raw(self.tensors[name]._base).clone() for name in "kv"}
        for name in "kv":
            raw(self.tensors[name])[self.place] = raw(canaries((1,), self.paged.dtype, self.start.device))
        found += super().cache_problems()
        for name, bits in kept.items():
            raw(self.tensors[name]._base).copy_(bits)
        return found


def _only_keys(shape: Shape, tokens: int) -> Shape:
    return replace(shape, seqlen_q=0, seqlen_k=tokens)
