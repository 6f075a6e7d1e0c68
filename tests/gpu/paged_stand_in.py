"""A right implementation of the calls over KV caches on the CPU, and wrong ones: what their checks are proved with.

It computes as the kernels do: pages looked up token by token, float32 scores, P rounded before it is normalised, splits
of whole key blocks, fp32 partials, a weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from runtime.errors import ArgumentError
from tests.gpu.paged_inputs import E4M3, E4M3_MAX, quantised, raw
from tests.gpu.rotary import rotated
from tests.gpu.stand_in import Options, Stand

BLOCK = 16  # keys


@dataclass
class Store:
    """A cache as the kernel sees it. table: (batch, columns), or the number of each entry's only page, (batch, 1)."""

    k: Any
    v: Any
    table: Any
    lengths: Any
    leftpad: Any
    k_descale: Any
    v_descale: Any

    @property
    def page_size(self) -> int:
        return int(self.k.shape[1])

    @property
    def capacity(self) -> int:
        return int(self.table.shape[1]) * self.page_size


class PagedStand(Stand):
    """Stands in for `tests.gpu.dut.Gpu`. A fault breaks one thing."""

    def varlen(self, q: Any, k: Any, v: Any, *, page_table: Any = None, num_splits: int = 0, k_descale: Any = None,
               v_descale: Any = None, cu_seqlens_q: Any = None, max_seqlen_q: Any = None, seqused_q: Any = None,
               seqused_k: Any = None, causal: Any = False, softmax_scale: Any = None, window: Any = None,
               softcap: float = 0.0, sink: Any = None, alibi_slopes: Any = None, return_lse: bool = False,
               leftpad_k: Any = None, out: Any = None) -> Any:  # fmt: skip
        if seqused_q is not None and num_splits > 1 and self.fault != "seqused_q with splits accepted":
            raise ArgumentError("num_splits", "must be 0 or 1 with seqused_q", reason="value")
        options = self._options(q, v, causal, softmax_scale, window, softcap, sink, alibi_slopes)
        store = Store(k, v, page_table, seqused_k, leftpad_k, k_descale, v_descale)
        return self._over(store, q, cu_seqlens_q, seqused_q, options, alibi_slopes, num_splits, out, lambda: None)

    def kvcache(self, q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, rotary_cos: Any = None,
                rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None,
                cache_leftpad: Any = None, block_table: Any = None, softmax_scale: Any = None, causal: Any = False,
                window_size: Any = (-1, -1), softcap: float = 0.0,
                rotary_interleaved: bool = True, alibi_slopes: Any = None, num_splits: int = 0,
                return_softmax_lse: bool = False, *, sink: Any = None, k_descale: Any = None, v_descale: Any = None,
                out: Any = None) -> Any:  # fmt: skip
        window = tuple(None if side < 0 else side for side in window_size)
        options = self._options(q, v_cache, causal, softmax_scale, window, softcap, sink, alibi_slopes)
        table = block_table
        if table is None:
            entries = torch.arange(len(q)) if cache_batch_idx is None else cache_batch_idx
            table = (torch.arange(len(q)) if self.fault == "cache_batch_idx ignored" else entries)[:, None]
        store = Store(k_cache, v_cache, table, cache_seqlens, cache_leftpad, k_descale, v_descale)
        if k is None:
            return self._over(store, q, None, None, options, alibi_slopes, num_splits, out, lambda: None)
        after = torch.empty_like(cache_seqlens)
        turned, still = q.clone(), (options.left, options.right) == (None, None)
        if self.fault == "q always rotated by its row":
            still = False
        rotary = (rotary_cos, rotary_sin, rotary_interleaved)

        def prepare() -> None:
            torch.clamp(cache_seqlens + k.shape[1], max=store.capacity, out=after)
            self._append(store, k, v, rotary)
            turned.copy_(q if self.fault == "q not rotated" else self._turn(q, rotary, cache_seqlens, still))

        served = Store(k_cache, v_cache, table, after, cache_leftpad, k_descale, v_descale)
        return self._over(served, turned, None, None, options, alibi_slopes, num_splits, out, prepare)

    # ---- appending ----

    def _turn(self, x: Any, rotary: Any, start: Any, still: bool) -> Any:
        cos, sin, interleaved = rotary
        if cos is None:
            return x
        if self.fault == "rotary the other way":
            interleaved = not interleaved
        steps = torch.arange(x.shape[1]) * (not still)
        if self.fault == "a position too far":
            steps = steps + 1
        return rotated(x, cos, sin, start.long()[:, None] + steps, interleaved)[0].float()

    def _append(self, store: Store, k: Any, v: Any, rotary: Any) -> None:
        parts = (store.k, self._turn(k, rotary, store.lengths, False), store.k_descale), (store.v, v, store.v_descale)
        for cache, new, factor in parts:
            for b in range(len(new)):
                for i in range(new.shape[1]):
                    at = int(store.lengths[b]) + i
                    if at < store.capacity:
                        self._store(store, cache, self._low(cache, new[b, i], factor, b), b, at)
                    elif self.fault == "no room ignored":
                        self._store(store, cache, self._low(cache, new[b, i], factor, b), b, store.capacity - 1)

    def _low(self, cache: Any, row: Any, factor: Any, b: int) -> Any:
        if cache.dtype != E4M3:
            return row.to(cache.dtype)
        row = row.float() / self._descale(factor, b, len(row))[:, None]
        if self.fault == "not saturated":
            return torch.where(row.abs() > E4M3_MAX, 1.0, row).to(E4M3)
        return (row * 1.0625).to(E4M3) if self.fault == "rounded up" else quantised(row)

    def _store(self, store: Store, cache: Any, row: Any, b: int, at: int) -> None:
        page, within = int(store.table[b, at // store.page_size]), at % store.page_size
        if page < 0 and self.fault != "lost pages are written":
            return
        if self.fault == "32-bit rows" and page * cache.stride(0) >= self.long:
            page = 0
        if self.fault == "appended a row late":
            within = min(within + 1, store.page_size - 1)
        if self.fault == "heads in 16 bits":
            row = row[torch.arange(len(row)) % 128]
        raw(cache)[page, within] = raw(row)
        if self.fault == "a row beside is cleared" and within + 1 < store.page_size:
            raw(cache)[page, within + 1] = 0

    # ---- attention ----

    def _over(self, store: Store, q: Any, cu_q: Any, used_q: Any, options: Options, slopes: Any, num_splits: int,
              out: Any, prepare: Callable[[], None]) -> Any:  # fmt: skip
        """Like Stand._call, over a cache. prepare: what is launched before."""
        dim, low = store.k.shape[-1], store.k.dtype == E4M3
        if (dim % 16 or store.v.shape[-1] % 16) and low and self.fault != "misaligned head_dim accepted":
            raise ArgumentError("k", "head dims of an e4m3 cache must be multiples of 16", reason="shape")
        batch = len(store.table)
        lse = torch.full((batch, q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0]), math.nan)
        by_row = lse.transpose(-1, -2)
        result = torch.full((*q.shape[:-1], store.v.shape[-1]), math.nan, dtype=q.dtype) if out is None else out
        if self.recording is not None and self.fault == "a graph keeps the lengths":
            store.lengths = store.lengths.clone()
        if self.recording is not None and self.fault == "a graph keeps the table":
            store.table = store.table.clone()
        if self.fault == "a plan keeps its first lengths":
            store.lengths = self.first.setdefault((q.shape, num_splits), store.lengths)

        def entries() -> None:
            for b, (_, rows) in enumerate(self._rooms(q, cu_q, used_q)) if q.numel() else ():
                options.slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
                parts = [x[b, rows] if cu_q is None else x[rows] for x in (q, result, by_row)]
                if parts[0].numel():
                    self._one(store, b, *parts, options, num_splits)
            if self.fault == "writes past the end" and result._base is not None and result.dim() == 4 and batch:
                result._base[: len(result), result.shape[1] + 1] = 0

        self._launch(prepare, entries)
        return result.clone() if self.fault == "output not returned" else result, lse

    def _launch(self, *work: Callable[[], None]) -> None:
        self._warm()
        for launch in work:
            launch()
            if self.recording is not None:
                self.recording.append(launch)

    def _keys(self, store: Store, b: int) -> tuple[Any, Any]:
        """What the table says that an entry's keys and values are, (tokens, heads, dim)."""
        fault, capacity, size = self.fault, store.capacity, store.page_size
        n = capacity if store.lengths is None else min(max(int(store.lengths[b]), 0), capacity)
        if fault == "one key too many" and n:
            n = min(n + 1, capacity)
        padding = 0 if store.leftpad is None or fault == "leftpad ignored" else int(store.leftpad[b])
        token = torch.arange(self._first_key(0, n, padding), n)
        table = torch.arange(len(store.table) * store.table.shape[1]).view(store.table.shape)
        table = table % len(store.k) if fault == "table ignored" else store.table
        column = token // size
        if fault == "page sizes are powers of 2":
            column, size = token >> (size.bit_length() - 1), 1 << (size.bit_length() - 1)
        pages = table[b, column.clamp(max=table.shape[1] - 1)].long().clamp(0, len(store.k) - 1)
        if fault == "32-bit offsets":
            pages = torch.where(pages * store.k.stride(0) >= self.long, pages * 0, pages)
        if fault == "32-bit rows of pages" and store.k.stride(1) * store.page_size >= self.long:
            token = token * 0
        found = [raw(x)[pages, token % size].view(x.dtype).float() for x in (store.k, store.v)]
        if fault == "32-bit offsets" and store.k.stride(1) * n >= self.long:
            found[0] = found[0].flip(0)
        return found[0], found[1]

    def _one(self, store: Store, b: int, q: Any, out: Any, lse: Any, options: Options, num_splits: int) -> None:
        k, v = self._keys(store, b)
        group = q.shape[1] // k.shape[1]
        pick = torch.arange(q.shape[1]) // group
        if self.fault == "heads · heads_kv in 32 bits":
            pick = torch.arange(q.shape[1]) * k.shape[1] % self.long // q.shape[1]
        factor = self._descale(None if self.fault == "k_descale ignored" else store.k_descale, b, k.shape[1])
        scale = options.scale * factor[pick]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k[:, pick]) * scale[:, None, None]
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = self._masked(scores, len(q), len(k), group, options)
        count = num_splits or 2
        blocks = -(-len(k) // BLOCK)
        edges = [min(-(-blocks * i // count) * BLOCK, len(k)) for i in range(count + 1)]
        if self.fault == "the last split loses a key" and count > 1 and edges[-1] > edges[-2]:
            edges[-1] -= 1
        parts = [
            self._part(scores[..., a:z], v[a:z, pick], options, i, q.dtype) for i, (a, z) in enumerate(pairwise(edges))
        ]
        gain = self._descale(None if self.fault == "v_descale ignored" else store.v_descale, b, k.shape[1])[pick]
        whole, total = self._sum(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
        out.copy_((whole * gain[:, None]).to(out.dtype))
        lse.copy_(total)
        if self.fault == "not deterministic" and self.calls % 3 == 0:
            out[0, 0, 0] += 1

    def _descale(self, factor: Any, b: int, heads_kv: int) -> Any:
        if factor is None:
            return torch.ones(heads_kv)
        if factor.dim() == 2:
            return factor[0 if self.fault == "descales of the first entry" else b]
        return factor

    def _part(self, scores: Any, v: Any, options: Options, split: int, dtype: Any) -> tuple[Any, Any]:
        """Normalised output (rows, heads, dim) and LSE (rows, heads) of some of the keys."""
        sink = options.sink if split == 0 or self.fault == "a sink in every split" else None
        sink = scores.new_full(scores.shape[:1], -math.inf) if sink is None else sink
        top = sink[:, None].expand(scores.shape[:2])
        top = torch.maximum(top, scores.amax(-1) if scores.shape[-1] else top).clamp(min=-1e30)
        p = (scores - top[..., None]).exp()
        total = p.sum(-1) + (sink[:, None] - top).exp()
        o = torch.einsum("hqk,khd->qhd", p.to(dtype).float(), v) / total.clamp(min=1e-37).T[..., None]
        lse = (total.log() + top).T
        if self.fault == "an empty split counts" and not scores.shape[-1]:
            lse = torch.zeros_like(lse)
        return o, lse

    def _sum(self, outs: Any, lses: Any) -> tuple[Any, Any]:
        """The weighted sum over splits; outs (splits, …, dim), lses (splits, …), fp32."""
        fault = self.fault
        top = lses.amax(0)
        top = top.masked_fill(top.isneginf(), 0.0)
        weights = (lses - top).exp()
        total = weights.sum(0)
        if fault == "partials weighted alike":
            weights = (lses > -math.inf).float() * total / (lses > -math.inf).float().sum(0).clamp(min=1)
        lse = total.log() + top
        if fault == "lse of the last split":
            lse = lses[-1]
        if fault == "weights without their maximum":
            weights, total = lses.exp(), lses.exp().sum(0)
        if fault != "an empty part's NaN counts":
            outs = outs.masked_fill(lses.isneginf()[..., None], 0.0)
        least = 0.0 if fault == "empty rows are NaN" else 1e-37
        whole = (weights[..., None] * outs).sum(0) / total.clamp(min=least)[..., None]
        return whole, lse

    def combine(self, out_partial: Any, lse_partial: Any, out: Any = None, out_dtype: Any = None,
                return_lse: bool = True) -> Any:  # fmt: skip
        def launch() -> None:
            whole, total = self._sum(outs, lses)
            result.copy_(whole.to(result.dtype) if self.fault != "truncated" else _truncated(whole, result.dtype))
            lse.copy_(total)
            if self.fault == "not deterministic" and self.calls % 3 == 0:
                result[(0,) * result.dim()] += 1
            if self.fault == "32-bit offsets" and outs.stride(0) + outs[0].numel() > self.long:
                result[(-1,) * (result.dim() - 1)] = result[(0,) * (result.dim() - 1)]
            if self.fault == "writes columns beyond head_dim_v" and result._base is not None:
                result._base[..., -1] = 0

        outs, lses = out_partial, lse_partial
        if self.fault == "strides of the LSE ignored":
            lses = lses.as_strided(lses.shape, lses.contiguous().stride())
        result = torch.full(outs.shape[1:], math.nan, dtype=out_dtype or torch.float32) if out is None else out
        lse = torch.full(lses.shape[1:], math.nan)
        self._launch(launch)
        result = result.clone() if self.fault == "output not returned" else result
        return (result, lse) if return_lse else result


def _truncated(x: Any, dtype: torch.dtype) -> Any:
    """Rounded towards zero."""
    bits = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 8}[dtype]
    return (x.view(torch.int32) >> bits << bits).view(torch.float32).to(dtype)
