"""Run a PTX kernel on the CPU with NumPy: it executes the very text that nvJitLink assembles.

    device = Device()
    q, out = device.put(array), device.empty(nbytes)
    Kernel(ptx_text).run(device, grid=(x, y, z), block=(128, 1, 1), params=packed, smem=65536)
    result = device.get(out, np.uint16)

It catches what a GPU hides: accesses outside an allocation or shared memory, misalignment, reads of memory that was
never written, cp.async data used before its wait_group (it reads as NaN), barriers that not every thread reaches,
races of a block's warps through shared memory, stores of different values to one global address, and additions to
global memory that are out of turn. It models no timing and takes the threads of one warp to run in step; mbarriers and
bulk copies it does not know, nor, of course, what the assembler does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.ptx.decoder import decode
from tests.ptx.machine import Dim3, Machine, Step
from tests.ptx.memory import Device
from tests.ptx.parser import PtxError, parse

__all__ = ["Device", "Kernel", "PtxError"]

WAVE_LANES = 1024  # threads that run together: more share the cost of a NumPy call, fewer stay in the cache


class Kernel:
    """A parsed kernel. Machines are kept, so that further launches of the same block size start at once."""

    def __init__(self, ptx: str):
        self.program = parse(ptx)
        self._machines: dict[tuple[object, ...], Machine] = {}

    def run(
        self, device: Device, *, grid: Dim3, block: Dim3, params: bytes | bytearray, smem: int = 0, races: bool = True,
        order: Sequence[int] | None = None,
    ) -> int:  # fmt: skip
        """Run every block of the grid and return the number of instructions executed, counted once a block.

        params: the packed parameter buffer; smem: dynamic shared memory in bytes; races: check for races through
        shared memory; order: numbers of the blocks to run, one after the other, so that each may wait for those before
        it; None: all, several together. Raises PtxError for a fault or an unknown instruction.
        """
        if len(params) != self.program.param_bytes:
            raise PtxError(f"{len(params)} bytes of parameters, the kernel takes {self.program.param_bytes}")
        device.launch()
        total = math.prod(grid)
        waves = [range(j, j + 1) for j in order] if order is not None else even_parts(total, math.prod(block))
        packed = np.frombuffer(bytes(params), np.uint8)
        executed = 0
        with np.errstate(all="ignore"):
            for wave in waves:
                machine = self._machine(block, len(waves[0]), smem, races)
                machine.set_grid(grid)
                executed += machine.run([place(j, grid) for j in wave], wave.start, device, packed)
        return executed

    def decoded(self, machine: Machine) -> list[Step]:
        """The program's instructions as closures; for tests that look into them."""
        return decode(machine)

    def _machine(self, block: Dim3, blocks: int, smem: int, races: bool) -> Machine:
        key = (block, blocks, smem, races)
        if key not in self._machines:
            self._machines[key] = Machine(self.program, block, blocks, smem, races, self.decoded)
        return self._machines[key]


def place(number: int, grid: Dim3) -> Dim3:
    """The coordinates of a block."""
    x, y, _ = grid
    return number % x, number // x % y, number // (x * y)


def even_parts(blocks: int, threads: int) -> list[range]:
    """The numbers of blocks of so many threads, in waves of the same size but for the last."""
    waves = -(-blocks // max(1, WAVE_LANES // threads))
    size = -(-blocks // max(1, waves))
    return [range(first, min(first + size, blocks)) for first in range(0, blocks, size)]
