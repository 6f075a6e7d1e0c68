"""Arithmetic, logic, comparison and conversion: each builder turns one instruction into a closure.

A builder takes the machine and the instruction and returns `step(mask)`. All that depends on the text is settled in
the builder; a step makes NumPy calls and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from tests.ptx import atomics, formats, movement
from tests.ptx.formats import SIZES, TYPES, Array
from tests.ptx.machine import Machine, Mask, Step, nothing
from tests.ptx.matrix import mma
from tests.ptx.parser import Instruction, PtxError

Builder = Callable[[Machine, Instruction], Step]
BUILDERS: dict[str, Builder] = {}

PACKED = {"bf16x2": (formats.bf16_to_f32, formats.f32_to_bf16), "f16x2": (formats.f16_to_f32, formats.f32_to_f16)}


def builds(*opcodes: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(opcodes, builder))
        return builder

    return register


def assign(target: Array, mask: Mask, value: Array) -> None:
    """Write the lanes of `mask`. `value` has a lane for each lane of the wave."""
    if mask is True:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="unsafe")


def sources(m: Machine, i: Instruction, kind: str) -> list[Array]:
    """All operands after the first as arrays of one type."""
    return [m.source(i.register(j), kind) for j in range(1, len(i.operands))]


def elementwise(m: Machine, i: Instruction, function: Callable[..., Any]) -> Step:
    """A NumPy function of all the sources, in the instruction's type; packed halves are computed in fp32."""
    if i.type in PACKED:
        return packed(m, i, function)
    inputs, target = sources(m, i, i.type), m.target(i.register(0), i.type)
    if not isinstance(function, np.ufunc):
        return lambda mask: assign(target, mask, function(*inputs))
    return in_place(function, inputs, target)


def in_place(function: np.ufunc, inputs: Sequence[Array], target: Array) -> Step:
    """A NumPy function that writes its target itself: the quickest step there is."""

    def one(mask: Mask) -> None:
        function(x, out=target, where=mask)

    def two(mask: Mask) -> None:
        function(x, y, out=target, where=mask)

    if len(inputs) == 1:
        (x,) = inputs
        return one
    x, y = inputs
    return two


def packed(m: Machine, i: Instruction, function: Callable[..., Any]) -> Step:
    unpack, pack = PACKED[i.type]
    inputs = [m.full_source(i.register(j), "u32") for j in range(1, len(i.operands))]
    target = m.target(i.register(0), "u32")

    def step(mask: Mask) -> None:
        values = function(*(unpack(np.ascontiguousarray(x).view(np.uint16)) for x in inputs))
        assign(target, mask, pack(values).view(np.uint32))

    return step


@builds(
    "add", "sub", "neg", "abs", "ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "and", "or", "xor", "not"
)
def simple(m: Machine, i: Instruction) -> Step:
    """Instructions that are one NumPy function. The approximate ones are computed exactly."""
    if i.opcode in ("and", "or", "xor", "not") and i.type == "pred":
        return predicate_logic(m, i)
    if i.has("sat"):
        if i.type != "f32":
            raise PtxError(f"saturation is known for f32 only: {i.text}")
        return elementwise(m, i, lambda *v: saturated(SIMPLE[i.opcode](*v)))
    return elementwise(m, i, SIMPLE[i.opcode])


def saturated(value: Array) -> Array:
    """Into [0, 1]; NaN becomes 0."""
    return np.clip(np.nan_to_num(value, nan=0.0), np.float32(0), np.float32(1))


SIMPLE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.absolute,
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip


def predicate_logic(m: Machine, i: Instruction) -> Step:
    inputs = [m.predicate(i.register(j)) for j in range(1, len(i.operands))]
    function, target = SIMPLE[i.opcode], m.target(i.register(0), "pred")
    return lambda mask: assign(target, mask, function(*(value() for value in inputs)))


@builds("min", "max")
def minmax(m: Machine, i: Instruction) -> Step:
    """With `.NaN` a NaN wins, else the number does."""
    pair = (np.minimum, np.fmin) if i.opcode == "min" else (np.maximum, np.fmax)
    choose = pair[0 if i.has("NaN") else 1]
    if len(i.operands) == 4:
        return elementwise(m, i, lambda x, y, z: choose(x, choose(y, z)))
    return elementwise(m, i, choose)


@builds("mul", "mad", "fma")
def multiply(m: Machine, i: Instruction) -> Step:
    if i.type in PACKED:
        return packed(m, i, np.multiply if i.opcode == "mul" else lambda x, y, z: x.astype(np.float64) * y + z)
    if TYPES[i.type] is np.float32:
        return elementwise(m, i, np.multiply) if i.opcode == "mul" else fma(m, i)
    if np.dtype(TYPES[i.type]).kind == "f":
        raise PtxError(f"instruction not known: {i.text}")
    return integer_multiply(m, i)


def fma(m: Machine, i: Instruction) -> Step:
    """fp32 fused multiply-add: the product is exact in fp64, so that the sum is rounded twice but never wrongly
    by more than the odd tie."""
    x, y, z = sources(m, i, "f32")
    target = m.target(i.register(0), "f32")
    exact = np.empty(m.lanes)

    def step(mask: Mask) -> None:
        np.multiply(x, y, exact, dtype=np.float64)
        np.add(exact, z, exact)
        assign(target, mask, exact)

    return step


def integer_multiply(m: Machine, i: Instruction) -> Step:
    x, y = (m.source(i.register(j), i.type) for j in (1, 2))
    bits = 8 * x.itemsize
    wide = i.type[0] + str(2 * bits)
    result = wide if i.has("wide") else i.type
    target = m.target(i.register(0), result)
    if i.has("wide"):
        product: Callable[[], Array] = partial(np.multiply, x, y, dtype=TYPES[wide])
    elif not i.has("hi"):
        product = partial(np.multiply, x, y)
    elif bits == 64:
        product = partial(high_64, x, y)
    else:
        product = partial(high_half, x, y, TYPES[wide])
    if i.opcode == "mul":
        return lambda mask: assign(target, mask, product())
    z = m.source(i.register(3), result)
    return lambda mask: assign(target, mask, product() + z)


def high_half(x: Array, y: Array, wide: type) -> Array:
    """The upper half of products, by way of a type of twice the width."""
    return (np.multiply(x, y, dtype=wide) >> (8 * x.itemsize)).astype(x.dtype)


def high_64(x: Array, y: Array) -> Array:
    """The upper 64 bits of 64-bit products."""
    pairs = np.broadcast_arrays(x, y)
    top = [(int(a) * int(b)) >> 64 for a, b in zip(*pairs, strict=True)]
    return np.array(top, object).astype(pairs[0].dtype)


@builds("div", "rem")
def divide(m: Machine, i: Instruction) -> Step:
    """Integers are cut towards zero; a division by zero gives all ones (PTX leaves it open)."""
    if np.dtype(TYPES[i.type]).kind == "f":
        return elementwise(m, i, np.divide)

    def quotient(x: Array, y: Array) -> Array:
        rest = np.fmod(x, y)
        value = (x - rest) // y if i.opcode == "div" else rest
        return np.where(y == 0, np.array(-1).astype(x.dtype), value)

    return elementwise(m, i, quotient)


@builds("shl", "shr")
def shift(m: Machine, i: Instruction) -> Step:
    """Shifts by the width or more give 0, or the sign for signed right shifts."""
    kind = i.type
    x, by = m.source(i.register(1), kind), m.source(i.register(2), "u32")
    target = m.target(i.register(0), kind)
    function = np.left_shift if i.opcode == "shl" else np.right_shift
    most = x.dtype.type(8 * x.itemsize - 1)
    signed = i.opcode == "shr" and kind[0] == "s"
    if by.ndim == 0 and (by <= most or signed):
        amount = min(by.astype(x.dtype), most)
        return in_place(function, (x, amount), target)

    def step(mask: Mask) -> None:
        value = function(x, np.minimum(by, np.uint32(most)).astype(x.dtype))
        assign(target, mask, value if signed else np.where(by > most, x.dtype.type(0), value))

    return step


@builds("shf")
def funnel_shift(m: Machine, i: Instruction) -> Step:
    """shf.{l,r}.{wrap,clamp}: shift the 64-bit pair high:low and keep the upper (l) or lower (r) half."""
    low, high, by = sources(m, i, "u32")
    target = m.target(i.register(0), "u32")

    def step(mask: Mask) -> None:
        n = ((by & np.uint32(31)) if i.has("wrap") else np.minimum(by, np.uint32(32))).astype(np.uint64)
        pair = (high.astype(np.uint64) << np.uint64(32)) | low
        value = (pair << n) >> np.uint64(32) if i.has("l") else pair >> n
        assign(target, mask, value.astype(np.uint32))

    return step


COMPARE: dict[str, np.ufunc] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE: dict[str, np.ufunc] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(how: str, kind: str) -> Callable[..., Any]:
    """PTX's comparison as a function of two arrays. `equ` and its like also hold when one side is NaN."""
    unordered = how.endswith("u") and how[:-1] in COMPARE
    if how in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (how == "nan")
    if how not in COMPARE and not unordered:
        raise PtxError(f"comparison .{how} is not known")
    if unordered:
        return lambda x, y: COMPARE[how[:-1]](x, y) | np.isnan(x) | np.isnan(y)
    if how == "ne" and kind.startswith("f"):
        return lambda x, y: (x < y) | (x > y)
    return COMPARE[how]


@builds("setp")
def set_predicate(m: Machine, i: Instruction) -> Step:
    compare = comparison(i.modifiers[0], i.type)
    x, y = (m.source(i.register(j), i.type) for j in (1, 2))
    names = i.register(0).split("|")
    target = m.target(names[0], "pred")
    combine = next((COMBINE[name] for name in COMBINE if i.has(name)), None)
    if len(names) == 1 and combine is None:
        if isinstance(compare, np.ufunc):
            return in_place(compare, (x, y), target)
        return lambda mask: assign(target, mask, compare(x, y))
    other = m.target(names[1], "pred") if len(names) == 2 else None
    third = m.predicate(i.register(3)) if combine else None

    def step(mask: Mask) -> None:
        value = compare(x, y)
        with_third = third() if third else None
        assign(target, mask, combine(value, with_third) if combine else value)
        if other is not None:
            assign(other, mask, combine(~value, with_third) if combine else ~value)

    return step


@builds("selp")
def select(m: Machine, i: Instruction) -> Step:
    x, y = (m.source(i.register(j), i.type) for j in (1, 2))
    chosen, target = m.predicate(i.register(3)), m.target(i.register(0), i.type)
    return lambda mask: assign(target, mask, np.where(chosen(), x, y))


@builds("lop3")
def lop3(m: Machine, i: Instruction) -> Step:
    """Any function of three bits: bit 4x + 2y + z of the table is its value."""
    x, y, z = (m.source(i.register(j), "u32") for j in (1, 2, 3))
    table, target = int(i.register(4), 0), m.target(i.register(0), "u32")

    def step(mask: Mask) -> None:
        value = np.zeros(m.lanes, np.uint32)
        for j in range(8):
            if table >> j & 1:
                value |= (x if j & 4 else ~x) & (y if j & 2 else ~y) & (z if j & 1 else ~z)
        assign(target, mask, value)

    return step


@builds("prmt")
def permute_bytes(m: Machine, i: Instruction) -> Step:
    """Each nibble of the selector picks one byte of the pair y:x; its top bit spreads that byte's sign instead."""
    x, y, selector = (m.full_source(i.register(j), "u32") for j in (1, 2, 3))
    target = m.target(i.register(0), "u32")
    if i.modifiers != ("b32",):
        raise PtxError(f"instruction not known: {i.text}")

    def step(mask: Mask) -> None:
        pool = np.stack([x, y], 1).view(np.uint8)
        nibble = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        picked = np.take_along_axis(pool, (nibble & 7).astype(np.int64), 1)
        sign = np.where(picked & 0x80, np.uint8(0xFF), np.uint8(0))
        assign(target, mask, np.where(nibble & 8, sign, picked).view(np.uint32).reshape(-1))

    return step


@builds("bfe")
def extract_bits(m: Machine, i: Instruction) -> Step:
    """`length` bits from `start` on; signed types repeat the field's top bit."""
    width = 8 * SIZES[i.type]
    x = m.full_source(i.register(1), f"u{width}")
    start, length = (m.full_source(i.register(j), "u32") for j in (2, 3))
    target = m.target(i.register(0), f"u{width}")

    def field(value: int, first: int, count: int) -> int:
        bits = (value >> first) & ((1 << count) - 1) if first < width else 0
        top = min(first + count - 1, width - 1)
        negative = i.type[0] == "s" and count and value >> top & 1
        kept = max(min(count, width - first), 0)
        return bits | (((1 << width) - 1) ^ ((1 << kept) - 1)) if negative else bits

    def step(mask: Mask) -> None:
        rows = zip(x.tolist(), (start & 255).tolist(), (length & 255).tolist(), strict=True)
        assign(target, mask, np.array([field(*row) for row in rows], x.dtype))

    return step


@builds("bfi")
def insert_bits(m: Machine, i: Instruction) -> Step:
    """Put the low `length` bits of x into y from bit `start` on."""
    x, y = (m.full_source(i.register(j), i.type) for j in (1, 2))
    start, length = (m.full_source(i.register(j), "u32") for j in (3, 4))
    target, width = m.target(i.register(0), i.type), 8 * SIZES[i.type]

    def merged(value: int, into: int, first: int, count: int) -> int:
        hole = (((1 << count) - 1) << first) & ((1 << width) - 1)
        return (into & ~hole) | ((value << first) & hole)

    def step(mask: Mask) -> None:
        rows = zip(x.tolist(), y.tolist(), (start & 255).tolist(), (length & 255).tolist(), strict=True)
        assign(target, mask, np.array([merged(*row) for row in rows], x.dtype))

    return step


@builds("popc", "clz", "brev")
def count_bits(m: Machine, i: Instruction) -> Step:
    x, width = m.full_source(i.register(1), i.type), 8 * SIZES[i.type]
    count: Callable[[int], int] = {
        "popc": int.bit_count,
        "clz": lambda value: width - value.bit_length(),
        "brev": lambda value: int(f"{value:0{width}b}"[::-1], 2),
    }[i.opcode]
    target = m.target(i.register(0), i.type if i.opcode == "brev" else "u32")
    return lambda mask: assign(target, mask, np.array([count(v) for v in x.tolist()], target.dtype))


@builds("trap")
def trap(m: Machine, i: Instruction) -> Step:
    def step(mask: Mask) -> None:
        raise PtxError("trap", 0)

    return step


BUILDERS.update(
    {
        "mov": movement.mov, "ld": movement.load, "st": movement.store, "cvta": movement.convert_address,
        "cp": movement.copy_async, "ldmatrix": movement.ldmatrix, "stmatrix": movement.stmatrix,
        "movmatrix": movement.movmatrix,
        "shfl": movement.shuffle, "vote": movement.vote, "activemask": movement.active_mask,
        "atom": atomics.atomic, "red": atomics.atomic, "mma": mma,
    }
)  # fmt: skip
for _opcode in ("membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard", "applypriority"):
    BUILDERS[_opcode] = lambda m, i: nothing
