"""Leaves, gradients and their reference."""

from __future__ import annotations

import torch

import runtime
from tests.support.attention import BF16
from tests.support.varlen import ints

NAMES = ("q", "k", "v", "sink", "alibi_slopes")


SINK = torch.tensor([1.0, -2, 0, 5])


def attention64(q, k, v, *, causal=False, softmax_scale=None, window=(None, None), softcap=0.0, sink=None,
                alibi_slopes=None):  # fmt: skip
    """(out, lse) of torch's operators in fp64; every query sees a key or a sink."""
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2))
    scores = scores * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.expand(q.shape[0], -1)[:, :, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden if left is None else hidden | (distance > left)
    hidden = hidden if right is None else hidden | (distance < -right)
    columns = scores.masked_fill(hidden, -torch.inf)
    if sink is not None:
        columns = torch.cat((columns, sink[None, :, None, None].expand(*columns.shape[:3], 1)), 3)
    lse = torch.logsumexp(columns, 3)
    weights = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(group, 2)), lse


def leaves(*tensors, dtype=None):
    """The same values, requiring grad."""
    return [None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def grads(tensors):
    return [None if t is None else t.grad for t in tensors]


def assert_close(found, wanted):
    for name, grad, want in zip(NAMES, found, wanted, strict=False):
        assert (grad is None) == (want is None), name
        if want is not None:
            assert grad.shape == want.shape, name
            bound = 0.02 * want.abs().max().item() + 0.01 if want.numel() else 0
            assert (grad.double() - want.double()).abs().le(bound).all(), name


def check(q, k, v, *, sink=None, alibi_slopes=None, gradients=None, **options):
    """Gradients through out and LSE, against autograd's. The inputs keep their strides."""
    torch.manual_seed(9)
    given = leaves(q, k, v, sink, alibi_slopes)
    exact = leaves(q, k, v, sink, alibi_slopes, dtype=torch.float64)
    found = runtime.flash_attn(*given[:3], sink=given[3], alibi_slopes=given[4], return_lse=True, **options)
    wanted = attention64(*exact[:3], sink=exact[3], alibi_slopes=exact[4], **options)
    dout, dlse = gradients or (torch.randn(found[0].shape).to(q.dtype), torch.randn(found[1].shape))
    torch.autograd.backward(found, (dout, dlse))
    torch.autograd.backward(wanted, (dout.double(), dlse.double()))
    assert_close(grads(given), grads(exact))
    assert all(t is None or t.grad.dtype == t.dtype for t in given)


class Side:
    """The sequences of q, or of k and v: packed or padded, of which seqused may count all but the last token."""

    def __init__(self, lengths, packed, used):
        self.lengths, self.packed = lengths, packed
        self.alive = [max(0, n - 1) if used else n for n in lengths]
        self.ends = torch.tensor([0, *lengths]).cumsum(0).int() if packed else None
        self.seqused = ints(*self.alive) if used or not packed else None

    def tensor(self, heads):
        shape = (sum(self.lengths),) if self.packed else (len(self.lengths), max(self.lengths))
        return torch.randn(*shape, heads, 64).to(BF16).requires_grad_()

    def entry(self, b, t):
        """(1, n, …): the rows of sequence b."""
        first = sum(self.lengths[:b]) if self.packed else 0
        rows = slice(first, first + self.alive[b])
        return t[None, rows] if self.packed else t[b : b + 1, rows]
