"""A right implementation on the CPU, and wrong ones: what the checks are proved with where there is no GPU.

It computes as a kernel does, entry by entry: float32 scores, P rounded before it is normalised. `fault` breaks one
thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from runtime.errors import ArgumentError, CaptureError


@dataclass
class Options:
    """Of one entry: everything but q, k and v. sink, slopes: (heads_q,) or None."""

    scale: float
    left: int | None
    right: int | None
    softcap: float
    sink: Any
    slopes: Any


class Stand:
    """Stands in for `tests.gpu.dut.Gpu`. long: elements; a batch stride beyond it counts as beyond 32 bits."""

    device = "cpu"
    artifacts: ClassVar[dict] = {}
    recording: ClassVar[list[Any] | None] = None  # while a graph is captured: what a replay does

    def __init__(self, fault: str = "", long: int = 2**14):
        self.fault, self.long, self.calls, self.packed, self.cold = fault, long, 0, False, True
        self.variant_dim, self.is_varlen = 0, False
        self.first: dict[Any, Any] = {}  # of each shape, what the first call's cu_seqlens and sink were

    def force(self, key: str, pack: bool = False) -> None:
        self.packed, self.cold = pack, True
        self.variant_dim = int(key.split("-")[2][1:])

    def poison(self) -> None:
        """A stand-in has no workspaces."""

    def attn(self, q: Any, k: Any, v: Any, *, causal: Any = False, softmax_scale: Any = None, window: Any = None,
             softcap: float = 0.0, sink: Any = None, alibi_slopes: Any = None, return_lse: bool = False,
             out: Any = None) -> Any:  # fmt: skip
        rooms = [[(b, slice(x.shape[1])) for b in range(q.shape[0])] for x in (q, k)]
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
        options = self._options(q, v, causal, softmax_scale, window, softcap, sink, alibi_slopes)
        return self._call(q, k, v, lambda: rooms, options, alibi_slopes, lse, lse.transpose(1, 2), out, return_lse)

    def varlen(self, q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
               max_seqlen_q: Any = None, max_seqlen_k: Any = None, seqused_q: Any = None, seqused_k: Any = None,
               causal: Any = False, softmax_scale: Any = None, window: Any = None, softcap: float = 0.0,
               sink: Any = None, alibi_slopes: Any = None, return_lse: bool = False, leftpad_k: Any = None,
               zero_unused: bool = False, out: Any = None) -> Any:  # fmt: skip
        if self.fault == "seqused_k ignored":
            seqused_k = None
        if self.fault == "seqused_q ignored":
            seqused_q = None
        if self.recording is not None and self.fault == "a graph keeps the lengths":
            cu_seqlens_q, cu_seqlens_k = (None if x is None else x.clone() for x in (cu_seqlens_q, cu_seqlens_k))
            seqused_k = None if seqused_k is None else seqused_k.clone()
        if self.fault == "rows before seqused" and cu_seqlens_k is not None and seqused_k is not None:
            cu_seqlens_k = cu_seqlens_k.clone()
            cu_seqlens_k[1:-1] -= 1
        if self.fault == "a plan keeps its first pointers":
            given = (cu_seqlens_q, cu_seqlens_k, seqused_k, sink)
            cu_seqlens_q, cu_seqlens_k, seqused_k, sink = self.first.setdefault((q.shape, k.shape), given)
        if cu_seqlens_q is None:
            lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
            by_row = lse.transpose(1, 2)
        else:
            lse = torch.full((q.shape[1], q.shape[0]), math.nan)
            by_row = lse.T
            if self.fault == "lse in the wrong layout":
                lse, by_row = by_row, by_row
        options = self._options(q, v, causal, softmax_scale, window, softcap, sink, alibi_slopes)

        zero_unused = zero_unused and self.fault != "zero_unused ignored"
        if zero_unused or (q.requires_grad and self.fault != "rows that nobody owns are NaN to autograd"):
            lse.zero_()
            out = q.new_zeros(*q.shape[:-1], v.shape[-1]) if out is None else out

        def rooms() -> Any:
            return self._rooms(q, cu_seqlens_q, seqused_q), self._rooms(k, cu_seqlens_k, seqused_k, leftpad_k)

        self.is_varlen = True
        try:
            result = self._call(q.detach(), k, v, rooms, options, alibi_slopes, lse, by_row, out, return_lse)
        finally:
            self.is_varlen = False
        if self.fault == "tiles beyond the last entry write" and cu_seqlens_q is not None:
            out[int(cu_seqlens_q[-1]) :] = 0
        return result

    def _options(self, q: Any, v: Any, causal: Any, softmax_scale: Any, window: Any, softcap: float, sink: Any,
                 slopes: Any) -> Options:  # fmt: skip
        if (q.shape[-1] % 8 or v.shape[-1] % 8) and self.fault != "misaligned head_dim accepted":
            raise ArgumentError("q", "head_dim must be a multiple of 8", reason="shape")
        fault = self.fault
        left, right = window or (None, None)
        if causal and fault != "causal flag dropped":
            right = 0
        if left is not None and fault == "window one too wide":
            left += 1
        default = (self.variant_dim if fault == "scale of the variant's head_dim" else q.shape[-1]) ** -0.5
        scale = default if softmax_scale is None else softmax_scale
        if fault == "softmax_scale ignored":
            scale = default
        scale *= 1.005 if fault == "scale 0.5 % off" else 1
        softcap = {"softcap ignored": 0.0, "softcap halved": softcap / 2}.get(fault, softcap)
        low = sink is not None and sink.dtype != torch.float32
        if sink is None or fault == "sink ignored" or (low and fault == "low sink ignored"):
            return Options(scale, left, right, softcap, None, slopes)
        return Options(scale, left, right, softcap, sink.float(), slopes)

    def _rooms(self, x: Any, cu_seqlens: Any, used: Any, leftpad: Any = None) -> list[tuple[int | None, slice]]:
        """For each entry, (index along the batch or None, its rows)."""
        if self.fault == "leftpad ignored":
            leftpad = None
        batch = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        rooms: list[tuple[int | None, slice]] = []
        for b in range(batch):
            start = 0 if cu_seqlens is None else int(cu_seqlens[b])
            end = x.shape[1] if cu_seqlens is None else int(cu_seqlens[b + 1])
            end = end if used is None else start + int(used[b])
            if leftpad is not None:
                start = self._first_key(start, end, int(leftpad[b]))
            rooms.append((b if cu_seqlens is None else None, slice(start, end)))
        return rooms

    def _first_key(self, start: int, end: int, padding: int) -> int:
        if self.fault == "negative padding not cut":
            return max(start + min(padding, end - start), 0)
        if self.fault == "padding that ends behind the keys ignored" and padding > end - start:
            return start
        found = min(start + max(padding, 0), end)
        return found - (self.fault == "one key of the padding too many" and found > start)

    def _call(self, q: Any, k: Any, v: Any, rooms: Any, options: Options, slopes: Any, lse: Any, by_row: Any, out: Any,
              return_lse: bool) -> Any:  # fmt: skip
        self._warm()
        out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=q.dtype) if out is None else out

        def launch() -> None:
            for b, (at_q, at_k) in enumerate(zip(*rooms(), strict=True)):
                options.slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
                if slopes is not None and slopes.dim() == 2 and self.fault == "slopes of the first entry":
                    options.slopes = slopes[0]
                parts = [x[rows] if at is None else x[at, rows] for x, (at, rows) in
                         ((q, at_q), (k, at_k), (v, at_k), (out, at_q), (by_row, at_q))]  # fmt: skip
                self._entry(*parts, options)
            self._whole(q, out, lse)

        launch()
        if self.recording is not None:
            self.recording.append(launch)
        result = out.clone() if self.fault == "output not returned" else out
        return (result, lse) if return_lse else result

    def _warm(self) -> None:
        """Count a call, the first of which must not be captured."""
        self.calls += 1
        if self.recording is not None and self.cold and self.fault != "a cold capture":
            raise CaptureError("a load during capture")
        self.cold = False

    def _entry(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options) -> None:
        """One entry: q (seqlen_q, heads_q, d), k and v (seqlen_k, heads_kv, d), lse (seqlen_q, heads_q)."""
        fault = self.fault
        if fault == "one key too many" and len(k) > 8:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        group = q.shape[1] // k.shape[1]
        heads = torch.arange(q.shape[1])
        pick = heads % k.shape[1] if fault == "heads mapped wrongly" else heads // group
        if fault == "heads · heads_kv in 32 bits":
            pick = heads * k.shape[1] % self.long // q.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k[:, pick].float()) * options.scale
        if fault == "columns beyond head_dim" and q.shape[2] < self.variant_dim:
            scores += torch.nan
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = self._masked(scores, len(q), len(k), group, options)
        self._finish(scores, v[:, pick], out, lse, group, options)

    def _masked(self, scores: Any, seqlen_q: int, seqlen_k: int, group: int, options: Options) -> Any:
        fault, packed = self.fault, self.packed and group > 1
        row = torch.arange(seqlen_q)[None, :, None].expand(scores.shape[0], -1, 1)
        if packed and fault == "packed rows taken for tokens":
            row = row * group + (torch.arange(scores.shape[0]) % group)[:, None, None]
        shift = 0 if fault == "aligned top-left" else seqlen_k - seqlen_q
        distance = torch.arange(seqlen_k) - row - shift
        if options.slopes is not None and fault != "slopes ignored":
            slopes = options.slopes
            if packed and fault == "packed heads share a slope":
                slopes = slopes[torch.arange(len(slopes)) // group * group]
            sign = -1 if fault == "slope's sign" else 1
            scores = scores - sign * slopes[:, None, None] * distance.abs()
        beyond = torch.zeros_like(scores, dtype=torch.bool)
        if options.left is not None:
            wide = packed and self.is_varlen and fault == "windows of packed varlen rows one too wide"
            beyond |= distance < -options.left - wide
        if options.right is not None:
            beyond |= distance > options.right
        return scores.masked_fill(beyond, -math.inf)

    def _finish(self, scores: Any, v: Any, out: Any, lse: Any, group: int, options: Options) -> None:
        fault, sink = self.fault, options.sink
        nothing = torch.isneginf(scores).all(-1)
        top = scores.amax(-1).clamp(min=-1e30) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -1e30)
        p = (scores - top[..., None]).exp()
        total, high, shrink = p.sum(-1), top, torch.ones_like(top)
        if sink is not None:
            if self.packed and fault == "packed heads share a sink":
                sink = sink[torch.arange(len(sink)) // group * group]
            high = torch.maximum(top, sink[:, None])
            shrink = (top - high).exp()
            total = total * shrink + (sink[:, None] - high).exp()
        p = p.to(out.dtype).float() if fault != "P in 4 bits" else (p * 16).round() / 16
        o = torch.einsum("hqk,khd->qhd", p, v.float()) * (shrink / total.clamp(min=1e-37)).T[..., None]
        if fault == "columns scrambled":  # as registers of one instruction's layout stored by another's
            o = o.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
        if fault == "empty rows are NaN":
            o[nothing.T] = math.nan
        statistics = total.log() + high
        if fault == "no sink in the LSE of empty rows":
            statistics = statistics.masked_fill(nothing, -math.inf)
        out.copy_(o.to(out.dtype))
        lse.copy_(statistics.T / (math.log(2) if fault == "lse in base 2" else 1))

    def _whole(self, q: Any, out: Any, lse: Any) -> None:
        """Faults of a whole call."""
        fault = self.fault
        if fault == "a row not written" and out.numel():
            out[..., -1, -1, -1].view(-1)[-1] = math.nan
        if fault == "writes past the end" and out._base is not None and out._base.dim() == 4:
            out._base[: out.shape[0], out.shape[1] + 1] = 0
        if fault == "writes columns beyond head_dim_v" and out._base is not None and out._base.dim() == 4:
            out._base[: out.shape[0], 1 : out.shape[1] + 1, :, out.shape[3] + 8] = 0
        if fault == "lse row not written":
            lse[-1, -1, -1] = math.nan
        if fault == "strides ignored" and q.dim() == 4 and q.stride(1) < q.stride(2):
            out.zero_()
        if fault == "32-bit offsets" and q.shape[0] > 1 and q.dim() == 4 and q.stride(0) >= self.long:
            out[1:] = out[:1]
        if fault == "32-bit rows of the LSE" and lse.numel() > self.long:
            lse.view(-1)[self.long :] = math.nan
        if fault == "32-bit token offsets" and q.dim() == 4 and q.shape[1] * q.stride(1) > self.long:
            out[:, -1] = out[:, 0]
        if fault == "32-bit head strides" and q.dim() == 4 and q.shape[2] > 1 and q.stride(2) > self.long // 2:
            out[:, :, -1] = out[:, :, 0]
        if fault == "not deterministic" and self.calls % 3 == 0 and out.numel():
            out[(0,) * out.dim()] += 1
