"""From a program's instructions to the closures that a machine runs."""

from __future__ import annotations

import numpy as np

from tests.ptx import conversions, instructions
from tests.ptx.machine import CONTROL, Machine, Mask, Step, nothing
from tests.ptx.matrix import grouped_mma
from tests.ptx.parser import Instruction, PtxError

BUILDERS = instructions.BUILDERS | conversions.BUILDERS


def decode(machine: Machine) -> list[Step]:
    """Every instruction of the program as a closure; control instructions, which `Machine` runs, as no-ops."""
    program = machine.program
    groups = grouped_mma(machine, set(program.labels.values()))
    code: list[Step] = []
    for pc, instruction in enumerate(program.code):
        if instruction.opcode in CONTROL:
            if instruction.opcode == "bra" and instruction.register(0) not in program.labels:
                raise PtxError(f"no such label: {instruction.text}")
            code.append(nothing)
            continue
        builder = BUILDERS.get(instruction.opcode)
        if builder is None:
            raise PtxError(f"instruction not known: {instruction.text}")
        try:
            step = groups[pc] if pc in groups else builder(machine, instruction)
            code.append(guarded(machine, instruction, step))
        except PtxError as error:
            raise PtxError(f"{error}\n  in instruction {pc}: {instruction.text}") from None
        except (IndexError, KeyError, ValueError) as error:
            raise PtxError(f"instruction not known: {instruction.text} ({error!r})") from None
    return code


def guarded(machine: Machine, instruction: Instruction, step: Step) -> Step:
    """`step` for those lanes alone whose guard predicate holds."""
    if instruction.guard is None:
        return step
    value = machine.predicate(("!" if instruction.negated else "") + instruction.guard)

    def run(mask: Mask) -> None:
        chosen = value()
        if mask is not True:
            chosen = chosen & mask
        try:
            if chosen.all():
                step(True)
            elif chosen.any():
                step(chosen)
        except PtxError as error:
            if error.lane is not None:  # it counts the chosen lanes; the caller counts those of `mask`
                lane = np.flatnonzero(chosen)[error.lane]
                error.lane = int(lane if isinstance(mask, bool) else np.count_nonzero(mask[:lane]))
            raise

    return run
