"""Packed calls, for tests of several files."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.attention import BF16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def packed(lengths_q=(3, 0, 70, 5), lengths_k=(4, 2, 9, 5), heads_q=4, heads_kv=2, head_dim=64, head_dim_v=64):
    """q, k, v and cu_seqlens as keyword arguments."""
    torch.manual_seed(1)
    ends_q, ends_k = (ints(0, *np.cumsum(lengths).tolist()) for lengths in (lengths_q, lengths_k))
    q = torch.randn(sum(lengths_q), heads_q, head_dim).to(BF16)
    k = torch.randn(sum(lengths_k), heads_kv, head_dim).to(BF16)
    v = torch.randn(sum(lengths_k), heads_kv, head_dim_v).to(BF16)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}


def tensor_at(memory, dtype):
    """Elements that start wherever the bytes do, which torch's own views never allow."""
    return torch.frombuffer(memory.numpy().data, dtype=dtype)
