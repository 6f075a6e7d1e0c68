"""What ptxas made of a kernel, read from nvdisasm's text: its loops, and the instruction mix of the hottest one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from builder.errors import InspectError
from builder.toolchain import nvdisasm_path

INSTRUCTION_BYTES = 16  # since Volta
_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)\s*([^;]*);")
_MMA = {"HMMA", "QMMA", "IMMA", "OMMA"}
_SPILL = {"LDL", "STL"}  # loads and stores of local memory
_NO_RETURN = {"EXIT", "RET", "KILL", "BRX", "JMX", "JMP"}


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction. address: bytes from the kernel's start; name: the mnemonic without its suffixes."""

    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch names, or None."""
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether what follows may run next. 'BRA.U !UP0, 0x40' is conditional without a guard."""
        return self.guarded or (self.name == "BRA" and "," in self.operands)


@dataclass(frozen=True)
class Loops:
    """What the loops of a kernel are like.

    hot: instruction counts by mnemonic of what every iteration executes of the innermost loop with the most HMMA (of
    several, the shortest: the one without masks); without any HMMA, of the longest innermost loop; empty when nothing
    loops. What is jumped over at times, such as a lazy rescaling, does not count.
    spilling: whether any loop with HMMA touches local memory, be it in code that is seldom executed. HMMA stands for
    every kind of matrix instruction.
    """

    hot: tuple[tuple[str, int], ...]
    spilling: bool


@dataclass
class NaturalLoop:
    """body: all blocks of a loop. always: those on every path from its header to a branch back."""

    body: set[range]
    always: set[range]


def disassemble(codes: Mapping[str, bytes], arch: str) -> dict[str, list[Instruction]]:
    """The instructions of several kernels' code for one architecture, by the kernels' names.

    One nvdisasm run for all of them: starting it takes 0.4 s, a kernel 0.03 s. InspectError if its text is not
    one instruction for every 16 bytes.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes.values()))
        file.flush()
        command = [str(nvdisasm_path()), "--binary", arch.replace("sm_", "SM"), "--no-dataflow", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    instructions = parse(done.stdout)
    size = sum(map(len, codes.values()))
    if done.returncode or len(instructions) * INSTRUCTION_BYTES != size:
        raise InspectError(
            f"nvdisasm for {arch}: {len(instructions)} instructions in {size} bytes of {', '.join(codes)}, "
            f"exit code {done.returncode}: {done.stderr.strip()[:500]}"
        )
    found, start = {}, 0
    for name, code in codes.items():
        count = len(code) // INSTRUCTION_BYTES
        found[name] = _rebased(instructions[start : start + count], start * INSTRUCTION_BYTES)
        start += count
    return found


def parse(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's text for a raw binary."""
    return [
        Instruction(int(address, 16), bool(guard), name, operands.strip())
        for address, guard, name, _, operands in _LINE.findall(text)
    ]


def _rebased(instructions: Sequence[Instruction], base: int) -> list[Instruction]:
    """Addresses and branch targets relative to the kernel's own start."""
    result = []
    for i in instructions:
        operands = i.operands
        if i.name in ("BRA", "BSSY", "CALL") and i.target is not None:
            operands = re.sub(r"0x[0-9a-f]+\s*$", hex(i.target - base), operands)
        result.append(Instruction(i.address - base, i.guarded, i.name, operands))
    return result


def loops(instructions: Sequence[Instruction]) -> Loops:
    """Find the natural loops of one kernel and judge them."""
    found = natural_loops(instructions)
    whole = {header: _count(instructions, loop.body) for header, loop in found.items()}
    always = {header: _count(instructions, loop.always) for header, loop in found.items()}
    mma = {header: sum(count[name] for name in _MMA) for header, count in whole.items()}
    candidates = {header for header in mma if mma[header]} or set(found)
    innermost = [h for h in candidates if not any(o in found[h].body for o in candidates if o != h)]
    sign = -1 if any(mma.values()) else 1
    hot = max(innermost, key=lambda h: (mma[h], sign * always[h].total(), -h.start), default=None)
    return Loops(
        hot=() if hot is None else tuple(sorted(always[hot].items())),
        spilling=any(mma[header] and _SPILL & count.keys() for header, count in whole.items()),
    )


def _count(instructions: Sequence[Instruction], blocks: Iterable[range]) -> Counter[str]:
    return Counter(instructions[n].name for block in blocks for n in block)


def natural_loops(instructions: Sequence[Instruction]) -> dict[range, NaturalLoop]:
    """Loop header → its loop; a block is the range of its instructions' numbers.

    A loop is a branch back to a block that every path to the branch has passed. Backward branches alone would not
    do: ptxas moves rare code behind the kernel's end and jumps back from there.
    """
    blocks = _blocks(instructions)
    after = {block: _successors(instructions, block, blocks) for block in blocks}
    before: dict[range, set[range]] = {block: set() for block in blocks}
    for block, targets in after.items():
        for target in targets:
            before[target].add(block)
    dominators = _dominators(blocks, before)
    found: dict[range, NaturalLoop] = {}
    for block, targets in after.items():
        for header in targets & dominators.get(block, set()):
            loop = found.setdefault(header, NaturalLoop({header}, set(dominators[block])))
            loop.always &= dominators[block]
            waiting = [block]
            while waiting:
                if (b := waiting.pop()) not in loop.body:
                    loop.body.add(b)
                    waiting += before[b] & dominators.keys()
    for loop in found.values():
        loop.always &= loop.body
    return found


def _blocks(instructions: Sequence[Instruction]) -> list[range]:
    """Cut at every branch target and after every instruction that may leave the straight line."""
    cuts = {0, len(instructions)}
    for n, i in enumerate(instructions):
        if i.name in ("BRA", "BSSY", "CALL") and i.target is not None:
            cuts.add(i.target // INSTRUCTION_BYTES)
        if i.name in _NO_RETURN or i.name in ("BRA", "BSYNC"):
            cuts.add(n + 1)
    edges = sorted(c for c in cuts if 0 <= c <= len(instructions))
    return [range(a, b) for a, b in pairwise(edges)]


def _successors(instructions: Sequence[Instruction], block: range, blocks: Sequence[range]) -> set[range]:
    last = instructions[block[-1]]
    next_ones: set[int] = set()
    if last.conditional or last.name not in _NO_RETURN | {"BRA"}:
        next_ones.add(block.stop)
    if last.name == "BRA" and last.target is not None:
        next_ones.add(last.target // INSTRUCTION_BYTES)
    if last.name == "BSYNC":  # waits for the threads that the matching BSSY names, then goes on where that one says
        barrier = last.operands
        opened = [i for i in instructions[: block[-1]] if i.name == "BSSY" and i.operands.startswith(barrier + ",")]
        next_ones |= {i.target // INSTRUCTION_BYTES for i in opened[-1:] if i.target is not None}
    return {b for b in blocks if b.start in next_ones}


def _dominators(blocks: Sequence[range], before: Mapping[range, set[range]]) -> dict[range, set[range]]:
    """Block → the blocks that every path from the entry to it passes; only blocks that the entry reaches."""
    entry = blocks[0]
    known: dict[range, set[range]] = {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for block in blocks[1:]:
            above = [known[b] for b in before[block] if b in known]
            if above and (new := set.intersection(*above) | {block}) != known.get(block):
                known[block] = new
                changed = True
    return known
