"""mma.sync, several at a time: neighbours that do not need each other's results become a few matrix products.

The fragments need no index tables. Lane 4g + q of a warp holds, in each 32-bit register of A, B or C, neighbouring
elements of row (for B: column) g, so that the 32 lanes of one register are an 8-row block in row-major order:
reading a register as (8, 4, elements) is reading the matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.formats import Array, bf16_to_f32, e4m3_to_f32, f16_to_f32
from tests.ptx.machine import Machine, Mask, Step, nothing
from tests.ptx.movement import whole_warps
from tests.ptx.parser import Instruction, Program, PtxError

# (shape, input type) -> (blocks along k, element type in memory, its conversion to fp32)
SHAPES: dict[tuple[str, str], tuple[int, type, Callable[[Array], Array]]] = {
    ("m16n8k16", "bf16"): (2, np.uint16, bf16_to_f32),
    ("m16n8k16", "f16"): (2, np.uint16, f16_to_f32),
    ("m16n8k8", "bf16"): (1, np.uint16, bf16_to_f32),
    ("m16n8k8", "f16"): (1, np.uint16, f16_to_f32),
    ("m16n8k32", "e4m3"): (2, np.uint8, e4m3_to_f32),
}


@dataclass(frozen=True)
class Mma:
    """One mma.sync: its format and the names of its registers."""

    format: tuple[str, str]
    d: tuple[str, ...]
    a: tuple[str, ...]
    b: tuple[str, ...]
    c: tuple[str, ...]


def decoded(i: Instruction) -> Mma:
    shape = next((m for m in i.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    layout = i.has("row") and i.has("col") and i.types[0] == "f32" == i.type
    if not layout or (shape, i.types[1]) not in SHAPES or i.types[1] != i.types[2]:
        raise PtxError(f"mma not known: {i.text}")
    return Mma((shape, i.types[1]), *(i.vector(j) for j in range(4)))


def mma(m: Machine, i: Instruction) -> Step:
    """A single mma.sync."""
    return product_step(m, [decoded(i)])


def grouped_mma(m: Machine, labels: set[int]) -> dict[int, Step]:
    """Steps for runs of mma.sync: the first of a run does the work of all, the others do nothing."""
    steps: dict[int, Step] = {}
    for first, run in runs(m.program, labels):
        steps |= dict.fromkeys(range(first + 1, first + len(run)), nothing)
        steps[first] = all_of([product_step(m, part) for part in rectangles(run)])
    return steps


def all_of(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]

    def run(mask: Mask) -> None:
        for step in steps:
            step(mask)

    return run


def runs(program: Program, labels: set[int]) -> list[tuple[int, list[Mma]]]:
    """(index, run): unguarded mma.sync in a row, of one format, none of which reads or rewrites another's result."""
    found: list[tuple[int, list[Mma]]] = []
    written: set[str] = set()
    for pc, i in enumerate(program.code):
        if i.opcode != "mma" or i.guard is not None:
            continue
        one = decoded(i)
        start, run = found[-1] if found else (0, [])
        follows = bool(run) and start + len(run) == pc and pc not in labels and run[0].format == one.format
        if follows and not written & {*one.a, *one.b, *one.c, *one.d}:
            run.append(one)
            written |= set(one.d)
        else:
            found.append((pc, [one]))
            written = set(one.d)
    return found


def rectangles(run: list[Mma]) -> list[list[Mma]]:
    """Split a run so that each part multiplies each of its A fragments with the same list of B fragments.

    A part must not write what a later part reads; where it would, every mma is a part of its own.
    """
    by_a: dict[tuple[str, ...], list[Mma]] = {}
    for one in run:
        by_a.setdefault(one.a, []).append(one)
    columns = [[one.b for one in part] for part in by_a.values()]
    if all(column == columns[0] for column in columns):
        return [[one for part in by_a.values() for one in part]]
    parts = list(by_a.values())
    later = [{name for part in parts[j + 1 :] for one in part for name in (*one.a, *one.b, *one.c)}
             for j in range(len(parts))]  # fmt: skip
    if any(names & set(one.d) for part, names in zip(parts, later, strict=True) for one in part):
        return [[one] for one in run]
    return parts


def product_step(m: Machine, part: list[Mma]) -> Step:
    """D = A·B + C for all pairs of the part's A and B fragments; `part` is ordered by A, then B."""
    depth, element, to_f32 = SHAPES[part[0].format]
    fragments_a = list(dict.fromkeys(one.a for one in part))
    fragments_b = [one.b for one in part[: len(part) // len(fragments_a)]]
    if any(len(a) != 2 * depth for a in fragments_a) or any(len(b) != depth for b in fragments_b):
        raise PtxError("mma with the wrong number of registers")
    bank = m.banks[False, 4]
    floats = bank.view(np.float32)
    rows_a, rows_b = register_rows(m, fragments_a), register_rows(m, fragments_b)
    rows_c, rows_d = register_rows(m, [one.c for one in part]), register_rows(m, [one.d for one in part])
    count_a, count_b, warps = len(fragments_a), len(fragments_b), m.lanes // 32
    width = depth * 4 * (4 // np.dtype(element).itemsize)  # k of one product

    def step(mask: Mask) -> None:
        lanes = whole_warps(mask, "mma.sync")
        # (A, k block, row block, warp, row, k) -> (A, warp, row block, row, k block, k)
        a = to_f32(bank[rows_a].view(element)).reshape(count_a, depth, 2, warps, 8, -1).transpose(0, 3, 2, 4, 1, 5)
        # (B, k block, warp, column, k) -> (warp, k block, k, B, column)
        b = to_f32(bank[rows_b].view(element)).reshape(count_b, depth, warps, 8, -1).transpose(2, 1, 4, 0, 3)
        product = a.reshape(count_a, warps, 16, width) @ b.reshape(warps, width, 8 * count_b)
        # (A, warp, row block, row, B, column pair, column) -> (A, B, row block, column, warp, row, column pair)
        d = product.reshape(count_a, warps, 2, 8, count_b, 4, 2).transpose(0, 4, 2, 6, 1, 3, 5)
        result = d.reshape(rows_d.size, m.lanes) + floats[rows_c.reshape(-1)]
        if mask is True:
            floats[rows_d.reshape(-1)] = result
        else:
            floats[rows_d.reshape(-1)[:, None], lanes] = result[:, lanes]

    return step


def register_rows(m: Machine, fragments: list[tuple[str, ...]]) -> Array:
    """Rows in the bank of 32-bit registers, (fragments, registers of each)."""
    rows = []
    for fragment in fragments:
        for name in fragment:
            if m.row(name)[0] != 4:
                raise PtxError(f"mma with {name}, which is not of 32 bits")
        rows.append([m.row(name)[1] for name in fragment])
    return np.array(rows)
