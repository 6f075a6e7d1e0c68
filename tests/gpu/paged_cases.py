"""A call of the forward over a KV cache: from a case to its inputs and to what is wrong with its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tests.gpu.cases import Call, Case, Dims, Lengths, shape_of
from tests.gpu.inputs import DTYPES
from tests.gpu.paged_inputs import E4M3, Cache, Pages, cache_dtype, descales, quantised, raw
from tests.gpu.yardstick import MIN_ROWS, Rule


@dataclass(frozen=True)
class PagedCase:
    """attention: whose k and v are dense, with used_k; how they are stored is `cache`'s and `dtype`'s.

    door: 'varlen' or 'kvcache', which function serves it; a contiguous cache has 'kvcache' alone, packed queries and
    seqused_q have 'varlen' alone.
    """

    attention: Case
    cache: Cache
    dtype: torch.dtype
    num_splits: int = 0
    door: str = "kvcache"

    def on(self, device: Any) -> PagedCall:
        return PagedCall(self, device)


def paged(
    key: str,
    heads: tuple[int, int],
    q: int | Sequence[int],
    k: Sequence[int],
    cache: Cache,
    *,
    num_splits: int = 0,
    door: str = "kvcache",
    dims: Dims | None = None,
    used_q: Sequence[int] | None = None,
    spare: int = 0,
    leftpad: Sequence[int] | None = None,
    **more: Any,
) -> PagedCase:
    """q: tokens of every entry, or of each one of a packed array. k: keys of each entry. leftpad: as `Lengths` has it,
    of entries that share no pages. more: fields of Case."""
    if leftpad is not None and cache.order == "shared":
        raise ValueError("leftpad: entries that share pages have none")
    k, packed = tuple(k), not isinstance(q, int)
    rows = tuple(q) if not isinstance(q, int) else (q,) * len(k)
    room = (max(k, default=0),) * len(k)
    used, padding = (None if x is None else tuple(x) for x in (used_q, leftpad))
    lengths = Lengths(rows, room, used, k, packed, False, spare, leftpad=padding)
    shape = shape_of(key, len(k), heads, max(rows, default=0), max(k, default=0), dims)
    door = "varlen" if packed or used_q is not None else "kvcache" if cache.page_size is None else door
    return PagedCase(Case(shape, lengths=lengths, **more), cache, cache_dtype(key), num_splits, door)


def enough(k: Sequence[int], heads_q: int, seqlen_q: int) -> tuple[int, ...]:
    """The lengths, repeated until an RMS over the queries of the call means something."""
    return tuple(k) * max(1, -(-MIN_ROWS // max(heads_q * seqlen_q * len(k), 1)))


class PagedCall(Call):
    """A PagedCase made real: `tensors` q, k, v (as they are stored) and out. pages: where the keys lie."""

    def __init__(self, case: PagedCase, device: Any):
        super().__init__(case.attention, device)
        self.paged, seed = case, case.attention.seed
        shape, cache = self.shape, case.cache
        self.pages = Pages(self.k.ends, self.shareable(device), cache, device, seed)
        self.descale: dict[str, torch.Tensor] = {}
        if cache.descale and case.dtype == E4M3:
            size = (shape.heads_kv,) if cache.descale == "heads" else (shape.batch, shape.heads_kv)
            self.descale = {name: descales(size, device, seed + i) for i, name in enumerate("kv")}
        stored = {name: self.pages.shared(self.stored(name, self.clean[name])) for name in "kv"}
        self.clean |= {name: x.to(DTYPES[shape.dtype]) for name, x in stored.items()}
        dims = shape.head_dim, shape.head_dim_v
        k, v = self.pages.empty(shape.heads_kv, dims, case.dtype, cache)
        self.tensors |= {"k": k, "v": v}
        self.put(torch.zeros_like(self.k.ends), self.k.ends, stored)
        self.batch_idx = self.pages.table[:, 0].contiguous()
        self.snapshot()

    def put(self, start: torch.Tensor, end: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> None:
        """Write tokens start to end of every entry, as the cache holds them, into the cache; none of the padding."""
        at, place = self.places(start, end)
        for name, x in stored.items():
            raw(self.tensors[name])[place] = raw(x)[at]

    def places(self, start: torch.Tensor, end: torch.Tensor) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Where the reference and the cache have tokens start to end of every entry, those of its padding left out."""
        (entry, token), place = self.pages.places(torch.maximum(start, self.k.padding), end)
        return (entry, token - self.k.padding[entry]), place

    def snapshot(self) -> None:
        """Remember the caches as they are now: a call is to leave them so."""
        self.before = {name: raw(self.tensors[name]._base).clone() for name in "kv"}

    def shareable(self, device: Any) -> torch.Tensor:
        """How many tokens of each entry may lie in pages of another."""
        return self.k.ends

    def stored(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Keys or values (batch, seqlen, heads_kv, dim) as the cache holds them."""
        if self.paged.dtype != E4M3:
            return x
        factor = self.by_entry(name)
        return quantised(x.float() if factor is None else x.float() / factor[:, None, :, None])

    def by_entry(self, name: str) -> torch.Tensor | None:
        """The descale of k or v, (batch, heads_kv)."""
        factor = self.descale.get(name)
        return None if factor is None else factor.expand(self.shape.batch, -1)

    def rule(self) -> Rule:
        return replace(super().rule(), k_descale=self.by_entry("k"), v_descale=self.by_entry("v"))

    @cached_property
    def options(self) -> dict[str, Any]:
        """The keywords of its door."""
        options = dict(super().options) | {"num_splits": self.paged.num_splits}
        options |= {f"{name}_descale": factor for name, factor in self.descale.items()}
        if self.paged.door == "varlen":
            return options | {"page_table": self.pages.table}
        if "window" in options:
            options["window_size"] = tuple(-1 if side is None else side for side in options.pop("window"))
        options["cache_seqlens"] = options.pop("seqused_k")
        if "leftpad_k" in options:
            options["cache_leftpad"] = options.pop("leftpad_k")
        if not self.pages.contiguous:
            return options | {"block_table": self.pages.table}
        return options if self.paged.cache.order == "in order" else options | {"cache_batch_idx": self.batch_idx}

    def given(self) -> dict[str, Any]:
        """Every argument by the name that its door has for it."""
        renamed = {"k": "k_cache", "v": "v_cache"} if self.paged.door == "kvcache" else {}
        tensors = {renamed.get(name, name): x for name, x in self.tensors.items()}
        lse = "return_softmax_lse" if renamed else "return_lse"
        return {**tensors, **self.options, lse: True}

    def __call__(self, dut: Any, **more: Any) -> Any:
        """What the device returns: (out, lse)."""
        function = dut.kvcache if self.paged.door == "kvcache" else dut.varlen
        return function(**{**self.given(), **more})

    def problems(self, out: torch.Tensor, lse: torch.Tensor) -> list[str]:
        """What is wrong with an output, its LSE and what the call left in the cache."""
        return self.cache_problems() + super().problems(out, lse)

    def cache_problems(self) -> list[str]:
        return [
            f"the cache of {name} was written beside the new rows"
            for name, before in self.before.items()
            if not torch.equal(raw(self.tensors[name]._base), before)
        ]

    def inputs(self) -> list[torch.Tensor]:
        """All that a call reads."""
        read = [*self.tensors.values(), *self.descale.values(), self.sink, self.slopes, self.pages.table]
        return [x for x in (*read, self.q.cu_seqlens, self.q.seqused, self.k.seqused, self.k.leftpad) if x is not None]
