"""Dense calls and their reference in fp64."""

from __future__ import annotations

import math

import torch

import runtime

BF16 = torch.bfloat16


def inputs(batch=2, seqlen_q=5, seqlen_k=7, heads_q=4, heads_kv=2, head_dim=64, dtype=BF16, seed=0, head_dim_v=None):
    torch.manual_seed(seed)
    return (
        torch.randn(batch, seqlen_q, heads_q, head_dim).to(dtype),
        torch.randn(batch, seqlen_k, heads_kv, head_dim).to(dtype),
        torch.randn(batch, seqlen_k, heads_kv, head_dim_v or head_dim).to(dtype),
    )


def reference(q, k, v, *, causal=False, softmax_scale=None, window=(None, None), softcap=0.0, sink=None,
              alibi_slopes=None):  # fmt: skip
    """(out, lse) row by row in fp64: no code shared with FakeDriver's."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    shift, group = k.shape[1] - q.shape[1], q.shape[2] // max(k.shape[2], 1)
    left, right = window
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                first = 0 if left is None else max(0, i + shift - left)
                last = k.shape[1] if right is None else min(k.shape[1], i + shift + right + 1)
                last = min(last, i + shift + 1) if causal else last
                keys = k[b, first : max(last, first), h // group].double()
                scores = keys @ q[b, i, h].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    slope = alibi_slopes[h] if alibi_slopes.dim() == 1 else alibi_slopes[b, h]
                    scores = scores - slope.double() * (i + shift - torch.arange(first, first + len(keys))).abs()
                columns = scores if sink is None else torch.cat((scores, sink[h : h + 1].double()))
                lse[b, h, i] = torch.logsumexp(columns, 0)
                if len(keys):
                    out[b, i, h] = torch.softmax(columns, 0)[: len(keys)] @ v[b, first:last, h // group].double()
    return out, lse


def check(q, k, v, **options):
    out, lse = runtime.flash_attn(q, k, v, return_lse=True, **options)
    options.pop("out", None)
    want, want_lse = reference(q, k, v, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:3], v.shape[3]) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-3, rtol=1e-4)
    return out
