"""Runs blocks of a program together, in waves: every thread of every block of the wave is one lane of an array.

Threads that stand at the same instruction run as one; where they part, those at the lowest instruction go first, so
that they meet again as soon as they can. Threads of one warp are taken to run in step; races between them are looked
for in blocks of one warp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx.formats import SIZES, TYPES, UNSIGNED, Array
from tests.ptx.memory import SHARED_BASE, Device, SharedMemory
from tests.ptx.parser import Address, Instruction, Program, PtxError, Symbol
from tests.ptx.races import RaceTracker, Turns

Mask = bool | Array  # True: every lane; else a boolean for each lane
Step = Callable[[Mask], None]
Decoder = Callable[["Machine"], list[Step]]
Dim3 = tuple[int, int, int]

MAX_SEGMENTS = 1_000_000  # straight stretches of one wave, after which it is taken to loop for ever
CONTROL = ("bra", "ret", "exit", "bar", "barrier")


class Machine:
    """Registers, memory and decoded instructions for a wave of `blocks` blocks.

    Instructions are decoded to closures once, over fixed arrays, so that running one is a few NumPy calls.
    """

    def __init__(self, program: Program, block_dim: Dim3, blocks: int, smem: int, races: bool, decode: Decoder):
        """smem: dynamic shared memory of a block in bytes; races: look for races; decode: makes `code`."""
        self.program, self.blocks = program, blocks
        self.threads = int(np.prod(block_dim))
        if self.threads % 32:
            raise PtxError(f"block of {self.threads} threads: must be a multiple of 32")
        self.lanes = blocks * self.threads
        lane = np.arange(self.lanes)
        self.lane, self.warp, self.block = lane % 32, lane // 32, lane // self.threads
        self.device = Device()
        self.params = np.zeros(program.param_bytes, np.uint8)
        self.warp_in_launch = np.zeros(self.lanes, np.int64)
        self.symbols, shared_bytes = place_symbols(program.shared, smem, SHARED_BASE)
        local_symbols, local_bytes = place_symbols(program.local, 0, 0)
        self.symbols |= local_symbols
        self.local_stride = -(-max(local_bytes, 16) // 16) * 16
        self.local_bytes, self.local = local_bytes, np.zeros(self.lanes * self.local_stride, np.uint8)
        actors, kind = (32, "thread") if self.threads == 32 else (self.threads // 32, "warp")
        self.actor_threads = self.threads // actors
        tracker = RaceTracker(blocks, actors, -(-shared_bytes // 16) * 16, granule(program), kind)
        self.shared = SharedMemory(blocks, self.threads, shared_bytes, tracker if races else None)
        self.turns = Turns(tracker, self.shared.actor) if races else None
        self.special = self._special_registers(block_dim)
        self._allocate_registers()
        self.code = decode(self)
        self.ends = self._segment_ends()

    # ---- operands ------------------------------------------------------------------------------------------------
    def row(self, name: str) -> tuple[int, int]:
        """(width in bytes, row in the bank of that width) of a register."""
        if name not in self.rows:
            raise PtxError(f"no register {name!r}")
        return self.rows[name]

    def source(self, operand: str, kind: str) -> Array:
        """An operand as an array of PTX type `kind`: a live view for registers, a 0-d array for constants."""
        dtype = np.dtype(TYPES[kind])
        if operand in self.rows:
            width, row = self.rows[operand]
            if width != dtype.itemsize or (kind == "pred") != (self.kinds[operand] == "pred"):
                raise PtxError(f"{operand} is .{self.kinds[operand]}, used as .{kind}")
            return self.banks[self.kinds[operand] == "pred", width][row].view(dtype)
        if operand in self.special:
            return self.special[operand].view(dtype) if dtype.itemsize == 4 else self.special[operand].astype(dtype)
        return np.array(self.constant(operand, dtype))

    def constant(self, operand: str, dtype: np.dtype) -> Any:
        """The value of a number or the address of a symbol."""
        bits = 8 * dtype.itemsize
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            single = np.array(int(operand[2:], 16), np.uint32 if operand[1] in "fF" else np.uint64)
            if dtype.kind == "f":
                return single.view(np.float32 if single.itemsize == 4 else np.float64).astype(dtype)[()]
            return single.astype(UNSIGNED[dtype.itemsize]).view(dtype)[()]
        try:
            number = self.symbols[operand] if operand in self.symbols else int(operand.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"unknown operand {operand!r}") from None
        if dtype.kind == "b":
            return np.bool_(number)
        return np.array(number & ((1 << bits) - 1), UNSIGNED[dtype.itemsize]).view(dtype)[()]

    def full_source(self, operand: str, kind: str) -> Array:
        """As `source`, constants spread over all lanes."""
        return np.broadcast_to(self.source(operand, kind), (self.lanes,))

    def wide_source(self, operand: str, kind: str) -> Array:
        """As `full_source`, for instructions whose register may be wider than the type: its low bytes are meant."""
        size = SIZES[kind]
        if operand in self.rows and self.rows[operand][0] > size and not kind.startswith("f"):
            whole = self.source(operand, f"u{8 * self.rows[operand][0]}")
            return whole.view(TYPES[kind]).reshape(self.lanes, -1)[:, 0]
        return self.full_source(operand, kind)

    def target(self, operand: str, kind: str) -> Array:
        """The register to write, as an array of PTX type `kind`."""
        if operand == "_":
            return np.empty(self.lanes, TYPES[kind])
        self.row(operand)
        return self.source(operand, kind)

    def wide_target(self, operand: str, kind: str) -> Array:
        """As `target`, for instructions whose register may be wider than the type: the value is extended."""
        if operand == "_":
            return np.empty(self.lanes, TYPES[kind])
        width, _ = self.row(operand)
        if width == SIZES[kind]:
            return self.target(operand, kind)
        if width < SIZES[kind] or kind.startswith("f"):
            raise PtxError(f"{operand} is .{self.kinds[operand]}, used as .{kind}")
        return self.target(operand, f"{'s' if kind.startswith('s') else 'u'}{8 * width}")

    def predicate(self, operand: str) -> Callable[[], Array]:
        """The value of a predicate operand, which may be negated by '!'."""
        value = self.source(operand.lstrip("!"), "pred")
        return (lambda: ~value) if operand.startswith("!") else (lambda: value)

    def address(self, address: Address) -> Callable[[slice | Array], Array]:
        """The addresses of the given lanes, as uint64 or (32-bit shared addresses) uint32."""
        wide = address.base in self.rows and self.rows[address.base][0] == 8
        kind = "u64" if wide or address.base not in self.rows else "u32"
        base = self.full_source(address.base, kind)
        offset = base.dtype.type(address.offset & ((1 << 8 * base.itemsize) - 1))
        return (lambda lanes: base[lanes] + offset) if offset else (lambda lanes: base[lanes])

    # ---- running -------------------------------------------------------------------------------------------------
    def run(self, wave: Sequence[Dim3], first: int, device: Device, params: Array) -> int:
        """Run the blocks `wave`, the first of which is block number `first` of the launch.

        Returns the instructions executed, counted once a block. Raises PtxError on a fault.
        """
        self._reset(wave, first, device, params)
        executed, segments = 0, 0
        while self.fronts or self._release(must=True):
            pc = min(self.fronts)
            lanes = self.fronts.pop(pc)
            stop = min(self.fronts, default=len(self.code))
            end = min(self.ends[pc], stop)
            mask: Mask = True if lanes.all() else lanes
            self._straight(pc, end, mask, wave)
            active = self.blocks if mask is True else np.count_nonzero(lanes.reshape(self.blocks, -1).any(1))
            executed += (end - pc) * int(active)
            if end == stop and end < len(self.code):
                self._join(end, lanes)
            else:
                self._control(end, lanes)
            segments += 1
            if segments > MAX_SEGMENTS:
                raise PtxError("the kernel does not end")
        return executed

    def _straight(self, pc: int, end: int, mask: Mask, wave: Sequence[Dim3]) -> None:
        code, at = self.code, pc
        try:
            for at in range(pc, end):
                code[at](mask)
        except PtxError as error:
            where = ""
            if error.lane is not None:
                lane = error.lane if mask is True else int(np.flatnonzero(mask)[error.lane])
                where = f", block {wave[lane // self.threads]}, thread {lane % self.threads}"
            raise PtxError(f"{error}\n  at instruction {at}{where}: {self.program.code[at].text}") from None

    def _control(self, pc: int, lanes: Array) -> None:
        """Run the control instruction at `pc`; beyond the last instruction, threads end."""
        if pc >= len(self.code):
            self.alive &= ~lanes
            return
        instruction = self.program.code[pc]
        taken = lanes
        if instruction.guard:
            value = self.source(instruction.guard, "pred")
            taken = lanes & (~value if instruction.negated else value)
            if not taken.all() and (rest := lanes & ~taken).any():
                self._join(pc + 1, rest)
        if not taken.any():
            return
        if instruction.opcode == "bra":
            self._join(self.program.labels[instruction.register(0)], taken)
        elif instruction.opcode in ("ret", "exit"):
            self.alive &= ~taken
        elif instruction.has("warp"):
            self._meet_in_warps(taken)
            self._join(pc + 1, taken)
        else:
            self._arrive(instruction, pc, taken)

    def _join(self, pc: int, lanes: Array) -> None:
        here = self.fronts.get(pc)
        self.fronts[pc] = lanes if here is None else here | lanes

    # ---- barriers ------------------------------------------------------------------------------------------------
    def _arrive(self, instruction: Instruction, pc: int, lanes: Array) -> None:
        if "arrive" in instruction.modifiers or "red" in instruction.modifiers:
            raise PtxError(f"instruction not known: {instruction.text}")
        numbers = [self.full_source(instruction.register(j), "u32")[lanes] for j in range(len(instruction.operands))]
        self.waiting[lanes] = numbers[0] if numbers else 0
        self.resume[lanes] = pc + 1
        self.expected[lanes] = numbers[1] if len(numbers) > 1 else 0
        self._release(must=False)

    def _meet_in_warps(self, lanes: Array) -> None:
        """bar.warp.sync: it matters where threads are the actors of races, and holds nobody."""
        if self.shared.tracker and self.actor_threads == 1:
            here = lanes.reshape(self.blocks, -1)
            self.shared.tracker.barrier([(int(j), np.flatnonzero(here[j])) for j in np.flatnonzero(here.any(1))])

    def _release(self, must: bool) -> bool:
        """Let go every complete barrier. False: all threads have ended. Raises PtxError for a deadlock if `must`."""
        waiting, expected = self.waiting.reshape(self.blocks, -1), self.expected.reshape(self.blocks, -1)
        alive = self.alive.reshape(self.blocks, -1).sum(1)
        met, free = [], np.zeros(waiting.shape, bool)
        for barrier in np.unique(waiting[waiting >= 0]):
            here = waiting == barrier
            count = here.sum(1)
            for block in np.flatnonzero(count):
                wanted = np.unique(expected[block][here[block]])
                if len(wanted) > 1:
                    raise PtxError(f"barrier {barrier}: its threads expect different counts {wanted.tolist()}")
                if count[block] == (wanted[0] or alive[block]):
                    free[block] |= here[block]
                    met.append((int(block), np.unique(np.flatnonzero(here[block]) // self.actor_threads)))
        let_go = free.reshape(-1)
        if met:
            if self.shared.tracker:
                self.shared.tracker.barrier(met)
            for pc in np.unique(self.resume[let_go]):
                self._join(int(pc), let_go & (self.resume == pc))
            self.waiting[let_go] = -1
        elif must and self.alive.any():
            stuck = sorted({int(self.resume[lane]) - 1 for lane in np.flatnonzero(self.waiting >= 0)})
            raise PtxError(
                "deadlock: threads wait for ever at " + ", ".join(self.program.code[pc].text for pc in stuck)
            )
        return bool(met)

    # ---- set-up --------------------------------------------------------------------------------------------------
    def _reset(self, wave: Sequence[Dim3], first: int, device: Device, params: Array) -> None:
        self.device = device
        self.params[:] = params
        for bank in self.banks.values():
            bank.fill(0)
        self.shared.reset()
        if self.turns:
            self.turns.reset()
        self.local.fill(0xFF)
        self.alive = np.arange(self.lanes) < len(wave) * self.threads  # the last wave may be smaller
        padded = [*wave, *[(0, 0, 0)] * (self.blocks - len(wave))]
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"][:] = np.repeat([block[axis] for block in padded], self.threads)
        self.warp_in_launch[:] = self.warp + first * (self.threads // 32)
        self.waiting = np.full(self.lanes, -1)
        self.resume, self.expected = np.zeros(self.lanes, np.int64), np.zeros(self.lanes, np.int64)
        self.fronts = {0: self.alive.copy()}

    def set_grid(self, grid: Dim3) -> None:
        for axis, name in enumerate("xyz"):
            self.special[f"%nctaid.{name}"][:] = grid[axis]

    def _special_registers(self, block_dim: Dim3) -> dict[str, Array]:
        thread = np.arange(self.lanes) % self.threads
        x, y, _ = block_dim
        values: dict[str, Array] = {"%laneid": thread % 32, "%warpid": thread // 32}
        for name, tid, size in zip("xyz", (thread % x, thread // x % y, thread // (x * y)), block_dim, strict=True):
            values |= {f"%tid.{name}": tid, f"%ntid.{name}": np.full(self.lanes, size)}
            values |= {f"%ctaid.{name}": np.zeros(self.lanes), f"%nctaid.{name}": np.zeros(self.lanes)}
        return {name: value.astype(np.uint32) for name, value in values.items()}

    def _allocate_registers(self) -> None:
        """One bank a width, one row a register, one column a lane; predicates have a bank of their own."""
        self.kinds = self.program.registers
        self.rows: dict[str, tuple[int, int]] = {}
        counts: dict[tuple[bool, int], int] = {}
        for name, kind in self.kinds.items():
            if kind not in TYPES:
                raise PtxError(f"register type .{kind} of {name} is not known")
            bank = (kind == "pred", SIZES[kind])
            self.rows[name] = (SIZES[kind], counts.get(bank, 0))
            counts[bank] = counts.get(bank, 0) + 1
        self.banks = {
            (pred, width): np.zeros((count, self.lanes), np.bool_ if pred else UNSIGNED[width])
            for (pred, width), count in counts.items()
        }

    def _segment_ends(self) -> list[int]:
        """For each instruction, the first control instruction at or after it."""
        ends, end = [], len(self.code)
        for pc in reversed(range(len(self.code))):
            if self.program.code[pc].opcode in CONTROL:
                end = pc
            ends.append(end)
        return ends[::-1]


def place_symbols(symbols: Sequence[Symbol], extern: int, base: int) -> tuple[dict[str, int], int]:
    """Address of each symbol and the bytes of all. `extern`: bytes of the memory that the launch sizes; every array
    without a size of its own begins where it does, behind the others."""
    places, end = {}, 0
    for symbol in symbols:
        if symbol.size is not None:
            start = -(-end // symbol.align) * symbol.align
            places[symbol.name] = base + start
            end = start + symbol.size
    unsized = [symbol for symbol in symbols if symbol.size is None]
    if unsized:
        align = max(symbol.align for symbol in unsized)
        start = -(-end // align) * align
        places |= {symbol.name: base + start for symbol in unsized}
        end = start + extern
    return places, end


def granule(program: Program) -> int:
    """Bytes of the smallest shared-memory access: what races are tracked in."""
    sizes = [16]
    for i in program.code:
        if i.opcode in ("ld", "st", "atom", "red") and i.space == "shared":
            sizes.append(SIZES[i.type])
        elif i.opcode == "cp" and i.has("async") and i.operands and "shared" in i.space:
            sizes.append(int(i.register(2), 0))
    return max(min(sizes), 1)


def nothing(mask: Mask) -> None:
    """Instructions without an effect here."""
