"""How wrong may an attention output be: judged against float64 and against what plain PyTorch achieves.

All tensors: q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim). A window is
(left, right), None for an open side; causal is right = 0; both align bottom-right. Empty rows give 0 and −inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

CHUNK = 1 << 28  # scores computed at a time: 2 GB of float64
LSE_TOLERANCE = 2e-5

Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Expected:
    """out: float64 rounded to the output dtype; lse: float64; max_error, rms_error: what is allowed against out."""

    out: torch.Tensor
    lse: torch.Tensor
    max_error: float
    rms_error: float


def allowed(seqlen_q: int, seqlen_k: int, window: Window, device: Any) -> torch.Tensor | None:
    """Boolean (seqlen_q, seqlen_k): which keys a query sees; None if all."""
    left, right = window
    if left is None and right is None:
        return None
    row = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    column = torch.arange(seqlen_k, device=device)[None]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None:
        mask &= column >= row - left
    if right is not None:
        mask &= column <= row + right
    return mask


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window) -> Expected:
    """The right answer and the errors that are allowed on it.

    max|out − ref| ≤ 2·max|pt − ref| + 2 ulp(max|ref|), where pt is plain PyTorch in the low precision, and
    RMS(out − ref) ≤ 2·RMS(model − ref), where the model is a float32 softmax whose P is rounded to the low precision.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float64, device=q.device)
    worst, squares = 0.0, 0.0
    mask = allowed(q.shape[1], k.shape[1], window, q.device)
    for entries, heads_kv in _parts(q, k):
        group = q.shape[2] // k.shape[2]
        heads = slice(heads_kv.start * group, heads_kv.stop * group)
        part = _grouped(q[entries, :, heads], k[entries, :, heads_kv], v[entries, :, heads_kv])
        ref, part_lse = _exact(*part, scale, mask)
        out[entries, :, heads] = ref.flatten(1, 2).transpose(1, 2)
        lse[entries, heads] = part_lse.flatten(1, 2)
        worst = max(worst, _max_abs(_plain(*part, scale, mask), ref))
        squares += (_model(*part, scale, mask).double() - ref.double()).square().sum().item()
    top = out.abs().max().item() if out.numel() else 0.0
    return Expected(out, lse, 2 * worst + 2 * ulp(top, q.dtype), 2 * math.sqrt(squares / max(out.numel(), 1)))


def ulp(value: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at `value`."""
    info = torch.finfo(dtype)
    return max(2.0 ** math.floor(math.log2(value)) if value else 0.0, info.smallest_normal) * info.eps


def problems(out: torch.Tensor, lse: torch.Tensor | None, right: Expected) -> list[str]:
    """What is wrong with an output and its LSE, in words; empty when both meet the yardstick. NaN never passes."""
    found = []
    difference = out.double() - right.out.double()
    if difference.numel():
        worst, rms = difference.abs().max().item(), difference.square().mean().sqrt().item()
        if not worst <= right.max_error:
            found.append(f"max|out - ref| = {worst:.3e}, allowed {right.max_error:.3e}")
        if not rms <= right.rms_error:
            found.append(f"RMS(out - ref) = {rms:.3e}, allowed {right.rms_error:.3e}")
        empty = torch.isneginf(right.lse).transpose(1, 2)
        if not bool((out[empty] == 0).all()):
            found.append("rows that see no key are not 0")
    if lse is not None:
        found += _lse_problems(lse, right.lse)
    return found


def _lse_problems(lse: torch.Tensor, right: torch.Tensor) -> list[str]:
    if lse.dtype != torch.float32 or lse.shape != right.shape:
        return [f"lse is {lse.dtype} {tuple(lse.shape)}, not float32 {tuple(right.shape)}"]
    empty = torch.isneginf(right)
    if not torch.equal(torch.isneginf(lse), empty):
        return ["lse is not -inf exactly where a row sees no key"]
    if bool((~empty).any()):
        error = ((lse.double() - right)[~empty].abs() / right[~empty].abs().clamp(min=1)).max().item()
        if not error <= LSE_TOLERANCE:
            return [f"|lse - ref| / max(1, |ref|) = {error:.3e}, allowed {LSE_TOLERANCE:.0e}"]
    return []


def _parts(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """(batch entries, key/value heads) of at most about CHUNK scores together."""
    batch, seqlen_q, heads_q = q.shape[:3]
    scores = max(heads_q * seqlen_q * k.shape[1], 1)  # of one entry
    entries = max(1, CHUNK // scores)
    heads = k.shape[2] if scores <= CHUNK else max(1, k.shape[2] * CHUNK // scores)
    for entry in range(0, batch, entries):
        for head in range(0, k.shape[2], max(heads, 1)):
            yield slice(entry, min(entry + entries, batch)), slice(head, min(head + heads, k.shape[2]))


def _grouped(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """As (batch, heads_kv, group, seqlen_q, d), with k and v (batch, heads_kv, 1, seqlen_k, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)


def _exact(q: Any, k: Any, v: Any, scale: float, mask: Any) -> tuple[Any, Any]:
    """Float64 attention rounded to q's dtype, and its float64 LSE, of tensors as `_grouped` gives them."""
    scores = (q.double() @ k.double().mT) * scale
    if mask is not None:
        scores.masked_fill_(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    weights = scores.sub_(lse[..., None]).exp_().nan_to_num_(0.0)
    return (weights @ v.double()).to(q.dtype), lse


def _plain(q: Any, k: Any, v: Any, scale: float, mask: Any) -> Any:
    """Attention as one would write it in PyTorch, every intermediate in the low precision."""
    scores = (q * scale) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def _model(q: Any, k: Any, v: Any, scale: float, mask: Any) -> Any:
    """A float32 softmax with P rounded to the low precision: the error that is inherent in such a kernel."""
    scores = (q.float() @ k.float().mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0).to(q.dtype).float() @ v.float()).to(q.dtype)


def _max_abs(a: Any, b: Any) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
