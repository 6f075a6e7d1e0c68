"""As test_planted_faults, for the backward: would its checks notice?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

import pytest

from registry.contract import Variant
from tests.kernels import faults
from tests.kernels.backward import Trio, problems, run
from tests.kernels.backward_cases import dense, skeletons, varlen
from tests.kernels.cases import of
from tests.kernels.faults import Fault
from tests.kernels.launch import Compiled
from tests.ptx.interpreter import Kernel, PtxError
from tests.ptx.parser import Address, Instruction
from tests.support.abis import BWD
from tests.support.call import Call

SKELETONS = skeletons()
SMALLEST = min(SKELETONS, key=lambda v: (v.head_dim, v.size("m")))  # for what is not about a tile
UNIT_BYTES = 4 * 16 * 8


def probes(variant: Variant) -> list[Call]:
    """Small calls that between them have several tiles of queries and keys, heads in a loop, ragged ends, and turns."""
    m, n = variant.size("m"), variant.size("n")
    return [
        dense(2 * m + 5, n, 1, 1),
        dense(m + 5, n + 5, 2, 1, window=(None, 0), head_dim=8, head_dim_v=8),
        dense(m + 5, 2 * n, 1, 1, deterministic=True),
        dense(2 * m + 5, n + 7, 2, 1, alibi="heads", dalibi=True, splits=2),
        dense(m // 2, 2 * n + 9, 1, 1, window=(3, 0)),  # keys that no query sees: nothing but K and V is loaded
    ]


def ragged(variant: Variant) -> list[Call]:
    """Calls that bring every thread to the edge of its rows, keys and columns; two heads, for a second load of each."""
    m, n, most = variant.size("m"), variant.size("n"), max(variant.head_dim, variant.head_dim_v)
    rows = [
        dense(q, k, 2, 1, window=window)
        for q, k, window in ((5, 3, (None, None)), (m - 11, n - 13, (None, 0)), (m + 21, n + 19, (n // 2 + 3, 9)))
    ]
    columns = [
        dense(m, n, 2, 1, head_dim=min(dim, variant.head_dim), head_dim_v=min(dim, variant.head_dim_v))
        for dim in range(8, most, 32)  # one in each panel
    ]
    return [*rows, *columns, varlen((m, 0, 9), (n + 9, 5, 3))]


def edges(variant: Variant) -> list[Call]:
    """Both edges of a mask along diagonals that bring each of a thread's scores to it, and partial sums that end at any
    row and column. Logits far below 0 beside keys that do not exist: in fp16 a score of theirs would be infinite."""
    m, n = variant.size("m"), variant.size("n")
    most = max(variant.head_dim, variant.head_dim_v)
    starts = [*range(0, n, m), *range(-n, -m, -n)]
    diagonals = [m - n + start + by for start in starts for by in (-16, -8, 8, 16)]
    windows = [window for d in diagonals for window in ((-d, None), (None, d))]
    return [
        *[
            dense(m, n, 1, 1, window=window, alibi="heads", dalibi=True, head_dim=8, head_dim_v=8)
            for window in windows
        ],
        *[
            dense(m + 5, n - less, 1, 1, family="far_below", alibi="heads", dalibi=True)
            for less in (8, 13, 72, 77)
            if less < n
        ],
        *[
            dense(5, n + k + 1, 2, 1, splits=2, head_dim=min(dim, variant.head_dim),
                     head_dim_v=min(dim, variant.head_dim_v))
            for k, dim in enumerate(range(8, most, 16))
        ],
    ]  # fmt: skip


def caught(
    trio: Trio, cases: Iterable[Call], kernel: Kernel | None = None, changed: dict[str, int] | None = None
) -> str:
    """What gave the fault away, or '' if nothing did."""
    variant = trio.main.variant
    return faults.caught(cases, lambda case: problems(run(trio, case, kernel, changed), case, variant))


def survivors(trio: Trio, found: list[Fault], cases: list[Call]) -> list[Fault]:
    """The faults that nothing caught."""
    return faults.survivors(found, lambda kernel: caught(trio, cases, kernel))


def left_of(kernel: faults.Switchable, trio: Trio, cases: list[Call]) -> list[str]:
    """The places of a kernel where no case catches a change."""
    every = dict.fromkeys(cases, range(len(kernel.places)))
    return [kernel.text(number) for number in kernel.survivors(every, lambda case: caught(trio, [case], kernel))]


@of(SKELETONS)
def test_the_sound_kernel_passes(variant: Variant, variant_of: Callable[[str], Compiled]):
    assert caught(Trio.of(variant, variant_of), probes(variant) + ragged(variant)) == ""


@of(SKELETONS)
def test_dropped_barriers(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Each is needed, but for one behind another and, where V is in registers, one behind that of its load."""
    trio = Trio.of(variant, variant_of)
    found = faults.dropped_barriers(trio.main.ptx)
    assert len(found) >= 4
    assert len(survivors(trio, found, probes(variant))) <= 1 + (variant.size("r") > 0)


@of(SKELETONS)
def test_weakened_waits(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Each is needed, but for the last where V is in registers: K and V have been waited for before."""
    trio = Trio.of(variant, variant_of)
    found = faults.weakened_waits(trio.main.ptx)
    assert len(found) >= 2
    left = survivors(trio, found, probes(variant))
    assert left == (found[-1:] if variant.size("r") else [])


def unbounded(instruction: Instruction) -> Instruction | None:
    """As `faults.unbounded`, but for copies that are whole by a constant: those of workspaces, which have all rows."""
    changed = faults.unbounded(instruction)
    return changed if changed and instruction.register(3).startswith("%") else None


@of(SKELETONS)
def test_unbounded_copies(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Rows past a sequence's end and columns past head_dim are never read, by any thread."""
    trio = Trio.of(variant, variant_of)
    kernel = faults.Switchable(trio.main.ptx, unbounded)
    assert len(kernel.places) >= 8
    assert left_of(kernel, trio, ragged(variant)) == []


@of([SMALLEST.replace(dtype="fp16")])
def test_shifted_bounds(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Whatever can make a difference in these calls, because its two sides are equal at times, is caught."""
    trio = Trio.of(variant, variant_of)
    kernel = faults.Switchable(trio.main.ptx, faults.shifted)
    steps, equal = {}, {}
    for case in ragged(variant) + probes(variant) + edges(variant):
        steps[case], equal[case] = run(trio, case, kernel).steps, set(kernel.equal)
    slow: list[str] = []
    wrong: list[str] = []
    for number in kernel.survivors(equal, lambda case: caught(trio, [case], kernel)):
        kernel.on = number
        wasteful = any(run(trio, case, kernel).steps > steps[case] for case in steps if number in equal[case])
        (slow if wasteful else wrong).append(kernel.text(number))
    # Two of `place`, which leaves out blocks that have nothing to do; the others are at one score of a chunk of rows.
    assert len(wrong) <= 5, wrong
    assert len(slow) <= 5, f"bounds that only save work: {slow}"
    reached = set().union(*equal.values())
    assert len(reached) >= 0.8 * len(kernel.places), "bounds that nothing reaches: remove them, or probe them"


def unclamped(instruction: Instruction) -> Instruction | None:
    """A minimum or maximum that gives its first operand, whatever the second."""
    if instruction.opcode not in ("min", "max") or instruction.type != "s32":
        return None
    return replace(instruction, operands=(*instruction.operands[:2], instruction.operands[1]))


@of([SMALLEST])
def test_dropped_clamps_of_left_padding(variant: Variant, variant_of: Callable[[str], Compiled]):
    """That at 0 matters where what is said lies outside an entry, and only there. Without the other one an entry has
    fewer keys than none, and no block for them either."""
    trio = Trio.of(variant, variant_of)
    kernel = faults.Switchable(trio.main.ptx, unclamped)
    plain = dense(20, 50, 1, 1, batch=2, head_dim=8, head_dim_v=8, leftpad_k=(0, 33), seqused_k=(50, 33))
    packed = varlen((20, 20), (40, 50), heads_q=2, head_dim=8, head_dim_v=8, leftpad_k=(0, 50), window=(None, 0))
    inside = [plain, packed, packed.but(leftpad_k=(40, 0))]
    outside = [case.but(leftpad_k=tuple(p + 31 if p else -9 for p in case.leftpad_k)) for case in inside]
    needed = []
    for number in range(len(kernel.places)):
        kernel.on = number
        if caught(trio, outside, kernel) and not caught(trio, inside, kernel):
            needed.append(kernel.text(number))
    assert [text.split()[1].split(".")[0] for text in needed] == ["max"]


def is_addition(instruction: Instruction) -> bool:
    return instruction.opcode == "red" and instruction.type == "f32"


def moved(by: int) -> Callable[[Instruction], Instruction | None]:
    """Additions go to the place that lies so many bytes behind."""

    def change(instruction: Instruction) -> Instruction | None:
        if not is_addition(instruction):
            return None
        to = instruction.address(0)
        return replace(instruction, operands=(Address(to.base, to.offset + by), *instruction.operands[1:]))

    return change


def swapped(instruction: Instruction) -> Instruction | None:
    """An addition whose second and third elements have changed places."""
    if not is_addition(instruction):
        return None
    a, b, c, d = instruction.vector(1)
    return replace(instruction, operands=(instruction.operands[0], (a, c, b, d)))


@of(SKELETONS)
@pytest.mark.parametrize("change", [moved(UNIT_BYTES), moved(16), swapped], ids=["unit", "lane", "elements"])
def test_additions_that_go_elsewhere(change, variant: Variant, variant_of: Callable[[str], Compiled]):
    """To a neighbour's unit, a neighbour's lane, or in another order: each is told by dQ."""
    trio, m, n = Trio.of(variant, variant_of), variant.size("m"), variant.size("n")
    kernel = faults.Switchable(trio.main.ptx, change)
    assert len(kernel.places) >= 4
    assert left_of(kernel, trio, [dense(m, min(n, 16), 1, 1, window=(None, None))]) == []


def turn_faults(ptx: str) -> list[Fault]:
    """Turns that are not passed on, passed on twice, or not waited for."""
    release = r"\bred(\.\w+)*\.release(\.\w+)*\s+\[[^\]]*\], 1;"
    return [
        *faults.planted(ptx, release, lambda _: ""),
        *faults.planted(ptx, release, lambda match: match[0].replace(", 1;", ", 2;")),
        *faults.planted(ptx, r"\bld\.acquire[.\w]*\s+(%r\d+), \[[^\]]*\];", lambda match: f"mov.b32 {match[1]}, 99;"),
    ]


def turns_caught(trio: Trio, case: Call, kernel: Kernel | None = None) -> str:
    """What gave a fault of turns away: the call as it is, a count that is not that of the tiles of keys, or a tile that
    does not wait for those before it. case: of 3 tiles, which all see every query."""
    try:
        outcome = run(trio, case, kernel)
    except PtxError as error:
        return str(error)
    if set(outcome.turns.tolist()) != {0, 3}:
        return f"semaphores hold {set(outcome.turns.tolist())}"
    for order in ((1, 0, 2), (0, 2, 1), (2,)):
        try:
            run(trio, case, kernel, order=order)
        except PtxError as error:
            if "waits for ever" in str(error):
                continue
        return f"in the order {order} nothing waits"
    return "; ".join(problems(outcome, case, trio.main.variant))


@of(SKELETONS)
def test_turns(variant: Variant, variant_of: Callable[[str], Compiled]):
    trio, m, n = Trio.of(variant, variant_of), variant.size("m"), variant.size("n")
    case = dense(m + 5, 3 * n, 1, 1, deterministic=True, head_dim=8, head_dim_v=8)
    assert turns_caught(trio, case) == ""
    found = turn_faults(trio.main.ptx)
    assert len(found) >= 3
    assert faults.survivors(found, lambda kernel: turns_caught(trio, case, kernel)) == []


@lru_cache(maxsize=1)
def false_parameters() -> list[tuple[str, Call, dict[str, int]]]:
    """Every parameter of the ABI that a call uses, with another value than its own."""
    call = dense(37, 75, 4, 2, window=(20, 5), batch=2, head_dim=40, head_dim_v=40)
    scored = call.but(softcap=5.0, alibi="batch", dalibi=True)
    packed = varlen((20, 17), (40, 35), heads_q=2)
    return [
        ("key-beyond", call, {"seqlen_k": 76}),
        ("key-missing", call, {"seqlen_k": 74}),
        ("row-beyond", call, {"seqlen_q": 38}),
        ("row-missing", call, {"seqlen_q": 36}),
        ("right-bound", call, {"window_right": 6}),
        ("left-bound", call, {"window_left": 19}),
        ("column-beyond", call, {"head_dim": 48}),
        ("column-missing", call, {"head_dim": 32}),
        ("column-beyond-of-v", call, {"head_dim_v": 48}),
        ("column-missing-of-v", call, {"head_dim_v": 32}),
        ("group", call, {"heads_kv": 1}),
        ("entries", call, {"batch": 1}),
        ("rows", call, {"rows": 128}),
        ("scale", call, {"scale_log2": 1}),
        ("scale-of-dk", call, {"softmax_scale": 1}),
        ("softcap", scored, {"softcap_scale": 0}),
        ("alibi", scored, {"alibi_slopes": 0}),
        ("alibi-of-each-entry", scored, {"alibi_stride_b": 0}),
        ("dalibi", scored, {"dalibi": 0}),
        ("partials", call.but(splits=2), {"splits": 1}),
        ("no-partials", call.but(splits=2), {"dk_partial": 0}),
        ("used-keys", call.but(seqused_k=(70, 9)), {"seqused_k": 0}),
        ("left-padding", call.but(leftpad_k=(9, 30)), {"leftpad_k": 0}),
        ("used-rows", call.but(seqused_q=(30, 9)), {"seqused_q": 0}),
        ("packed-keys", packed, {"cu_seqlens_k": 0}),
        ("packed-rows", packed, {"cu_seqlens_q": 0}),
        *[(p.name, call, {p.name: 24}) for p in BWD.params if re.fullmatch(r"[a-z]+_stride_[bsh]", p.name)
          and p.name != "alibi_stride_b"],
        ("split-of-dk", call.but(splits=2), {"dk_partial_stride_split": 16}),
        ("split-of-dv", call.but(splits=2), {"dv_partial_stride_split": 16}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "changed"), [row[1:] for row in false_parameters()], ids=[row[0] for row in false_parameters()]
)
def test_false_parameters(case: Call, changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    trio = Trio.of(SMALLEST, variant_of)
    assert caught(trio, [case]) == ""
    assert caught(trio, [case], changed=changed) != ""
