"""A right backward on the CPU, and wrong ones: what the checks of gradients are proved with where there is no GPU.

It computes as kernels do, entry by entry: float32, with P and dS rounded before products. `fault` breaks one thing of
the backward; the forward is `stand_in`'s and right.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from runtime.errors import CaptureError
from tests.gpu.stand_in import Options, Stand


class BwdStand(Stand):
    """Stands in for `tests.gpu.dut.Gpu`, differentiably. long: elements; what lies beyond counts as beyond 32 bits."""

    def __init__(self, fault: str = "", long: int = 2**14):
        super().__init__("", long)
        self.broken, self.cold_backward, self.backwards = fault, True, 0
        self.last: Any = None  # what the last forward saved

    def force(self, key: str, pack: bool = False) -> None:
        super().force(key, pack)
        self.cold_backward = True

    def attn(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return self._differentiable(super().attn, q, k, v, options)

    def varlen(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return self._differentiable(super().varlen, q, k, v, options)

    def _differentiable(self, function: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        options = dict(options)
        deterministic = options.pop("deterministic", False)
        parameters = options.pop("sink", None), options.pop("alibi_slopes", None)
        wanted = options.pop("return_lse", False)
        out, lse = _Attention.apply(self, function, options, deterministic, q, k, v, *parameters)
        return (out, lse) if wanted else out

    def gradients(self, saved: Any, options: dict[str, Any], dout: Any, dlse: Any, deterministic: bool) -> list[Any]:
        """Of q, k, v, sink and slopes. saved: those, out and lse."""
        self._warm_backward()
        if self.broken == "the last forward's state":
            saved = self.last
        if self.recording is not None and self.broken == "a graph keeps the lengths":
            options = {name: x.clone() if torch.is_tensor(x) else x for name, x in options.items()}
        *inputs, out, lse = saved
        found = [None if x is None else torch.empty_like(x, dtype=torch.float32) for x in inputs]
        results = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        if dout is None:
            dout = torch.zeros_like(out) + (self.broken == "a missing dout is not 0")

        def launch() -> None:
            for x in found:
                if x is not None:
                    x.zero_()
            self._entries(found, inputs, options, out, lse, dout, dlse)
            self._whole_backward(found, inputs, options, dout)
            for x, result in zip(found, results, strict=True):
                if result is not None:
                    result.copy_(x)
            self.backwards += 1
            if self.broken == "not deterministic" and deterministic and self.backwards % 3 == 0 and results[0].numel():
                results[0].view(torch.int16)[(0,) * results[0].dim()] ^= 1

        launch()
        if self.recording is not None:
            self.recording.append(launch)
        return results

    def _warm_backward(self) -> None:
        if self.recording is not None and self.cold_backward and self.broken != "a cold capture":
            raise CaptureError("a load during capture")
        self.cold_backward = False

    def _entries(self, found: Any, inputs: Any, given: Any, out: Any, lse: Any, dout: Any, dlse: Any) -> None:
        (q, k, v, sink, slopes), fault = inputs, self.broken
        cu_q, cu_k, used_q, used_k = (given.get(f"{a}_{b}") for a in ("cu_seqlens", "seqused") for b in "qk")
        if fault == "seqused_k ignored":
            used_k = None
        leftpad = None if fault == "leftpad ignored in the backward" else given.get("leftpad_k")
        changed = {"causal": False, "softmax_scale": None, "window": None, "softcap": 0.0} | given
        if fault == "causal ignored":
            changed["causal"] = False
        names = ("causal", "softmax_scale", "window", "softcap")
        options = self._options(q, v, *(changed[name] for name in names), sink, slopes)
        options.left = options.left and options.left + (fault == "window one too wide")
        options.scale *= {"scale 0.5 % off": 1.005}.get(fault, 1)
        by_row, dlse_by_row = (None if x is None else x.transpose(-1, -2) for x in (lse, dlse))
        rooms = zip(self._rooms(q, cu_q, used_q), self._rooms(k, cu_k, used_k, leftpad), strict=True)
        for b, (at_q, at_k) in enumerate(rooms):
            of_q = [None if x is None else _rows(x, at_q) for x in (q, out, by_row, dout, dlse_by_row)]
            if fault == "statistics off by the padding" and cu_q is not None:
                of_q[2] = of_q[2].roll(b, 0)
            of_k = [_rows(x, at_k) for x in (k, v)]
            options.slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            dq, dk, dv, dsink, dslopes = self._entry_gradients(*of_q, *of_k, options)
            if fault == "dK off by the padding" and cu_k is not None and q.shape[-2] > k.shape[-2]:
                dk = dk.roll(b, 0)
            for whole, part, at in zip(found, (dq, dk, dv), (at_q, at_k, at_k), strict=False):
                _rows(whole, at).copy_(part)
                if fault == "gradients of the padding are not 0" and at[1].start and at is at_k and leftpad is not None:
                    _rows(whole, (at[0], slice(at[1].start - 1, at[1].start))).fill_(1)
            if sink is not None:
                found[3] += dsink
            if slopes is not None:
                by_entry = slopes.dim() == 2
                found[4][b if by_entry else ...] += dslopes
                if by_entry and fault == "slopes of the first entry":
                    found[4][b] = found[4][0]

    def _entry_gradients(
        self, q: Any, out: Any, lse: Any, dout: Any, dlse: Any, k: Any, v: Any, options: Options
    ) -> Any:
        """One entry: q, out, dout (seqlen_q, heads_q, ·), lse and dlse (seqlen_q, heads_q), k, v (seqlen_k, …)."""
        fault, dtype, heads_kv = self.broken, q.dtype, k.shape[1]
        heads = torch.arange(q.shape[1])
        pick = heads % heads_kv if fault == "heads mapped wrongly" else heads // (q.shape[1] // heads_kv)
        if fault == "heads · heads_kv in 32 bits":
            pick = heads * heads_kv % self.long // q.shape[1]
        q, k, v, dout = (x.float().transpose(0, 1).contiguous() for x in (q, k[:, pick], v[:, pick], dout))
        p, slant, distance = self._weights(q, k, lse, options)
        delta = (dout * out.float().transpose(0, 1)).sum(-1)
        if fault == "statistics of the first heads":
            delta = delta[torch.arange(len(delta)) % 128]
        if dlse is not None and fault != "delta without dLSE":
            delta = delta - dlse.T
        dscore = p * (dout @ v.mT - delta[..., None])
        ds = (dscore * (1 if fault == "softcap's derivative missing" else slant)).to(dtype).float()
        low = (p * 16).round() / 16 if fault == "P in 4 bits" else p.to(dtype).float()
        dq = options.scale * ds @ k
        if fault == "the last ragged tile missing":
            ds[:, len(lse) // 16 * 16 :] = 0
        if fault == "the last ragged keys missing":
            low[..., k.shape[1] // 16 * 16 :] = math.nan
        dk = (1 if fault == "scale missing on dK" else options.scale) * ds.mT @ q
        dk, dv = (self._over_the_group(x, pick, heads_kv) for x in (dk, low.mT @ dout))
        if fault == "dV of the wrong head":
            dv = dv.roll(1, 1)
        if fault == "dQ's fragments scrambled":
            dq = dq.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
        dq = dq.transpose(0, 1)
        if fault == "empty rows are NaN":
            dq[(p.sum(-1) == 0).T] = math.nan
        dsink = dslopes = None
        if options.sink is not None:
            shares = (options.sink.detach()[:, None] - lse.T).exp().nan_to_num(0.0)
            dsink = -(shares * delta)[:, : -1 if fault == "a row missing from the sink's" else None].sum(-1)
        if options.slopes is not None:
            dslopes = -(dscore * distance.abs()).sum((-1, -2)) * (-1 if fault == "the slopes' sign" else 1)
        return dq, dk, dv, dsink, dslopes

    def _weights(self, q: Any, k: Any, lse: Any, options: Options) -> Any:
        """P, the softcap's derivative, and the distances from the diagonal."""
        scores, slant = q @ k.mT * options.scale, torch.ones(())
        if options.softcap:
            bent = torch.tanh(scores / options.softcap)
            scores, slant = options.softcap * bent, 1 - bent.square()
        distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        scores = self._masked(scores, q.shape[1], k.shape[1], 1, options)
        p = torch.where(torch.isinf(lse.T)[..., None], 0.0, (scores - lse.T[..., None]).exp())
        if self.broken == "the second half's mask shifted" and options.right is not None:
            p[..., 32:] = p[..., 32:].masked_fill(distance[:, 32:] == options.right, 0.0)
        return p, slant, distance

    def _over_the_group(self, x: Any, pick: Any, heads_kv: int) -> Any:
        """(heads_q, seqlen_k, dim) summed to (seqlen_k, heads_kv, dim)."""
        group = len(pick) // heads_kv
        if self.broken == "one head of the group":
            return x[::group].transpose(0, 1)
        if self.broken == "a split's part missing" and group >= 6:
            x = x.clone()
            x[group - 1 :: group] = 0
        summed = x.new_zeros(heads_kv, *x.shape[1:]).index_add_(0, pick, x)
        return summed.transpose(0, 1)

    def _whole_backward(self, found: Any, inputs: Any, given: Any, dout: Any) -> None:
        """Faults of a whole call."""
        (dq, dk, dv, *_), q, fault = found, inputs[0], self.broken
        if fault == "columns beyond head_dim" and q.shape[-1] < self.variant_dim:
            dq += math.nan
        if fault == "strides ignored" and q.dim() == 4 and q.stride(1) < q.stride(2):
            dq.zero_()
        if fault == "strides of dout ignored" and dout.dim() == 4 and 0 < dout.stride(1) < dout.stride(2):
            dq.zero_()
        if fault == "an expanded dout refused" and 0 in dout.stride():
            dv.zero_()
        if fault == "32-bit offsets" and q.dim() == 4 and q.shape[0] > 1 and q.stride(0) >= self.long:
            dq[1:] = dq[:1]
        if fault == "32-bit workspaces" and q.dim() == 4 and dq.numel() > self.long:
            dq[-1] = 0
        if fault == "32-bit rows of the accumulator" and q.dim() == 4 and q.shape[1] * self.variant_dim > self.long:
            dq[:, -300:] = 0
        if fault == "entries in 16 bits" and q.dim() == 4 and q.shape[0] * 128 * self.variant_dim > self.long:
            dk[16:] = dk[:1]
        cu_k = given.get("cu_seqlens_k")
        if fault == "rows behind the last entry written" and cu_k is not None:
            dk[int(cu_k[-1]) :] = 1
        if fault == "a row not written" and dk.numel():
            dk[..., -1, -1, -1].view(-1)[-1] = math.nan


def _rows(x: Any, at: Any) -> Any:
    entry, rows = at
    return x[rows] if entry is None else x[entry, rows]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand: Any, function: Any, options: Any, deterministic: bool, *inputs: Any) -> Any:
        q, k, v, sink, slopes = inputs
        out, lse = function(q, k, v, sink=sink, alibi_slopes=slopes, return_lse=True, **options)
        ctx.save_for_backward(*inputs, out, lse)
        stand.last = (*inputs, out, lse)
        ctx.given = stand, options, deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        stand, options, deterministic = ctx.given
        found = stand.gradients(ctx.saved_tensors, options, dout, dlse, deterministic)
        if stand.broken == "some inputs alone get nothing" and not all(ctx.needs_input_grad[4:7]):
            found = [None if x is None else x * 0 for x in found]
        return None, None, None, None, *found
