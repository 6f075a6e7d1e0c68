"""Kernels with one line changed, to see whether the checks notice."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tests.ptx.decoder import BUILDERS, decode, guarded
from tests.ptx.formats import Array
from tests.ptx.interpreter import Device, Kernel, PtxError
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.parser import Instruction

C = TypeVar("C")

_BOUND = r"setp\.(lt|le|gt|ge)\.s32\s+%p\d+, %r\d+, %r\d+"
WIDER = {"lt": "le", "gt": "ge", "le": "lt", "ge": "gt"}  # the last two narrow


@dataclass(frozen=True)
class Fault:
    """A kernel with one line changed. line: its number in the PTX, from 1."""

    line: int
    before: str
    after: str
    ptx: str


def planted(ptx: str, pattern: str, change: Callable[[re.Match[str]], str]) -> list[Fault]:
    """One fault for each line that holds `pattern`."""
    lines = ptx.splitlines()
    faults = []
    for j, line in enumerate(lines):
        if match := re.search(pattern, line):
            changed = line.replace(match[0], change(match))
            faults.append(
                Fault(j + 1, line.strip(), changed.strip(), "\n".join([*lines[:j], changed, *lines[j + 1 :]]))
            )
    return faults


def dropped_barriers(ptx: str) -> list[Fault]:
    return planted(ptx, r"\bbar(?:rier)?\.sync\b[^;]*;", lambda _: "")


def weakened_waits(ptx: str) -> list[Fault]:
    return planted(ptx, r"(cp\.async\.wait_group\s+)(\d+)", lambda match: f"{match[1]}{int(match[2]) + 1}")


def unbounded_copies(ptx: str) -> list[Fault]:
    """Asynchronous copies of up to 16 bytes that always read all 16."""
    return planted(ptx, r"(cp\.async\.c[ag]\.[^;]*, 16), %r\d+;", lambda match: f"{match[1]}, 16;")


def shifted_bounds(ptx: str) -> list[Fault]:
    """Comparisons of registers. Those with a number are arithmetic of the compiler's, where both often do the same."""
    return planted(ptx, _BOUND, lambda match: match[0].replace(f".{match[1]}.", f".{WIDER[match[1]]}."))


def dropped_bounds(ptx: str) -> list[Fault]:
    """Maxima of two registers that are the first. Not those of look-ups in a page table: of a key, which is divided."""
    found = planted(ptx, r"max\.s32(\s+%r\d+), (%r\d+), %r\d+;", lambda match: f"mov.b32{match[1]}, {match[2]};")
    divided, lines = re.compile(r"min\.s32\s+(%r\d+), %r\d+, %r\d+;\s*cvt\.u64\.u32\s+%rd\d+, \1;"), ptx.splitlines()
    return [fault for fault in found if not divided.search("\n".join(lines[fault.line : fault.line + 3]))]


def trapped_bounds(ptx: str) -> list[Fault]:
    """Kernels that trap where the two sides of a comparison are equal, the only place where `shifted_bounds` differ."""
    return planted(
        ptx,
        r"setp\.(?:lt|le|gt|ge)\.s32(\s+%p\d+)(, %r\d+, %r\d+;)",
        lambda match: f"setp.eq.s32{match[1]}{match[2]} @{match[1].strip()} trap; {match[0]}",
    )


class Switchable(Kernel):
    """A kernel of which one instruction at a time can be swapped for another, without parsing its text anew.

    places: the instructions and what may take their place; on: the number of the place where it has; equal: the places
    whose instruction is a comparison of sides that were equal in the last run. Shifting another makes no difference.
    """

    def __init__(self, ptx: str, change: Callable[[Instruction], Instruction | None]):
        super().__init__(ptx)
        changed = ((pc, change(instruction)) for pc, instruction in enumerate(self.program.code))
        self.places = [(pc, instruction) for pc, instruction in changed if instruction]
        self.on: int | None = None
        self.equal: set[int] = set()

    def run(self, device: Device, **launch: Any) -> int:
        self.equal.clear()
        return super().run(device, **launch)

    def decoded(self, machine: Machine) -> list[Step]:
        code = decode(machine)
        for number, (pc, changed) in enumerate(self.places):
            other = guarded(machine, changed, BUILDERS[changed.opcode](machine, changed))
            code[pc] = self.switch(number, code[pc], other)
            if changed.opcode == "setp":
                code[pc] = self.noting(number, code[pc], *(machine.source(changed.register(j), "s32") for j in (1, 2)))
        return code

    def switch(self, number: int, sound: Step, other: Step) -> Step:
        return lambda mask: other(mask) if self.on == number else sound(mask)

    def noting(self, number: int, step: Step, left: Array, right: Array) -> Step:
        def run(mask: Mask) -> None:
            if ((left == right) & mask).any():
                self.equal.add(number)
            step(mask)

        return run

    def text(self, number: int) -> str:
        return f"{self.places[number][0]}: {self.program.code[self.places[number][0]].text}"

    def survivors(self, cases: Mapping[C, Collection[int]], caught: Callable[[C], str]) -> list[int]:
        """The places where no case catches a change. cases: each with the places where it can make a difference.

        The case that caught the last one is tried first: neighbours are often alike.
        """
        left, order = [], list(cases)
        for number in sorted(set().union(*cases.values())):
            self.on = number
            catcher = next((case for case in order if number in cases[case] and caught(case)), None)
            if catcher is None:
                left.append(number)
            else:
                order.remove(catcher)
                order.insert(0, catcher)
        self.on = None
        return left


def shifted(instruction: Instruction) -> Instruction | None:
    """As `shifted_bounds`."""
    if not re.match(_BOUND, instruction.text):
        return None
    return replace(instruction, modifiers=(WIDER[instruction.modifiers[0]], *instruction.modifiers[1:]))


def unbounded(instruction: Instruction) -> Instruction | None:
    """As `unbounded_copies`."""
    if instruction.opcode != "cp" or len(instruction.operands) < 4:
        return None
    return replace(instruction, operands=instruction.operands[:3])


def survivors(found: list[Fault], caught: Callable[[Kernel], str]) -> list[Fault]:
    """The faults that nothing caught. caught: says what gave a kernel's fault away, '' if nothing did."""
    return [fault for fault in found if not caught(Kernel(fault.ptx))]


def caught(cases: Iterable[C], problems: Callable[[C], list[str]]) -> str:
    """What gave a fault away, or '' if nothing did. problems: of a case that is run with the fault."""
    for case in cases:
        try:
            found = problems(case)
        except PtxError as error:
            return str(error)
        if found:
            return "; ".join(found)
    return ""
