"""Atomics: atom and red."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.formats import SIZES, TYPES, Array
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.movement import lanes_of
from tests.ptx.parser import Instruction, PtxError

COMBINE: dict[str, Callable[..., object]] = {
    "add": lambda old, new: old + new, "min": min, "max": max, "exch": lambda old, new: new,
    "and": lambda old, new: old & new, "or": lambda old, new: old | new, "xor": lambda old, new: old ^ new,
    "inc": lambda old, new: old.dtype.type(0) if old >= new else old + old.dtype.type(1),
}  # fmt: skip


def atomic(m: Machine, i: Instruction) -> Step:
    """atom and red. Atomics are ordered with each other, so they take no part in races; but see `Turns`."""
    returns = i.opcode == "atom"
    kind, names = i.type, i.vector(1 + returns)
    how = next((name for name in (*COMBINE, "cas") if i.has(name)), "")
    if not how or kind not in TYPES or i.space not in ("global", "shared"):
        raise PtxError(f"instruction not known: {i.text}")
    if (len(names) > 1 or i.has("v2") or i.has("v4")) and not (m.program.target >= 90 and i.has(f"v{len(names)}")):
        raise PtxError(f"{len(names)} values, or the target is not sm_90: {i.text}")
    adds = not returns and how == "add" and i.space == "global"
    step = _added(m, i) if adds else _one_by_one(m, i, how)
    if i.space == "shared":
        return step

    def noted(mask: Mask) -> None:
        m.device.waits = 0
        if m.turns and kind.startswith("f"):
            m.turns.add(lanes_of(mask))
        elif m.turns and (i.has("release") or i.has("acq_rel")):
            m.turns.release(lanes_of(mask))
        step(mask)

    return noted


def _added(m: Machine, i: Instruction) -> Step:
    """red.add to global memory, all lanes at a time; several may add to one address."""
    kind, names = i.type, i.vector(1)
    width = SIZES[kind]
    size = width * len(names)
    address = m.address(i.address(0))
    sources = [m.full_source(name, kind) for name in names]

    def step(mask: Mask) -> None:
        lanes = lanes_of(mask)
        values = np.stack([source[lanes] for source in sources], 1)
        for part, chosen, offset in m.device.find(address(lanes).astype(np.uint64), size, "atomic"):
            part.check_written(offset // size, size, "atomic")
            place = (offset // width)[:, None] + np.arange(len(names))
            np.add.at(part.data.view(TYPES[kind]), place.reshape(-1), values[chosen].reshape(-1))

    return step


def _one_by_one(m: Machine, i: Instruction, how: str) -> Step:
    """Any atomic, one lane after the other."""
    returns = i.opcode == "atom"
    kind, names = i.type, i.vector(1 + returns)
    size = SIZES[kind] * len(names)
    address = m.address(i.address(int(returns)))
    sources = [m.full_source(name, kind) for name in names]
    swap = m.full_source(i.register(3), kind) if how == "cas" else None
    target = m.target(i.register(0), kind) if returns else None

    def step(mask: Mask) -> None:
        for lane in np.arange(m.lanes)[lanes_of(mask)]:
            cell = _cell(m, i, address(np.array([lane])), np.array([lane]), size, kind)
            old = cell.copy()
            for j, source in enumerate(sources):
                if swap is not None:
                    cell[j] = swap[lane] if cell[j] == source[lane] else cell[j]
                else:
                    cell[j] = COMBINE[how](cell[j], source[lane])
            if target is not None:
                target[lane] = old[0]

    return step


def _cell(m: Machine, i: Instruction, address: Array, lane: Array, size: int, kind: str) -> Array:
    """The memory of one lane's atomic, as a writable view."""
    if i.space == "shared":
        start = int(m.shared.position(address, lane, size)[0])
        return m.shared.data[start : start + size].view(TYPES[kind])
    part, _, offset = next(m.device.find(address.astype(np.uint64), size, "atomic"))
    start = int(offset[0])
    part.check_written(offset // size, size, "atomic")
    return part.data[start : start + size].view(TYPES[kind])
