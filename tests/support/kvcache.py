"""KV caches and what attention over them should give."""

from __future__ import annotations

import torch

from tests.support.attention import BF16, reference
from tests.support.varlen import ints

E4M3 = torch.float8_e4m3fn


NOWHERE = 2**31 - 1


class Cache:
    """Pages in disorder, NaN in every row that no sequence owns, and nonsense in the table behind the lengths."""

    def __init__(self, lengths=(5, 0, 17), page_size=4, max_pages=6, heads_kv=2, head_dim=64, head_dim_v=64, dtype=BF16,
                 room=0):  # fmt: skip
        torch.manual_seed(3)
        self.lengths, self.page_size = ints(*lengths), page_size
        need = [-(-(n + room) // page_size) for n in lengths]
        order = torch.randperm(sum(need) + 2).tolist()
        shape = (sum(need) + 2, page_size, heads_kv)
        self.k = torch.full((*shape, head_dim), torch.nan).to(dtype)
        self.v = torch.full((*shape, head_dim_v), torch.nan).to(dtype)
        self.table = torch.full((len(lengths), max_pages), NOWHERE, dtype=torch.int32)
        for b, pages in enumerate(need):
            for i in range(pages):
                self.table[b, i] = order.pop()
            for j in range(lengths[b]):
                page, row = self.table[b, j // page_size].item(), j % page_size
                self.k[page, row] = torch.randn(heads_kv, head_dim).to(dtype)
                self.v[page, row] = torch.randn(heads_kv, head_dim_v).to(dtype)

    def entry(self, array, b, n):
        """(1, n, heads_kv, dim)"""
        j = torch.arange(n)
        return array.float()[self.table[b, j // self.page_size].long(), j % self.page_size][None]

    def wanted(self, q, b, n, **options):
        return reference(q[b : b + 1], self.entry(self.k, b, n), self.entry(self.v, b, n), **options)


def queries(batch=3, seqlen_q=1, heads_q=4, head_dim=64, dtype=BF16):
    torch.manual_seed(4)
    return torch.randn(batch, seqlen_q, heads_q, head_dim).to(dtype)


def rotated(x, cos, sin, positions, interleaved):
    """(tokens, heads, dim) in fp64, written with complex numbers: no code shared with the fake kernel's."""
    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    x, dim = x.double(), 2 * cos.shape[1]
    part = x[..., :dim]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    found = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    found = found.flatten(-2) if interleaved else found.transpose(-1, -2).flatten(-2)
    return torch.cat((found, x[..., dim:]), -1)
