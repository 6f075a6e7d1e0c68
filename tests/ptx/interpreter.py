"""Run a PTX kernel on the CPU with NumPy: it executes the very text that nvJitLink assembles.

    device = Device()
    q, out = device.put(array), device.empty(nbytes)
    Kernel(ptx_text).run(device, grid=(x, y, z), block=(128, 1, 1), params=packed, smem=65536)
    result = device.get(out, np.uint16)

It catches what a GPU hides: accesses outside an allocation or shared memory, misalignment, reads of memory that was
never written, cp.async data used before its wait_group (it reads as NaN), barriers that not every thread reaches,
races of a block's warps through shared memory, and stores of different values to one global address. It models no
timing and takes the threads of one warp to run in step; mbarriers and bulk copies it does not know, nor, of course,
what the assembler does.
"""

from __future__ import annotations

import itertools
import math

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
        self, device: Device, *, grid: Dim3, block: Dim3, params: bytes | bytearray, smem: int = 0, races: bool = True
    ) -> int:
        """Run every block of the grid and return the number of instructions executed, counted once a block.

        params: the packed parameter buffer; smem: dynamic shared memory in bytes; races: check for races through
        shared memory. Raises PtxError for a fault or an unknown instruction.
        """
        if len(params) != self.program.param_bytes:
            raise PtxError(f"{len(params)} bytes of parameters, the kernel takes {self.program.param_bytes}")
        device.launch()
        order = [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid)))]
        waves = -(-len(order) // max(1, WAVE_LANES // math.prod(block)))
        size = -(-len(order) // max(1, waves))
        packed = np.frombuffer(bytes(params), np.uint8)
        executed = 0
        with np.errstate(all="ignore"):
            for first in range(0, len(order), size):
                wave = order[first : first + size]
                machine = self._machine(block, size, smem, races)
                machine.set_grid(grid)
                executed += machine.run(wave, first, device, packed)
        return executed

    def decoded(self, machine: Machine) -> list[Step]:
        """The program's instructions as closures; for tests that look into them."""
        return decode(machine)

    def _machine(self, block: Dim3, blocks: int, smem: int, races: bool) -> Machine:
        key = (block, blocks, smem, races)
        if key not in self._machines:
            self._machines[key] = Machine(self.program, block, blocks, smem, races, self.decoded)
        return self._machines[key]
