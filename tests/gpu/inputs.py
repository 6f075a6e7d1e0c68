"""Inputs that hurt: three families of values, every tensor a slice of a larger buffer that is full of NaN."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.support.call import FAMILIES, Call

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAR = 60  # below 0 lie the logits of far_below


def values(call: Call, device: Any) -> dict[str, torch.Tensor]:
    """q, k and v of a call, in its dtype, each entry in an array of its own.

    normal: standard normal. times4: four times that, so that few keys take all the weight. far_below: every logit is
    near −60, so that a key read from beyond the end, whose logit is 0, would take over.
    """
    generator = torch.Generator(device).manual_seed(call.seed)
    drawn = {name: torch.randn(call.sizes[name], generator=generator, device=device) for name in "qkv"}
    if call.family == "times4":
        drawn = {name: 4 * x for name, x in drawn.items()}
    elif call.family == "far_below":
        shift = math.sqrt(FAR / math.sqrt(call.head_dim))
        drawn["q"] += shift
        drawn["k"] -= shift
    elif call.family != "normal":
        raise ValueError(f"family: {call.family!r} is none of {', '.join(FAMILIES)}")
    return {name: x.to(DTYPES[call.dtype]) for name, x in drawn.items()}


def sinks(heads_q: int, center: float, dtype: torch.dtype, device: Any, seed: int) -> torch.Tensor:
    """A sink per head, (heads_q,), normal around `center` with a deviation of 2."""
    drawn = 2 * torch.randn(heads_q, generator=torch.Generator(device).manual_seed(seed), device=device)
    return around(center + drawn, dtype, math.nan)


def slopes(shape: tuple[int, ...], device: Any, seed: int) -> torch.Tensor:
    """fp32 ALiBi slopes from 2⁻⁸ to 1, of shape (heads_q,) or (batch, heads_q)."""
    drawn = torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return around(torch.exp2(-8 * drawn), torch.float32, math.nan)


def integers(numbers: Any, device: Any) -> torch.Tensor:
    """int32 numbers in a buffer of such as no length can be: what is read beyond them shows."""
    return around(torch.tensor(numbers, device=device), torch.int32, 2**30)


def astray(dims: tuple[int, int], dtype: torch.dtype, device: Any) -> dict[str, torch.Tensor]:
    """Packed arrays of 40 rows, and lengths that claim others: kernels have to cut them. dims: head_dim, head_dim_v."""
    lengths = {
        "cu_seqlens_q": [0, 9, 2**30], "cu_seqlens_k": [-7, 30, 2**30],
        "seqused_q": [2**30, 2**30], "seqused_k": [-3, 2**30], "leftpad_k": [2**30, -5],
    }  # fmt: skip
    given = {name: torch.ones(40, 1, dims[name == "v"], dtype=dtype, device=device) for name in "qkv"}
    return given | {name: torch.tensor(numbers, dtype=torch.int32, device=device) for name, numbers in lengths.items()}


def around(source: torch.Tensor, dtype: torch.dtype, other: float) -> torch.Tensor:
    """A copy of a tensor of one or two dimensions, as part of a buffer that else holds `other`."""
    size = source.shape[-1]
    buffer = torch.full((*source.shape[:-1], size + 8), other, dtype=dtype, device=source.device)
    buffer[..., 4 : size + 4] = source
    return buffer[..., 4 : size + 4]


def padded(size: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """A tensor of `size`, ([batch,] tokens, heads, dim), whose surroundings, on every side and between its rows, are
    NaN; itself NaN too.

    Offsets and strides stay multiples of 8 elements, as the kernels require.
    """
    *batch, seqlen, heads, dim = size
    around = (*(n + 1 for n in batch), seqlen + 3, heads + 1, dim + 16)
    buffer = torch.full(around, math.nan, dtype=dtype, device=device)
    return buffer[(*(slice(n) for n in batch), slice(1, seqlen + 1), slice(heads), slice(8, dim + 8))]


def place(source: torch.Tensor) -> torch.Tensor:
    """A copy of `source` inside a buffer full of NaN."""
    target = padded(tuple(source.shape), source.dtype, source.device)
    target.copy_(source)
    return target


def untouched(tensor: torch.Tensor, written: Any = ...) -> bool:
    """Whether everything but the rows `written` (an index; all by default) of a tensor of `padded` is NaN still."""
    base = tensor._base
    if base is None:
        raise ValueError("tensor: not a slice of a padded buffer")
    inside = torch.zeros(base.numel(), dtype=torch.bool, device=base.device)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[written] = True
    return bool((torch.isnan(base).flatten() | inside).all())
