"""Rotary embedding in float64, and how a rounding of a number may look."""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu.paged_inputs import E4M3, canaries, quantised

ROTARY_BASE = 10_000.0


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x with rotary embedding in float64, what its rounding errors are relative to).

    x: (batch, tokens, heads, dim); cos, sin: (rows, rotary_dim / 2); positions: (batch, tokens), cut to the rows.
    """
    half = cos.shape[1]
    at = positions.clamp(0, len(cos) - 1)
    c, s = (table.double()[at][:, :, None] for table in (cos, sin))
    first = slice(0, 2 * half, 2) if interleaved else slice(half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out = x.double()
    size, (a, b) = out.abs(), (out[..., first].clone(), out[..., second].clone())
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    size[..., first], size[..., second] = (a * c).abs() + (b * s).abs(), (a * s).abs() + (b * c).abs()
    return out, size


def misrounded(
    got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, dtype: torch.dtype, error: float
) -> torch.Tensor:
    """Which of `got` are no rounding to `dtype` of anything within error · size of `exact`; NaN is."""

    def low(x: torch.Tensor) -> torch.Tensor:
        return quantised(x).double() if dtype == E4M3 else x.to(dtype).double()

    return ~((low(exact - error * size) <= got.double()) & (got.double() <= low(exact + error * size)))


def tables(rows: int, rotary_dim: int, dtype: torch.dtype, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (rows, rotary_dim / 2), their surroundings NaN."""
    half = rotary_dim // 2
    speed = ROTARY_BASE ** (-torch.arange(half, device=device) / max(half, 1))
    angle = torch.arange(rows, device=device)[:, None] * speed
    made = []
    for table in (angle.cos(), angle.sin()):
        buffer = canaries((rows + 2, half), dtype, device)
        buffer[1:-1] = table
        made.append(buffer[1:-1])
    return made[0], made[1]
