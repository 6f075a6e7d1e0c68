"""How wrong may an attention output be: judged against float64 and against what plain PyTorch achieves.

All tensors: q (batch, seqlen_q, heads_q, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (batch, seqlen_k,
heads_kv, head_dim_v). A window is (left, right), None for an open side; causal is right = 0; both align bottom-right,
by each entry's own lengths. Rows that see no key give 0, and an LSE of −inf or, with a sink, of the sink.

Entries of a batch may differ in length (varlen): each entry's largest error is judged by that entry alone, the RMS by
entries with about as many keys together, because few rows say nothing about an RMS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.call import Window

CHUNK = 1 << 28  # scores computed at a time: 2 GB of float64
LSE_TOLERANCE = 2e-5
MIN_ROWS = 256  # of a softmax: with few, one row whose P rounds badly exceeds twice the model's RMS by chance


@dataclass(frozen=True)
class Rule:
    """What is asked of an attention besides q, k and v.

    softcap: 0 for none. sink: (heads_q,). slopes: ALiBi's, (heads_q,) or (batch, heads_q). lengths_q, lengths_k: int
    (batch,), how many rows of each entry count; None: all. k_descale, v_descale: (batch, heads_kv), what k and v are to
    be multiplied by; None: 1.
    """

    scale: float
    window: Window = (None, None)
    softcap: float = 0.0
    sink: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    lengths_q: torch.Tensor | None = None
    lengths_k: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None


@dataclass(frozen=True)
class Expected:
    """out: float64 rounded to the output dtype; lse: float64 (batch, heads_q, seqlen_q), as `empty`: sees no key.

    lse_size: what its error is relative to, at least 1: itself or the ALiBi biases, which scores may cancel.
    counted: (batch, seqlen_q), rows that are judged. max_error: (batch,), what each entry is allowed against out; pool:
    (batch,), which pool it is in; sizes, rms_error: each pool's elements, and what it is allowed, ∞ with few rows.
    """

    out: torch.Tensor
    lse: torch.Tensor
    lse_size: torch.Tensor
    empty: torch.Tensor
    counted: torch.Tensor
    max_error: torch.Tensor
    pool: torch.Tensor
    sizes: torch.Tensor
    rms_error: torch.Tensor


def allowed(distance: torch.Tensor, window: Window) -> torch.Tensor | None:
    """Which keys a query sees, of the distances from the diagonal (`distances`); None if all."""
    left, right = window
    if left is None and right is None:
        return None
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        mask &= distance >= -left
    if right is not None:
        mask &= distance <= right
    return mask


def distances(seqlen_q: int, seqlen_k: int, shift: torch.Tensor) -> torch.Tensor:
    """int32 (batch, seqlen_q, seqlen_k): j − (i + shift), where shift (batch,) is lengths_k − lengths_q."""
    row = torch.arange(seqlen_q, device=shift.device, dtype=torch.int32)[:, None]
    column = torch.arange(seqlen_k, device=shift.device, dtype=torch.int32)
    return column - row - shift.int()[:, None, None]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> Expected:
    """The right answer and the errors that are allowed on it.

    max|out − ref| ≤ 2·max|pt − ref| + 2 ulp(max|ref|), where pt is plain PyTorch in the low precision, and
    RMS(out − ref) ≤ 2·RMS(model − ref), where the model is a float32 softmax whose P is rounded to the low precision.
    """
    batch, seqlen_q, heads_q, _ = q.shape
    out = q.new_zeros(batch, seqlen_q, heads_q, v.shape[3])
    lse = torch.full((batch, heads_q, seqlen_q), -math.inf, dtype=torch.float64, device=q.device)
    lse_size, empty = torch.ones_like(lse), torch.ones_like(lse, dtype=torch.bool)
    counted = torch.ones(batch, seqlen_q, dtype=torch.bool, device=q.device)
    if rule.lengths_q is not None:
        counted = torch.arange(seqlen_q, device=q.device) < rule.lengths_q[:, None]
    worst, squares = torch.zeros(2, batch, dtype=torch.float64, device=q.device)
    for entries, heads_kv in parts(q, k, CHUNK) if out.numel() else ():
        group = heads_q // k.shape[2]
        heads = slice(heads_kv.start * group, heads_kv.stop * group)
        part = Part(q[entries, :, heads], k[entries, :, heads_kv], v[entries, :, heads_kv], rule, entries, heads)
        ref, part_lse, part_size, part_empty = part.exact()
        out[entries, :, heads] = ref.flatten(1, 2).transpose(1, 2)
        lse[entries, heads], empty[entries, heads] = part_lse.flatten(1, 2), part_empty.flatten(1, 2)
        lse_size[entries, heads] = torch.maximum(part_lse.abs(), part_size).clamp(min=1).flatten(1, 2)
        judged = counted[entries, None, None, :, None]
        plain = (part.plain().double() - ref.double()).abs() * judged
        worst[entries] = torch.maximum(worst[entries], plain.amax((1, 2, 3, 4)))
        squares[entries] += ((part.model().double() - ref.double()).square() * judged).sum((1, 2, 3, 4))
    top = (out.abs() * counted[..., None, None]).double().flatten(1)
    top = top.amax(1) if out.numel() else torch.zeros_like(worst)
    pool = pools(counted, heads_q, rule.lengths_k)
    sizes = sums(counted.sum(1).double() * (heads_q * v.shape[3]), pool)
    rms = (sums(squares, pool) / sizes.clamp(min=1)).sqrt()
    rms = rms.masked_fill(sizes < MIN_ROWS * v.shape[3], math.inf)
    if rule.v_descale is not None and rms.numel():
        # One more product in fp32: as good a kernel may round one output in 256 to the other side.
        rms = rms + ulps(top.amax(), q.dtype) / 32
    return Expected(out, lse, lse_size, empty, counted, 2 * worst + 2 * ulps(top, q.dtype), pool, sizes, 2 * rms)


def ulp(value: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at `value`."""
    return ulps(torch.tensor([value], dtype=torch.float64), dtype).item()


def ulps(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    return torch.exp2(values.log2().floor()).clamp(min=info.smallest_normal) * info.eps


def problems(out: torch.Tensor, lse: torch.Tensor | None, right: Expected) -> list[str]:
    """What is wrong with an output and its LSE, in words; empty when both meet the yardstick. NaN never passes.

    lse: (batch, heads_q, seqlen_q). Rows that do not count may hold anything.
    """
    found = []
    if out.numel():
        difference = torch.where(right.counted[..., None, None], out.double() - right.out.double(), 0.0)
        worst = difference.abs().amax((1, 2, 3))
        if not bool((worst <= right.max_error).all()):
            entry = most_beyond(worst, right.max_error)
            limit = right.max_error[entry].item()
            found.append(f"entry {entry}: max|out - ref| = {worst[entry].item():.3e}, allowed {limit:.3e}")
        rms = (sums(difference.square().sum((1, 2, 3)), right.pool) / right.sizes.clamp(min=1)).sqrt()
        if not bool((rms <= right.rms_error).all()):
            pool = most_beyond(rms, right.rms_error)
            limit, entries = right.rms_error[pool].item(), int((right.pool == pool).sum())
            found.append(f"RMS(out - ref) = {rms[pool].item():.3e} over {entries} entries, allowed {limit:.3e}")
        nothing = right.empty.transpose(1, 2) & right.counted[..., None]
        if not bool((out[nothing] == 0).all()):
            found.append("rows that see no key are not 0")
    if lse is not None:
        found += _lse_problems(lse, right)
    return found


def most_beyond(errors: torch.Tensor, limits: torch.Tensor) -> int:
    """Where an error exceeds its limit by the largest factor; NaN is beyond any."""
    factor = torch.where(errors <= limits, 0.0, errors / limits)
    return int(factor.nan_to_num(math.inf, math.inf).argmax())


def _lse_problems(lse: torch.Tensor, right: Expected) -> list[str]:
    if lse.dtype != torch.float32 or lse.shape != right.lse.shape:
        return [f"lse is {lse.dtype} {tuple(lse.shape)}, not float32 {tuple(right.lse.shape)}"]
    counted = right.counted[:, None].expand_as(lse)
    got, wanted, size = lse.double()[counted], right.lse[counted], right.lse_size[counted]
    infinite = torch.isneginf(wanted)
    if not torch.equal(torch.isneginf(got), infinite):
        return ["lse is not -inf exactly where a row sees no key"]
    error = (torch.where(infinite, 0.0, got - wanted).abs() / size).nan_to_num(math.inf)
    if error.numel() and not error.max().item() <= LSE_TOLERANCE:
        return [f"|lse - ref| / max(1, |ref|, |bias|) = {error.max().item():.3e}, allowed {LSE_TOLERANCE:.0e}"]
    return []


# ---- pools of entries ----


def pools(counted: torch.Tensor, heads_q: int, lengths_k: torch.Tensor | None) -> torch.Tensor:
    """Each entry's pool, (batch,)."""
    tokens = counted.sum(1).tolist()
    keys = [0] * len(tokens) if lengths_k is None else lengths_k.tolist()
    return torch.tensor(pooled([n * heads_q for n in tokens], keys), dtype=torch.int64, device=counted.device)


def pooled(rows: Sequence[int], keys: Sequence[int]) -> list[int]:
    """Each entry's pool: entries in the order of their keys, together until a pool has MIN_ROWS rows of a softmax.

    Entries with the same number of keys share a pool.
    """
    pools, current, gathered, last = [0] * len(rows), 0, 0, -1
    for entry in sorted(range(len(rows)), key=lambda entry: keys[entry]):
        if gathered >= MIN_ROWS and keys[entry] != last:
            current, gathered = current + 1, 0
        pools[entry] = current
        gathered, last = gathered + rows[entry], keys[entry]
    if gathered < MIN_ROWS:  # the last ones join those before
        pools = [min(pool, max(current - 1, 0)) for pool in pools]
    return pools


def sums(values: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Of entries' values, by pool."""
    pools = int(pool.max()) + 1 if pool.numel() else 0
    return values.new_zeros(pools).index_add_(0, pool, values)


# ---- three ways to compute it ----


class Part:
    """Some batch entries and key/value heads, small enough to be computed at a time."""

    def __init__(self, q: Any, k: Any, v: Any, rule: Rule, entries: slice, heads: slice):
        # (batch, heads_kv, group, seqlen_q, d), with k and v (batch, heads_kv, 1, seqlen_k, d)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        heads_kv = k.shape[1]
        self.q, self.k, self.v, self.rule = q.unflatten(1, (heads_kv, -1)), k.unsqueeze(2), v.unsqueeze(2), rule
        self.sink = None if rule.sink is None else rule.sink[heads].view(heads_kv, -1, 1, 1)
        first = heads.start // self.q.shape[2]
        groups = (entries, slice(first, first + heads_kv), None, None, None)
        self.scale = rule.scale if rule.k_descale is None else rule.scale * rule.k_descale[groups]
        self.gain = 1.0 if rule.v_descale is None else rule.v_descale[groups]
        self.slopes = self.mask = None
        used_q, used_k = (None if x is None else x[entries] for x in (rule.lengths_q, rule.lengths_k))
        if rule.window == (None, None) and rule.slopes is None and used_k is None:
            return
        end_q, end_k = ((n if used is None else used) for n, used in ((q.shape[2], used_q), (k.shape[2], used_k)))
        shift = torch.as_tensor(end_k - end_q, device=q.device).reshape(-1)
        self.distance = distances(q.shape[2], k.shape[2], shift)[:, None, None]
        self.mask = allowed(self.distance, rule.window)
        if used_k is not None:
            within = torch.arange(k.shape[2], device=q.device) < used_k.view(-1, 1, 1, 1, 1)
            self.mask = within if self.mask is None else self.mask & within
        if rule.slopes is not None:
            slopes = rule.slopes if rule.slopes.dim() == 1 else rule.slopes[entries]
            self.slopes = slopes[..., heads].unflatten(-1, (heads_kv, -1))[..., None, None]

    def _modified(self, scores: Any) -> Any:
        """Softcap, ALiBi and mask on scaled scores, in their precision."""
        if self.rule.softcap:
            scores = self.rule.softcap * torch.tanh(scores / self.rule.softcap)
        if self.slopes is not None:
            wide = torch.promote_types(scores.dtype, torch.float32)
            scores = (scores.to(wide) - self.slopes.to(wide) * self.distance.abs()).to(scores.dtype)
        return scores if self.mask is None else scores.masked_fill(~self.mask, -math.inf)

    def _weights(self, scores: Any) -> Any:
        if self.sink is None:
            return scores.softmax(-1).nan_to_num(0.0)
        column = self.sink.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]

    def exact(self) -> tuple[Any, Any, Any, Any]:
        """Float64 attention rounded to q's dtype, its float64 LSE and what that is made of, and which rows see no key.

        What it is made of: the mean size of the ALiBi biases behind it, which a score may cancel but for rounding.
        """
        scores = self._modified((self.q.double() @ self.k.double().mT) * self.scale)
        lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
        empty = torch.isneginf(lse)
        if self.sink is not None:
            lse = torch.logaddexp(lse, self.sink[..., 0].double())
        weights = (scores - lse[..., None]).exp_().nan_to_num_(0.0)
        parts = torch.zeros_like(lse)
        if self.slopes is not None:
            parts = (weights * (self.slopes.double() * self.distance).abs()).sum(-1)
        return (weights @ self.v.double() * self.gain).to(self.q.dtype), lse, parts, empty

    def plain(self) -> Any:
        """Attention as one would write it in PyTorch, every intermediate in the low precision."""
        scaled = (self.q * self.scale).to(self.q.dtype)
        return (self._weights(self._modified(scaled @ self.k.mT)) @ self.v * self.gain).to(self.q.dtype)

    def model(self) -> Any:
        """A float32 softmax with P rounded to the low precision: the error that is inherent in such a kernel."""
        weights = self._weights(self._modified((self.q.float() @ self.k.float().mT) * self.scale))
        return (weights.to(self.q.dtype).float() @ self.v.float() * self.gain).to(self.q.dtype)


def parts(q: torch.Tensor, k: torch.Tensor, chunk: int) -> Iterator[tuple[slice, slice]]:
    """(batch entries, key/value heads) of at most about `chunk` scores together."""
    batch, seqlen_q, heads_q = q.shape[:3]
    scores = max(heads_q * seqlen_q * k.shape[1], 1)  # of one entry
    entries = max(1, chunk // scores)
    heads = k.shape[2] if scores <= chunk else max(1, k.shape[2] * chunk // scores)
    for entry in range(0, batch, entries):
        for head in range(0, k.shape[2], max(heads, 1)):
            yield slice(entry, min(entry + entries, batch)), slice(head, min(head + heads, k.shape[2]))
