"""How wrong may gradients be: judged against float64 and against what plain PyTorch achieves, as outputs are.

Shapes as in `yardstick`; dout (batch, seqlen_q, heads_q, head_dim_v), dlse (batch, heads_q, seqlen_q). The gradients
are named by what they are of: q, k, v, sink, slopes.

Errors are judged by pools of entries with about as many keys. Of few rows, plain PyTorch may be right by chance where
as good a kernel is not: then the RMS is not judged, and the largest error gets what rounding may add. Gradients of
sinks and slopes are few sums over many rows: their errors are judged by what rounding the output, on which every row's
delta depends, does to such a sum; and so is dK where all queries have a part in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tests.gpu.yardstick import MIN_ROWS, Part, Rule, most_beyond, parts, pools, sums, ulps

CHUNK = 1 << 26  # scores computed at a time
MIN_ELEMENTS = 2048  # of a gradient whose RMS is judged
FP32 = 2.0**-20  # what float32 may lose of an exponential, times its argument
TERMS = 2.0**-18  # and of a sum of products, whose terms tensor cores cut off
SPREAD = 4  # standard deviations that a sum over rows may be off


@dataclass(frozen=True)
class Gradient:
    """ref: (entries, rows, heads, dim), float64 rounded to the gradient's dtype; counted: (entries, rows), rows that
    are judged. max_error: (entries,), allowed on each; pool: (entries,); sizes, rms_error: each pool's elements and
    what it is allowed, ∞ with few rows."""

    ref: torch.Tensor
    counted: torch.Tensor
    max_error: torch.Tensor
    pool: torch.Tensor
    sizes: torch.Tensor
    rms_error: torch.Tensor


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, rule: Rule, dlse: torch.Tensor | None = None
) -> dict[str, Gradient]:
    """The right gradients and the errors that are allowed on them.

    max|d − ref| ≤ 2·max|pt − ref| + 2 ulp(max|ref|), where pt rounds every intermediate to the low precision, and
    RMS(d − ref) ≤ 2·RMS(model − ref), where the model is float32 but for P, dS and the output. Both get what float32
    may lose besides: where a row sees one key, nothing else is left of dS. dout, dlse: 0 in rows that do not count.
    """
    counted_q, counted_k = _counted(q, rule.lengths_q), _counted(k, rule.lengths_k)
    telling = _telling(counted_q, k, rule)
    pool = pools(telling, q.shape[2], rule.lengths_k)
    rows = sums(telling.sum(1).double() * q.shape[2], pool)
    enough = (rows == 0) | (rows >= MIN_ROWS)
    loss = torch.where(enough[pool], FP32, torch.finfo(q.dtype).eps)
    tallies = {name: _Tally(x, counted, pool) for name, x, counted in (("q", q, counted_q), ("k", k, counted_k))}
    tallies["v"] = _Tally(v, counted_k, pool)
    if rule.sink is not None:
        tallies["sink"] = _Tally.of_sums(rule.sink, pool)
    if rule.slopes is not None:
        tallies["slopes"] = _Tally.of_sums(rule.slopes, pool)
    group = q.shape[2] // k.shape[2]
    for entries, heads_kv in parts(q, k, CHUNK) if q.numel() else ():
        heads = slice(heads_kv.start * group, heads_kv.stop * group)
        part = Part(q[entries, :, heads], k[entries, :, heads_kv], v[entries, :, heads_kv], rule, entries, heads)
        given = _split(part, dout[entries, :, heads], None if dlse is None else dlse[entries, heads])
        exact = _Pass(part, *given, torch.float64)
        found = [exact.gradients(), exact.noise(loss[entries])]
        for step in (_same, lambda x: x.to(q.dtype).to(x.dtype)):
            low = _Pass(part, *given, torch.float32, lambda x: x.to(q.dtype).to(x.dtype), step)
            found.append(low.gradients())
        for name, tally in tallies.items():
            tally.add(entries, heads_kv if name in "kv" else heads, *(x[name] for x in found))
    return {name: tally.done(enough) for name, tally in tallies.items()}


def problems(name: str, got: torch.Tensor, right: Gradient) -> list[str]:
    """What is wrong with a gradient of (entries, rows, heads, dim), in words. NaN never passes."""
    if not got.numel():
        return []
    found = []
    difference = torch.where(right.counted[..., None, None], got.double() - right.ref, 0.0)
    worst = difference.abs().amax((1, 2, 3)).nan_to_num(math.inf, math.inf)
    if not bool((worst <= right.max_error).all()):
        entry = most_beyond(worst, right.max_error)
        limit = right.max_error[entry].item()
        found.append(f"d{name} of entry {entry}: max|d - ref| = {worst[entry].item():.3e}, allowed {limit:.3e}")
    rms = (sums(difference.square().sum((1, 2, 3)), right.pool) / right.sizes.clamp(min=1)).sqrt()
    if not bool((rms <= right.rms_error).all()):
        at = most_beyond(rms, right.rms_error)
        limit, entries = right.rms_error[at].item(), int((right.pool == at).sum())
        found.append(f"d{name}: RMS(d - ref) = {rms[at].item():.3e} over {entries} entries, allowed {limit:.3e}")
    return found


def _counted(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def _telling(counted: torch.Tensor, k: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Which rows say something about rounding: those of a softmax of two columns or more."""
    rows = counted.sum(1)
    lengths = torch.full_like(rows, k.shape[1]) if rule.lengths_k is None else rule.lengths_k
    center = torch.arange(counted.shape[1], device=k.device) + (lengths - rows)[:, None]
    left, right = rule.window
    first = torch.zeros_like(center) if left is None else (center - left).clamp(min=0)
    last = (lengths - 1)[:, None] if right is None else torch.minimum(center + right, (lengths - 1)[:, None])
    seen = (last - first + 1).clamp(min=0)
    return counted & (seen + (rule.sink is not None) >= 2)


def _same(x: Any) -> Any:
    return x


def _split(part: Part, dout: Any, dlse: Any) -> tuple[Any, Any]:
    """dout and dlse as (batch, heads_kv, group, seqlen_q, ·)."""
    shape = part.q.shape[1:3]
    dout = dout.transpose(1, 2).unflatten(1, shape)
    return dout, None if dlse is None else dlse.unflatten(1, shape)[..., None]


class _Pass:
    """The gradients of a part in one way: in the precision `wide`; `operand` rounds what goes into products besides
    the inputs, and the output; `step` every other intermediate."""

    def __init__(self, part: Part, dout: Any, dlse: Any, wide: Any, operand: Any = _same, step: Any = _same):
        self.part, self.operand, self.step = part, operand, step
        self.q, self.k, self.v, self.dout = (x.to(wide) for x in (part.q, part.k, part.v, dout))
        scores, self.slant = self._scores()
        sink = None if part.sink is None else part.sink.to(wide)
        nothing = scores.new_full((*scores.shape[:-1], 1), -math.inf)
        lse = torch.logsumexp(scores, -1, keepdim=True) if scores.shape[-1] else nothing
        if sink is not None:
            lse = torch.logaddexp(lse, sink)
        self.p = step((scores - lse).exp_().nan_to_num_(0.0))
        self.p_sink = None if sink is None else step((sink - lse).exp())
        self.p_low = operand(self.p)
        self.out = operand(step(self.p_low @ self.v))
        delta = step(step(self.dout * self.out).sum(-1, keepdim=True))
        self.delta = delta if dlse is None else step(delta - dlse)
        self.centered = step(self.dout @ self.v.mT) - self.delta
        self.dscore = step(self.p * self.centered)
        self.sizes = scores.abs().nan_to_num_(0.0, 0.0).clamp_(min=1)

    def _scores(self) -> tuple[Any, Any]:
        """Scores after softcap, ALiBi and mask, and the derivative of the softcap (1 without)."""
        part, step = self.part, self.step
        scores, slant = step((self.q @ self.k.mT) * part.scale), 1.0
        if cap := part.rule.softcap:
            bent = step(torch.tanh(scores / cap))
            scores, slant = step(cap * bent), 1 - bent.square()
        if part.slopes is not None:
            scores = step(scores - part.slopes.to(scores.dtype) * part.distance.abs())
        return (scores if part.mask is None else scores.masked_fill(~part.mask, -math.inf)), slant

    def gradients(self) -> dict[str, Any]:
        """Of q, k, v as (batch, seqlen, heads, dim); of sink and slopes each entry's sums, (batch, 1, heads, 1)."""
        step, scale = self.step, self.part.scale
        ds = self.operand(step(self.dscore * self.slant))
        found = {
            "q": _rows(step(ds @ self.k * scale)),
            "k": _rows(step(step(ds.mT @ self.q * scale).sum(2, keepdim=True))),
            "v": _rows(step(step(self.p_low.mT @ self.dout).sum(2, keepdim=True))),
        }
        if self.p_sink is not None:
            found["sink"] = _rows(-step(self.p_sink * self.delta).sum(3, keepdim=True))
        if self.part.slopes is not None:
            found["slopes"] = _rows(-step(self.dscore * self.part.distance.abs()).sum((3, 4), keepdim=True))
        return found

    def noise(self, loss: torch.Tensor) -> dict[str, Any]:
        """The variance of each gradient. loss: (batch,), relative errors of P and, if not larger, of dO·Vᵀ's terms."""
        loss = loss.view(-1, 1, 1, 1, 1)
        dp = (loss * self.p * self.sizes).square()
        dscore = (loss.clamp(min=TERMS) * self.p).square() * (self.dout.square() @ self.v.square().mT)
        dscore = dscore + (loss * self.dscore * self.sizes).square()
        square = self.part.scale**2
        found = {
            "q": _rows(square * (dscore @ self.k.square())),
            "k": _rows(square * (dscore.mT @ self.q.square()).sum(2, keepdim=True)),
            "v": _rows((dp.mT @ self.dout.square()).sum(2, keepdim=True)),
        }
        rounding = SPREAD * torch.finfo(self.part.q.dtype).eps / 4
        spread = self.out.square() + self.p.square() @ self.v.square()
        delta = (rounding**2 + TERMS**2) * (self.dout.square() * spread).sum(-1, keepdim=True)
        found["k"] = found["k"] + _rows(square * self._common(delta))
        if self.p_sink is not None:
            found["sink"] = _rows((self.p_sink.square() * delta).sum(3, keepdim=True))
        if self.part.slopes is not None:
            far = self.part.distance.abs().double()
            terms = (dscore * far.square()).sum(-1, keepdim=True) + (self.p * far).sum(
                -1, keepdim=True
            ).square() * delta
            found["slopes"] = _rows(terms.sum(3, keepdim=True))
        return found

    def _common(self, delta: torch.Tensor) -> torch.Tensor:
        """The variance that each row's delta brings dK along what the queries have in common: one sum over rows for all
        keys that they weigh alike, where plain PyTorch may be right by chance. Nothing to speak of if queries have no
        common part. delta: its variance, (batch, heads_kv, group, rows, 1)."""
        center = (delta * self.q).sum((2, 3), keepdim=True) / delta.sum((2, 3), keepdim=True).clamp(min=1e-300)
        weights = (self.p.square() * delta).sum((2, 3)).unsqueeze(2).unsqueeze(-1)
        return weights * center.square()


def _rows(x: Any) -> Any:
    """(batch, heads_kv, group, rows, dim) as (batch, rows, heads, dim)."""
    return x.flatten(1, 2).transpose(1, 2)


class _Tally:
    """Collects a gradient and the errors of the ways to compute it, part by part. `of`: what it is the gradient of."""

    def __init__(self, of: torch.Tensor, counted: torch.Tensor, pool: torch.Tensor):
        self.dtype, self.counted, self.pool = of.dtype, counted, pool
        shape = (*counted.shape, *of.shape[2:])
        self.ref, self.variance, self.model, self.plain = torch.zeros(4, *shape, dtype=torch.float64, device=of.device)
        self.by_entry = True

    @classmethod
    def of_sums(cls, of: torch.Tensor, pool: torch.Tensor) -> _Tally:
        """Of a sink or slopes: an entry with one row, or, where each entry has its own slopes, one each."""
        by_entry = of.dim() == 2
        pool = pool if by_entry else pool.new_zeros(1)
        shaped = of.reshape(-1, 1, of.shape[-1], 1)
        made = cls(shaped, torch.ones(shaped.shape[:2], dtype=torch.bool, device=of.device), pool)
        made.by_entry = by_entry
        return made

    def add(self, entries: slice, heads: slice, *found: torch.Tensor) -> None:
        """ref, its variance, model, plain of some entries and heads."""
        for total, x in zip((self.ref, self.variance, self.model, self.plain), found, strict=True):
            if self.by_entry:
                total[entries, :, heads] = x.double()
            else:
                total[:, :, heads] += x.double().sum(0, keepdim=True)

    def done(self, enough: torch.Tensor) -> Gradient:
        """enough: whether the rows of each pool suffice for an RMS."""
        ref = self.ref.to(self.dtype).double()
        judged = self.counted[..., None, None]
        worst, top, lost = (_top(x.abs() * judged, self.pool) for x in (self.plain - ref, ref, self.variance.sqrt()))
        per_row = ref[0, 0].numel() if ref.shape[0] and ref.shape[1] else 0
        sizes = sums(self.counted.sum(1).double() * per_row, self.pool)
        squares = (sums((x * judged).sum((1, 2, 3)), self.pool) for x in ((self.model - ref).square(), self.variance))
        model, lost_rms = ((x / sizes.clamp(min=1)).sqrt() for x in squares)
        rms = torch.where((sizes >= MIN_ELEMENTS) & enough[: len(sizes)], 2 * model + lost_rms, math.inf)
        limits = (2 * worst + 2 * ulps(top, self.dtype) + lost)[self.pool]
        return Gradient(ref, self.counted, limits, self.pool, sizes, rms)


def _top(x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Each pool's largest value."""
    highest = x.flatten(1).amax(1) if x.numel() else x.new_zeros(len(x))
    found = x.new_zeros(int(pool.max()) + 1 if pool.numel() else 0)
    return found.scatter_reduce(0, pool, highest, "amax")
