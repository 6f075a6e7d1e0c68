"""Conversions between number formats: `cvt`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from tests.ptx import formats
from tests.ptx.formats import TYPES, Array
from tests.ptx.instructions import PACKED, Builder, assign, saturated
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.parser import Instruction, PtxError


def convert(m: Machine, i: Instruction) -> Step:
    to, of = i.types[0], i.types[-1]
    if to in PACKED:
        return convert_pair(m, i)
    if to == "e4m3x2":
        return convert_to_e4m3(m, i)
    x = m.wide_source(i.register(1), "b16" if of == "bf16" else of)
    if of == "bf16":
        value: Callable[[], Array] = partial(formats.bf16_to_f32, x)
    else:
        value = partial(np.asarray, x)
    if to == "bf16":
        target = m.target(i.register(0), "b16")
        return lambda mask: assign(target, mask, formats.f32_to_bf16(value()))
    target = m.wide_target(i.register(0), to)
    change = conversion(i, of, to)
    return lambda mask: assign(target, mask, change(value()))


def convert_pair(m: Machine, i: Instruction) -> Step:
    """cvt.{bf16x2,f16x2}.f32 d, high, low; and cvt.f16x2.e4m3x2."""
    target = m.target(i.register(0), "u32").view(np.uint16).reshape(-1, 2)
    if i.type == "e4m3x2":
        x = m.source(i.register(1), "b16")
        return lambda mask: _assign_pairs(
            target, mask, formats.f32_to_f16(formats.e4m3_to_f32(x.view(np.uint8)).reshape(-1, 2))
        )
    pack = PACKED[i.types[0]][1]
    high, low = (m.source(i.register(j), "f32") for j in (1, 2))
    pair = np.empty((m.lanes, 2), np.float32)

    def step(mask: Mask) -> None:
        pair[:, 0], pair[:, 1] = low, high
        _assign_pairs(target, mask, pack(np.maximum(pair, 0) if i.has("relu") else pair))

    return step


def convert_to_e4m3(m: Machine, i: Instruction) -> Step:
    """cvt.rn.satfinite.e4m3x2.f32 d, high, low."""
    if i.modifiers[:-2] != ("rn", "satfinite") or i.type != "f32":
        raise PtxError(f"instruction not known: {i.text}")
    target = m.target(i.register(0), "b16")
    high, low = (m.full_source(i.register(j), "f32") for j in (1, 2))

    def step(mask: Mask) -> None:
        pairs = formats.f32_to_e4m3(np.stack([low, high], 1))
        assign(target, mask, pairs.view(np.uint16).reshape(-1))

    return step


def _assign_pairs(target: Array, mask: Mask, pairs: Array) -> None:
    assign(target, mask if mask is True else np.asarray(mask)[:, None], pairs)


ROUND: dict[str, np.ufunc] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(i: Instruction, of: str, to: str) -> Callable[[Array], Array]:
    """How values of one type become those of another."""
    source, target = np.dtype(np.float32 if of == "bf16" else TYPES[of]), np.dtype(TYPES[to])
    rounding = next((ROUND[name] for name in ROUND if i.has(name)), None)
    if source.kind == "f" and target.kind in "iu":
        info = np.iinfo(target)
        cut = rounding or np.trunc
        # NaN becomes 0; values beyond the range its nearest end. fp64 holds every bound but 2^63 and 2^64 exactly.
        return lambda x: _clipped(np.nan_to_num(cut(x.astype(np.float64)), nan=0.0), info, target)
    if source.kind == "f" and rounding is not None:
        return lambda x: rounding(x).astype(target)
    if i.has("sat") and target.kind == "f":
        return lambda x: saturated(x.astype(np.float32)).astype(target)
    if i.has("sat"):
        return lambda x: np.clip(x.astype(np.int64), np.iinfo(target).min, np.iinfo(target).max).astype(target)
    return lambda x: x.astype(target)


def _clipped(values: Array, info: np.iinfo, target: np.dtype) -> Array:
    top = values >= float(info.max)
    return np.where(top, target.type(info.max), np.clip(values, info.min, None).astype(target, casting="unsafe"))


BUILDERS: dict[str, Builder] = {"cvt": convert}
