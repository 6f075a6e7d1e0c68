"""PTX text to a `Program`: parameters, symbols, registers, instructions and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from tests.ptx.formats import SIZES


class PtxError(Exception):
    """A fault of the kernel (bad address, misalignment, race, deadlock), or PTX that the interpreter does not know."""

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.lane = lane  # the faulting lane of the wave, where one is known


@dataclass(frozen=True)
class Address:
    """`[base + offset]`: base is a register, a symbol, a parameter or a number."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode.modifiers operands`. A vector operand `{a, b}` is a tuple."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The type modifiers, in order."""
        return tuple(m for m in self.modifiers if m in SIZES or m in _PACKED)

    @property
    def type(self) -> str:
        """The last type modifier: that of the operands."""
        if not self.types:
            raise PtxError(f"no type in: {self.text}")
        return self.types[-1]

    @cached_property
    def space(self) -> str:
        """The state space of a memory instruction; 'global' when none is named."""
        spaces = (m.split("::")[0] for m in self.modifiers)
        return next((s for s in spaces if s in ("param", "shared", "global", "local")), "global")

    def register(self, index: int) -> str:
        """Operand `index`, which must be neither a vector nor an address."""
        operand = self.operands[index]
        if not isinstance(operand, str):
            raise PtxError(f"operand {index} is no register or number: {self.text}")
        return operand

    def vector(self, index: int) -> tuple[str, ...]:
        """Operand `index` as a tuple of names, whether it is in braces or not."""
        operand = self.operands[index]
        if isinstance(operand, Address):
            raise PtxError(f"operand {index} is an address: {self.text}")
        return operand if isinstance(operand, tuple) else (operand,)

    def address(self, index: int) -> Address:
        operand = self.operands[index]
        if not isinstance(operand, Address):
            raise PtxError(f"operand {index} is no address: {self.text}")
        return operand


_PACKED = ("bf16", "bf16x2", "f16x2", "e4m3", "e4m3x2", "e5m2x2")


@dataclass(frozen=True)
class Symbol:
    """A shared or local array. size None: `extern`, as large as the launch says."""

    name: str
    align: int
    size: int | None


@dataclass(frozen=True)
class Program:
    """One kernel.

    target: 90 for sm_90, 0 if none is named; params: name -> (offset, size); registers: name -> PTX type;
    labels: name -> index into code.
    """

    name: str
    target: int
    params: dict[str, tuple[int, int]]
    shared: tuple[Symbol, ...]
    local: tuple[Symbol, ...]
    registers: dict[str, str]
    code: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def param_bytes(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)


def parse(text: str) -> Program:
    """The only kernel of a PTX text. Raises PtxError where there is none or more than one."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{(.*)\}", text, re.S)
    if len(entries) != 1 or len(re.findall(r"\.entry\b", text)) != 1:
        raise PtxError("the PTX must hold exactly one .entry")
    name, header, body = entries[0]
    code, labels = _statements(body)
    target = re.search(r"^\s*\.target\s+sm_(\d+)", text, re.M)
    return Program(
        name=name,
        target=int(target[1]) if target else 0,
        params=_params(header),
        shared=_symbols("shared", text),
        local=_symbols("local", body),
        registers=_registers(body),
        code=tuple(code),
        labels=labels,
    )


def _params(header: str) -> dict[str, tuple[int, int]]:
    params, end = {}, 0
    for declaration in filter(None, (part.strip() for part in header.split(","))):
        kind = re.search(r"\.([busf](?:8|16|32|64))\b", declaration)
        name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", declaration)
        if kind is None or name is None:
            raise PtxError(f"parameter not understood: {declaration}")
        width = SIZES[kind[1]]
        size = width * int(name[2] or 1)
        align = re.search(r"\.param\s+\.align\s+(\d+)", declaration)
        step = int(align[1]) if align else width
        offset = -(-end // step) * step
        params[name[1]] = (offset, size)
        end = offset + size
    return params


def _symbols(space: str, text: str) -> tuple[Symbol, ...]:
    found = re.findall(rf"\.{space}\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text)
    return tuple(Symbol(name, int(align), int(size) if size else None) for align, name, size in found)


def _registers(body: str) -> dict[str, str]:
    registers: dict[str, str] = {}
    for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
        for name in (part.strip() for part in names.split(",")):
            counted = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{counted[1]}{j}" for j in range(int(counted[2]))] if counted else [name]:
                if registers.setdefault(each, kind) != kind:
                    raise PtxError(f"register {each} is declared as .{registers[each]} and as .{kind}")
    return registers


def _statements(body: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    body = re.sub(r"(?<![\w.])\.(reg|extern|shared|local|pragma)\b[^;]*;", "", body)
    for statement in re.sub(r"\s+", " ", body).split(";"):
        rest = statement.strip()
        while rest:
            if label := re.match(r"([$%\w]+)\s*:(?!:)\s*", rest):
                labels[label[1]] = len(code)
                rest = rest[label.end() :]
            elif rest[0] in "{}":  # a scope of inline assembly
                rest = rest[1:].strip()
            else:
                break
        if rest:
            code.append(_instruction(rest))
    return code, labels


def _instruction(text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%$\w]+)\s+)?(\S+)\s*(.*)", text)
    if match is None:
        raise PtxError(f"statement not understood: {text}")
    negation, guard, head, tail = match.groups()
    opcode, *modifiers = head.split(".")
    pieces = (piece.strip() for piece in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", tail))
    operands = tuple(_operand(piece) for piece in pieces if piece)
    return Instruction(text, opcode, tuple(modifiers), operands, guard, negation == "!")


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text[0] != "[":
        return text
    match = re.fullmatch(r"\[\s*([^\s+\]-]+)\s*(?:\+\s*(-?\w+)|(-\w+))?\s*\]", text)
    if match is None:
        raise PtxError(f"address not understood: {text}")
    return Address(match[1], int(match[2] or match[3] or "0", 0))
