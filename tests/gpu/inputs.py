"""Inputs that hurt: three families of values, every tensor a slice of a larger buffer that is full of NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

FAMILIES = ("normal", "times4", "far_below")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str

    def sizes(self) -> dict[str, tuple[int, int, int, int]]:
        """The shape of each tensor."""
        query = (self.batch, self.seqlen_q, self.heads_q, self.head_dim)
        key = (self.batch, self.seqlen_k, self.heads_kv, self.head_dim)
        return {"q": query, "k": key, "v": key, "o": query}


def values(shape: Shape, family: str, device: Any, seed: int) -> dict[str, torch.Tensor]:
    """q, k and v of a family, in the shape's dtype.

    normal: standard normal. times4: four times that, so that few keys take all the weight. far_below: every logit is
    near −60, so that a key read from beyond the end, whose logit is 0, would take over.
    """
    generator = torch.Generator(device).manual_seed(seed)
    drawn = {
        name: torch.randn(size, generator=generator, device=device)
        for name, size in shape.sizes().items()
        if name != "o"
    }
    if family == "times4":
        drawn = {name: 4 * x for name, x in drawn.items()}
    elif family == "far_below":
        shift = math.sqrt(60 / math.sqrt(shape.head_dim))
        drawn["q"] += shift
        drawn["k"] -= shift
    elif family != "normal":
        raise ValueError(f"family: {family!r} is none of {', '.join(FAMILIES)}")
    return {name: x.to(DTYPES[shape.dtype]) for name, x in drawn.items()}


def padded(size: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """A tensor of `size` whose surroundings, on every side and between its rows, are NaN; itself NaN too.

    Offsets and strides stay multiples of 8 elements, as the kernels require.
    """
    batch, seqlen, heads, dim = size
    buffer = torch.full((batch + 1, seqlen + 3, heads + 1, dim + 16), math.nan, dtype=dtype, device=device)
    return buffer[:batch, 1 : seqlen + 1, :heads, 8 : dim + 8]


def place(source: torch.Tensor) -> torch.Tensor:
    """A copy of `source` inside a buffer full of NaN."""
    target = padded(tuple(source.shape), source.dtype, source.device)
    target.copy_(source)
    return target


def untouched(tensor: torch.Tensor) -> bool:
    """Whether everything around a tensor of `padded` is NaN still."""
    base = tensor._base
    if base is None:
        raise ValueError("tensor: not a slice of a padded buffer")
    inside = base.new_zeros(base.shape, dtype=torch.bool)
    inside[: tensor.shape[0], 1 : tensor.shape[1] + 1, : tensor.shape[2], 8 : tensor.shape[3] + 8] = True
    return bool(torch.isnan(base)[~inside].all())
