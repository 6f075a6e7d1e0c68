"""Loads, stores, asynchronous copies, matrix loads and stores, shuffles and votes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.formats import SIZES, TYPES, UNSIGNED, WORDS, Array
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.memory import Lanes
from tests.ptx.parser import Instruction, PtxError

MAX_WAITS = 1000  # loads of what other blocks change, in a row, after which they are taken to wait for ever


def lanes_of(mask: Mask) -> Lanes:
    return slice(None) if mask is True else np.flatnonzero(mask)


def whole_warps(mask: Mask, what: str) -> Lanes:
    """The lanes of `mask`, which must be whole warps. Raises PtxError else."""
    if mask is True:
        return slice(None)
    by_warp = np.asarray(mask).reshape(-1, 32)
    if (by_warp.any(1) != by_warp.all(1)).any():
        raise PtxError(f"{what} by part of a warp")
    return np.flatnonzero(mask)


def mov(m: Machine, i: Instruction) -> Step:
    """A plain move, or one between a register and the parts of it."""
    to, of = i.vector(0), i.vector(1)
    if len(to) > 1 or len(of) > 1:
        width = SIZES[i.type]
        part = f"b{8 * width // max(len(to), len(of))}"
        if len(of) > 1:
            whole = m.target(to[0], f"u{8 * width}").view(UNSIGNED[SIZES[part]]).reshape(m.lanes, -1)
            pairs = [(whole[:, j], m.source(name, part)) for j, name in enumerate(of)]
        else:
            whole = np.broadcast_to(m.source(of[0], f"u{8 * width}"), (m.lanes,))
            whole = np.ascontiguousarray(whole) if whole.strides == (0,) else whole
            whole = whole.view(UNSIGNED[SIZES[part]]).reshape(m.lanes, -1)
            pairs = [(m.target(name, part), whole[:, j]) for j, name in enumerate(to)]
    else:
        source = m.source(of[0], i.type)
        pairs = [(m.target(to[0], i.type), source)]
    if len(pairs) == 1:
        target, source = pairs[0]
        return lambda mask: np.copyto(target, source, where=mask)

    def step(mask: Mask) -> None:
        for target, value in [(target, source.copy()) for target, source in pairs]:
            np.copyto(target, value, where=mask)

    return step


def convert_address(m: Machine, i: Instruction) -> Step:
    """cvta: generic addresses are those of their space."""
    source, target = m.source(i.register(1), i.type), m.target(i.register(0), i.type)
    return lambda mask: np.copyto(target, source, where=mask)


# ---- loads and stores ------------------------------------------------------------------------------------------------
def load(m: Machine, i: Instruction) -> Step:
    kind, names = i.type, i.vector(0)
    size = SIZES[kind] * len(names)
    targets = [m.wide_target(name, kind) for name in names]
    fetch = _loader(m, i, size)
    waits = i.space == "global" and (i.has("acquire") or i.has("relaxed") or i.has("volatile"))

    def step(mask: Mask) -> None:
        lanes = lanes_of(mask)
        if waits:
            _wait(m, i, lanes)
        words = fetch(lanes).view(TYPES[kind]).reshape(-1, len(targets))
        for j, target in enumerate(targets):
            target[lanes] = words[:, j]

    return step


def _wait(m: Machine, i: Instruction, lanes: Lanes) -> None:
    """A load of what other blocks change. Raises PtxError when it is repeated and nobody can change it."""
    m.device.waits += 1
    if m.device.waits > MAX_WAITS:
        raise PtxError("waits for ever: no earlier block has brought global memory to what this load waits for")
    if m.turns and i.has("acquire"):
        m.turns.acquire(lanes)


def _loader(m: Machine, i: Instruction, size: int) -> Callable[[Lanes], Array]:
    """A function from lanes to one word for each."""
    if i.space == "param":
        name, offset = i.address(1).base, i.address(1).offset
        if name not in m.program.params or offset + size > m.program.params[name][1]:
            raise PtxError(f"no {size} bytes of parameters at {name}+{offset}")
        start = m.program.params[name][0] + offset
        return lambda lanes: np.frombuffer(m.params[start : start + size].tobytes(), WORDS[size])
    address = m.address(i.address(1))
    if i.space == "shared":
        return lambda lanes: m.shared.load(address(lanes), lanes, size)
    if i.space == "local":
        return lambda lanes: m.local.view(WORDS[size])[_local(m, address(lanes), lanes, size)]
    return lambda lanes: m.device.load(address(lanes), size, "global load")


def store(m: Machine, i: Instruction) -> Step:
    kind, names = i.type, i.vector(1)
    size = SIZES[kind] * len(names)
    sources = [m.wide_source(name, kind) for name in names]
    address = m.address(i.address(0))

    def step(mask: Mask) -> None:
        lanes = lanes_of(mask)
        columns = [source[lanes] for source in sources]
        words = np.stack(columns, 1).view(WORDS[size]).reshape(-1)
        if i.space == "shared":
            m.shared.store(address(lanes), lanes, words)
        elif i.space == "local":
            m.local.view(WORDS[size])[_local(m, address(lanes), lanes, size)] = words
        else:
            m.device.store(address(lanes).astype(np.uint64), words, m.warp_in_launch[lanes])

    return step


def _local(m: Machine, address: Array, lanes: Lanes, size: int) -> Array:
    """Index of each lane's word in local memory."""
    place = address.astype(np.int64)
    if (place < 0).any() or (place + size > m.local_bytes).any() or (place % size).any():
        raise PtxError(f"{size}-byte access outside the {m.local_bytes} bytes of local memory, or misaligned")
    return (place + np.arange(m.lanes)[lanes] * m.local_stride) // size


# ---- asynchronous copies ---------------------------------------------------------------------------------------------
def copy_async(m: Machine, i: Instruction) -> Step:
    """cp.async and its groups. Bulk copies and mbarriers are not modelled."""
    if not i.has("async") or i.has("bulk") or i.has("mbarrier"):
        raise PtxError(f"instruction not known: {i.text}")
    if i.has("commit_group"):
        return lambda mask: m.shared.commit(lanes_of(mask))
    if i.has("wait_group"):
        keep = int(i.register(0), 0)
        return lambda mask: m.shared.wait(lanes_of(mask), keep)
    if i.has("wait_all"):
        return lambda mask: m.shared.wait(lanes_of(mask), 0, commit=True)
    return _start_copy(m, i)


def _start_copy(m: Machine, i: Instruction) -> Step:
    """Copies `size` bytes; with a fourth operand only so many of them are read and the rest is zero."""
    to, of = m.address(i.address(0)), m.address(i.address(1))
    size = int(i.register(2), 0)
    count = m.full_source(i.register(3), "u32") if len(i.operands) > 3 else np.full(m.lanes, size, np.uint32)

    def step(mask: Mask) -> None:
        lanes = lanes_of(mask)
        address, wanted = of(lanes).astype(np.uint64), count[lanes]
        if (wanted == size).all():
            words = m.device.load(address, size, "cp.async")
        else:
            words = _partial(m, address, wanted, size)
        m.shared.copy_async(to(lanes), lanes, words)

    return step


def _partial(m: Machine, address: Array, wanted: Array, size: int) -> Array:
    if (wanted > size).any():
        raise PtxError(f"cp.async of {int(wanted.max())} bytes into {size}")
    data = np.zeros((len(address), size), np.uint8)
    for n in np.unique(wanted[wanted > 0]):
        rows = np.flatnonzero(wanted == n)
        for j in range(0, int(n), 4) if n % 4 == 0 else range(int(n)):
            step = 4 if n % 4 == 0 else 1
            piece = m.device.load(address[rows] + np.uint64(j), step, "cp.async")
            data[rows, j : j + step] = piece.view(np.uint8).reshape(-1, step)
    return data.view(WORDS[size]).reshape(-1)


# ---- matrices in shared memory ---------------------------------------------------------------------------------------
def _matrices(i: Instruction) -> int:
    """How many 8×8 matrices an ldmatrix or stmatrix moves."""
    if not i.has("m8n8") or i.type != "b16":
        raise PtxError(f"instruction not known: {i.text}")
    return next(n for n in (1, 2, 4) if i.has(f"x{n}"))


def ldmatrix(m: Machine, i: Instruction) -> Step:
    """8×8 matrices of 16-bit elements: lane 8j + r gives the address of row r of matrix j.

    Lane 4r + c gets the elements (r, 2c) and (r, 2c + 1), which is the order of the bytes: without `.trans` the 128
    bytes of a matrix are the 32 registers as they stand.
    """
    n, address = _matrices(i), m.address(i.address(1))
    targets = [m.target(name, "u32") for name in i.vector(0)]

    def step(mask: Mask) -> None:
        lanes = whole_warps(mask, "ldmatrix")
        rows = np.arange(m.lanes)[lanes].reshape(-1, 32)[:, : 8 * n].reshape(-1)
        tiles = m.shared.load(address(rows), rows, 16).view(np.uint32).reshape(-1, n, 32)
        if i.has("trans"):
            tiles = transposed(tiles)
        for j, target in enumerate(targets):
            target[lanes] = tiles[:, j].reshape(-1)

    return step


def stmatrix(m: Machine, i: Instruction) -> Step:
    """The inverse of ldmatrix."""
    n, address = _matrices(i), m.address(i.address(0))
    sources = [m.full_source(name, "u32") for name in i.vector(1)]

    def step(mask: Mask) -> None:
        lanes = whole_warps(mask, "stmatrix")
        rows = np.arange(m.lanes)[lanes].reshape(-1, 32)[:, : 8 * n].reshape(-1)
        tiles = np.stack([source[lanes].reshape(-1, 32) for source in sources], 1)
        if i.has("trans"):
            tiles = transposed(tiles)
        m.shared.store(address(rows), rows, np.ascontiguousarray(tiles).view(WORDS[16]).reshape(-1))

    return step


def movmatrix(m: Machine, i: Instruction) -> Step:
    """An 8×8 matrix of 16-bit elements in a warp's registers, as ldmatrix leaves it, transposed."""
    if not (i.has("m8n8") and i.has("trans")) or i.type != "b16":
        raise PtxError(f"instruction not known: {i.text}")
    target, source = m.target(i.register(0), "u32"), m.full_source(i.register(1), "u32")

    def step(mask: Mask) -> None:
        lanes = whole_warps(mask, "movmatrix")
        target[lanes] = transposed(source[lanes].reshape(-1, 1, 32)).reshape(-1)

    return step


def transposed(tiles: Array) -> Array:
    """8×8 matrices of halves, (warps, n, 32) packed pairs, transposed."""
    halves = tiles.view(np.uint16).reshape(*tiles.shape[:2], 8, 8)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).reshape(*tiles.shape[:2], 64).view(np.uint32)


# ---- between the threads of a warp -----------------------------------------------------------------------------------
def shuffle(m: Machine, i: Instruction) -> Step:
    """shfl[.sync].{up,down,bfly,idx}.b32 d[|p], a, b, c. Reading a lane that takes no part gives what it holds."""
    names = i.register(0).split("|")
    target = m.target(names[0], "u32")
    valid = m.target(names[1], "pred") if len(names) == 2 else None
    value, by, clamp = (m.full_source(i.register(j), "u32") for j in (1, 2, 3))
    mode = next(name for name in ("up", "down", "bfly", "idx") if i.has(name))

    def step(mask: Mask) -> None:
        lanes = lanes_of(mask)
        lane = m.lane[lanes]
        distance, bounds = by[lanes].astype(np.int64) & 31, clamp[lanes].astype(np.int64)
        segment, limit = (bounds >> 8) & 31, bounds & 31
        lowest, highest = lane & segment, (lane & segment) | (limit & ~segment & 31)
        if mode == "bfly":
            other, inside = lane ^ distance, (lane ^ distance) <= highest
        elif mode == "idx":
            other = lowest | (distance & ~segment & 31)
            inside = other <= highest
        elif mode == "up":
            other, inside = lane - distance, lane - distance >= highest
        else:
            other, inside = lane + distance, lane + distance <= highest
        number = np.arange(m.lanes)[lanes]
        result = value[number - lane + np.where(inside, other, lane)]
        target[lanes] = result
        if valid is not None:
            valid[lanes] = inside

    return step


def vote(m: Machine, i: Instruction) -> Step:
    """vote.sync.{all,any,uni,ballot} over the lanes that take part."""
    chosen = m.predicate(i.register(1))
    mode = next(name for name in ("all", "any", "uni", "ballot") if i.has(name))
    target = m.target(i.register(0), "u32" if mode == "ballot" else "pred")

    def step(mask: Mask) -> None:
        lanes = lanes_of(mask)
        present = np.zeros(m.lanes, bool)
        present[lanes] = True
        here = present.reshape(-1, 32)
        yes = np.broadcast_to(chosen(), (m.lanes,)).reshape(-1, 32) & here
        if mode == "ballot":
            result = (yes << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "any":
            result = yes.any(1)
        else:
            result = (yes == here).all(1)
            if mode == "uni":
                result |= ~yes.any(1)
        target[lanes] = np.repeat(result, 32)[lanes]

    return step


def active_mask(m: Machine, i: Instruction) -> Step:
    target = m.target(i.register(0), "u32")

    def step(mask: Mask) -> None:
        present = np.broadcast_to(np.asarray(mask), (m.lanes,)).reshape(-1, 32)
        bits = (present << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        target[lanes_of(mask)] = np.repeat(bits, 32)[lanes_of(mask)]

    return step
