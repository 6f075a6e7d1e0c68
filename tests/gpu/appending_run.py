"""A call that appends keys and values to the cache, rotates them and the queries, and attends, made real.

What it attends to is judged by what it left in the cache, that by float64.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from tests.gpu.cached_run import CachedRun
from tests.gpu.inputs import DTYPES, place, values
from tests.gpu.paged_inputs import E4M3, E4M3_MAX, canaries, raw, take
from tests.gpu.rotary import misrounded, rotated, tables
from tests.gpu.run import Run
from tests.support.call import OPEN, Append, Call

FP32_ERROR = 2.0**-21  # relative to the terms of a rotation, or to a quotient


class AppendingRun(CachedRun):
    """fresh: the new keys and values. at, place: entry and number of each one that finds room, and where."""

    def __init__(self, call: Call, device: Any):
        super().__init__(call, device)
        assert call.append is not None
        self.new: Append = call.append
        self.still = call.window == OPEN
        self.start = self.shareable(device)
        at, self.place = self.pages.places(self.start, self.k.ends)
        self.at = (at[0], at[1] - self.start[at[0]])
        self._clear()
        self.snapshot()
        self.queries = self.clean["q"]
        only_new = replace(call, seqlen_q=0, cu_seqlens_q=None, seqlen_k=self.new.tokens, seed=call.seed + 1)
        drawn = values(only_new, device)
        if self.low == E4M3 and call.seed % 3 == 0:
            drawn["v"] *= 200  # beyond what e4m3 holds
        self.fresh = {name: place(drawn[name]) for name in "kv"}
        self.cos_sin: tuple[torch.Tensor, ...] = ()
        if self.new.rotary:
            rows = self.new.rotary_rows or self.pages.capacity + self.new.tokens
            self.cos_sin = tables(rows, self.new.rotary_dim, DTYPES[call.dtype], device)

    def shareable(self, device: Any) -> torch.Tensor:
        """What the cache has before."""
        return torch.tensor(self.call.seqused_k, dtype=torch.int64, device=device)

    def _clear(self) -> None:
        """NaN where new rows belong."""
        for name in "kv":
            raw(self.tensors[name])[self.place] = raw(canaries((1,), self.low, self.start.device))

    @cached_property
    def options(self) -> dict[str, Any]:
        options = dict(super().options) | self.fresh
        if self.cos_sin:
            options |= {"rotary_cos": self.cos_sin[0], "rotary_sin": self.cos_sin[1]}
            options["rotary_interleaved"] = self.new.rotary == "interleaved"
        return options

    def _rotated(self, x: torch.Tensor, still: bool, stays: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if stays or not self.cos_sin:
            return x.double(), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        steps = torch.arange(x.shape[1], device=x.device) * (not still)
        return rotated(x, *self.cos_sin, self.start[:, None] + steps, self.new.rotary == "interleaved")

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
        return found + Run.problems(self, out, lse)

    def cache_problems(self) -> list[str]:
        """New rows against float64; all other bytes against what was there."""
        found = []
        for name in "kv":
            exact, size = self._rotated(self.fresh[name], still=False, stays=name == "v")
            if (factor := self.by_entry(name)) is not None:
                exact, size = (x / factor.double()[:, None, :, None] for x in (exact, size + exact.abs()))
            got = take(self.tensors[name], self.place)
            if self.low == E4M3:
                exact = exact.clamp(-E4M3_MAX, E4M3_MAX)
            wrong = misrounded(got, exact[self.at], size[self.at], self.low, FP32_ERROR)
            if bool(wrong.any()):
                found.append(f"{int(wrong.sum())} of {wrong.numel()} new elements of {name} are wrong in the cache")
        kept = {name: raw(self.tensors[name]._base).clone() for name in "kv"}
        self._clear()
        found += super().cache_problems()
        for name, bits in kept.items():
            raw(self.tensors[name]._base).copy_(bits)
        return found
