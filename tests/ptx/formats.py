"""PTX types as NumPy types, and the small floating-point formats that NumPy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.float16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# One NumPy element for each access size; complex128 stands for 16 bytes: only its bits are moved, never its value.
WORDS: dict[int, Any] = {**UNSIGNED, 16: np.complex128}
SIZES = {name: np.dtype(kind).itemsize for name, kind in TYPES.items()}


def bf16_to_f32(bits: Array) -> Array:
    """fp32 values of bf16 numbers that are given as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """bf16 bits (uint16) of fp32 values, rounded to nearest even; NaN becomes 0x7FFF as on the GPU."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f16_to_f32(bits: Array) -> Array:
    """fp32 values of fp16 numbers that are given as uint16."""
    return bits.view(np.float16).astype(np.float32)


def f32_to_f16(values: Array) -> Array:
    """fp16 bits (uint16) of fp32 values, rounded to nearest even."""
    return values.astype(np.float16).view(np.uint16)


def e4m3_to_f32(bits: Array) -> Array:
    """fp32 values of e4m3 numbers that are given as uint8."""
    return E4M3[bits]


def f32_to_e4m3(values: Array) -> Array:
    """e4m3 bits (uint8) of fp32 values, rounded to nearest even, at most 448 in size; NaN becomes 0x7F."""
    values = np.asarray(values, np.float32)
    size = np.minimum(np.abs(values), np.float32(448))
    spacing = np.exp2(np.maximum(np.frexp(size)[1] - 4, -9)).astype(np.float32)  # of the numbers around it
    bits = np.searchsorted(E4M3[:0x7F], np.rint(size / spacing) * spacing).astype(np.uint8)
    bits = np.where(np.isnan(values), np.uint8(0x7F), bits)
    return bits | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0))


def _e4m3_table() -> Array:
    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    size[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -size, size).astype(np.float32)


E4M3 = _e4m3_table()
