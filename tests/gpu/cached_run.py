"""A call of the forward over a KV cache, made real: where its keys lie, and what it must not have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from tests.gpu.inputs import DTYPES
from tests.gpu.paged_inputs import E4M3, Pages, descales, quantised, raw
from tests.gpu.run import Run
from tests.gpu.yardstick import Rule
from tests.support.call import Cache, Call


class CachedRun(Run):
    """`tensors` k and v are as the cache holds them. pages: where the keys lie."""

    def __init__(self, call: Call, device: Any):
        super().__init__(call, device)
        assert call.cache is not None
        self.cache: Cache = call.cache
        self.low = E4M3 if self.cache.kv_dtype == "e4m3" else DTYPES[call.dtype]
        self.pages = Pages(self.k.ends, self.shareable(device), self.cache, device, call.seed)
        self.descale: dict[str, torch.Tensor] = {}
        if self.cache.descale and self.low == E4M3:
            size = (call.heads_kv,) if self.cache.descale == "heads" else (call.batch, call.heads_kv)
            self.descale = {name: descales(size, device, call.seed + i) for i, name in enumerate("kv")}
        stored = {name: self.pages.shared(self.stored(name, self.clean[name])) for name in "kv"}
        self.clean |= {name: x.to(DTYPES[call.dtype]) for name, x in stored.items()}
        k, v = self.pages.empty(call.heads_kv, (call.head_dim, call.head_dim_v), self.low, self.cache)
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
        if self.low != E4M3:
            return x
        factor = self.by_entry(name)
        return quantised(x.float() if factor is None else x.float() / factor[:, None, :, None])

    def by_entry(self, name: str) -> torch.Tensor | None:
        """The descale of k or v, (batch, heads_kv)."""
        factor = self.descale.get(name)
        return None if factor is None else factor.expand(self.call.batch, -1)

    def rule(self) -> Rule:
        return replace(super().rule(), k_descale=self.by_entry("k"), v_descale=self.by_entry("v"))

    @cached_property
    def options(self) -> dict[str, Any]:
        """The keywords of its door."""
        options = dict(super().options) | {"num_splits": self.call.num_splits}
        options |= {f"{name}_descale": factor for name, factor in self.descale.items()}
        if self.cache.door == "varlen":
            return options | {"page_table": self.pages.table}
        if "window" in options:
            options["window_size"] = tuple(-1 if side is None else side for side in options.pop("window"))
        options["cache_seqlens"] = options.pop("seqused_k")
        if "leftpad_k" in options:
            options["cache_leftpad"] = options.pop("leftpad_k")
        if not self.pages.contiguous:
            return options | {"block_table": self.pages.table}
        return options if self.cache.order == "in order" else options | {"cache_batch_idx": self.batch_idx}

    def given(self) -> dict[str, Any]:
        if self.cache.door == "varlen":
            return super().given()
        renamed = {{"k": "k_cache", "v": "v_cache"}.get(name, name): x for name, x in self.tensors.items()}
        return {**renamed, **self.options, "return_softmax_lse": True}

    def function(self, dut: Any) -> Any:
        return dut.kvcache if self.cache.door == "kvcache" else dut.varlen

    def problems(self, out: torch.Tensor, lse: torch.Tensor) -> list[str]:
        """What is wrong with an output, its LSE and what the call left in the cache."""
        return self.cache_problems() + super().problems(out, lse)

    def cache_problems(self) -> list[str]:
        return [
            f"the cache of {name} was written beside the new rows"
            for name, before in self.before.items()
            if not torch.equal(raw(self.tensors[name]._base), before)
        ]

    def read(self) -> list[torch.Tensor]:
        return super().read() + [x._base for x in (*self.descale.values(), self.pages.table)]
