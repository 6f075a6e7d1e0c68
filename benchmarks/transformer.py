"""A small decoder whose attention is given: what benchmarks/training.py trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

# Causal attention: q (batch, seqlen, heads_q, head_dim), k and v with heads_kv, to the shape of q.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    layers: int = 2
    width: int = 512
    heads_q: int = 8
    heads_kv: int = 2
    head_dim: int = 64
    vocabulary: int = 512
    seqlen: int = 1024


class Block(nn.Module):
    def __init__(self, sizes: Sizes, attention: Attention):
        super().__init__()
        heads = sizes.heads_q + 2 * sizes.heads_kv
        self.sizes, self.attention = sizes, attention
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(2))
        self.qkv = nn.Linear(sizes.width, heads * sizes.head_dim, bias=False)
        self.merge = nn.Linear(sizes.heads_q * sizes.head_dim, sizes.width, bias=False)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.sizes.heads_q, self.sizes.heads_kv, self.sizes.heads_kv)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (sum(heads), self.sizes.head_dim)).split(heads, dim=2)
        x = x + self.merge(self.attention(q, k, v).flatten(-2))
        grown: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return grown


class Transformer(nn.Module):
    def __init__(self, sizes: Sizes, attention: Attention):
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.seqlen, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes, attention) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of each next token. tokens: (batch, seqlen + 1), int64."""
        x = self.tokens(tokens[:, :-1]) + self.places.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
