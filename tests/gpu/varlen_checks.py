"""Checks of entries that differ in length: cu_seqlens, seqused and left padding, packed arrays and dense ones.

Of an op of the backward they are checks of gradients: rows that do not count are NaN in every input and in dout, and
their gradients 0.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from registry.contract import Variant
from tests.gpu.calls import MODIFIERS, dims_of, has_gradients, in_turn, modified
from tests.gpu.calls import varlen as varlen_call
from tests.gpu.dut import Dut
from tests.gpu.harness import both_ways, hold_all, made
from tests.gpu.report import MASKS, Report, Scale
from tests.gpu.run import judged
from tests.support.call import CAUSAL, FAMILIES, OPEN, Call, Numbers, lengths
from tests.support.covering import covering


def varlen(dut: Dut, key: str, scale: Scale) -> None:
    """cu_seqlens and seqused of q and of k in all combinations × masks; empty entries, entries of one token.

    Rows behind the used ones, and behind the last entry, are NaN and stay as they are.
    """
    sides = tuple(product((True, False), (False, True)))  # packed, used
    heads = tuple(scale.groups.values())
    combinations = [(q, k) for q, k in product(sides, sides) if (q, k) != ((False, False), (False, False))]
    masks = (MASKS[1], MASKS[3]) if scale.thin and has_gradients(key) else MASKS
    calls = []
    for seed, (((packed_q, used_q), (packed_k, used_k)), window) in enumerate(product(combinations, masks)):
        q, k = rooms(scale.entries_q, packed_q), rooms(scale.entries_k, packed_k)
        entries = lengths(
            q, k, used(q) if used_q else None, used(k[::-1])[::-1] if used_k else None, packed_q, packed_k,
            spare=(0, 37)[seed % 2], max_seqlen=seed % 3 > 0,
        )  # fmt: skip
        more = {"family": FAMILIES[seed % 3], "window": window} | in_turn(key, seed) | modified(seed)
        calls.append(varlen_call(key, heads[seed % len(heads)], entries, dims_of(key, seed), **more))
    hold_all(dut, calls)


def varlen_many(dut: Dut, key: str, scale: Scale) -> None:
    """Many short sequences; a few long ones, or lengths on tiles and beside; far more tiles launched than there are
    rows for; no rows at all."""
    gradients, numbers = has_gradients(key), random.Random(1)
    count, low, high = scale.short
    count = count // 4 if gradients else count
    short = tuple(numbers.randint(low, high) for _ in range(count))
    other = tuple(numbers.randint(low, high) for _ in range(count))
    rooms = tuple(n + 7 for n in short)
    tiles = tuple(n + beside for n in scale.bwd_seqlens for beside in (-1, 0, 1))
    long = [lengths(scale.long, scale.long), lengths(scale.long, scale.long[::-1])]
    batches = [
        lengths(short, short),
        lengths(rooms, rooms, short, short),
        lengths(short, other),
        *([lengths(tiles, tiles[::-1])] if gradients else long),
        lengths((1, *(0,) * 98, 2), (3, *(0,) * 98, 40), spare=1500),
        lengths((50, 20), (50, 20), (0, 0), (0, 0)),
        lengths((50, 20), (50, 20), None, (0, 0)),
        lengths((0, 0, 0), (5, 0, 7)),
        lengths((5, 0, 7), (0, 0, 0)),
        lengths((), ()),
    ]
    calls = []
    for seed, (entries, window) in enumerate(product(batches, (OPEN, CAUSAL))):
        more = {"family": FAMILIES[seed % 3], "window": window, "seed": seed}
        more |= {"deterministic": seed % 4 == 3} if gradients else {}
        calls.append(varlen_call(key, (4, 2) if gradients else (2, 1), entries, dims_of(key, seed), **more))
    hold_all(dut, calls)


def leftpad(dut: Dut, key: str, scale: Scale) -> None:
    """Padding in front of keys, around every edge, × packed and dense × seqused × masks × modifiers × head ratios, and
    packed heads.

    Keys of the padding are NaN, and so is what a kernel makes of one that it reads; their gradients are 0.
    """
    groups = tuple(scale.groups.values())
    if not has_gradients(key):
        both_ways(dut, key, list(padded_calls(key, scale, heads=groups)))
        return
    calls = padded_calls(key, scale, heads=(*groups, (8, 1)), dlse=(False, True), deterministic=(False, True))
    keys, _ = padded_entries(tile_of_keys(key, scale))
    few = ((3 * max(keys), 40), (2 * max(keys), 9))  # of so few keys, blocks share a group's heads
    for seed, packed in enumerate((True, False)):
        entries = padded_lengths((scale.near[0], 17), *few, packed, packed, not packed)
        calls.append(varlen_call(key, (8, 1), entries, dims_of(key, seed), seed=seed, window=CAUSAL))
    hold_all(dut, calls)


def padded_calls(key: str, scale: Scale, heads: Any, **more: Any) -> list[Call]:
    """Every pair of what such calls can have. more: further factors, by the fields of a call."""
    keys, padding = padded_entries(tile_of_keys(key, scale))
    queries = tuple((scale.near[0], 1, 17, 40)[i % 4] for i in range(len(keys)))
    factors: dict[str, tuple[Any, ...]] = {
        "modifier": tuple(MODIFIERS), "window": MASKS, "family": FAMILIES, "heads": heads,
        "packed_k": (True, False), "used_k": (False, True), "packed_q": (True, False), **more,
    }  # fmt: skip
    calls = []
    for seed, case in enumerate(covering(factors)):
        sides = (case.pop(n) for n in ("packed_q", "packed_k", "used_k"))
        entries, case = padded_lengths(queries, keys, padding, *sides), case | MODIFIERS[case.pop("modifier")]
        calls.append(varlen_call(key, case.pop("heads"), entries, dims_of(key, seed), seed=seed, **case))
    return calls


def tile_of_keys(key: str, scale: Scale) -> int:
    """Of a variant; few where there is none."""
    return 16 if scale.thin else Variant.parse(key).size("n")


def padded_entries(tile: int) -> tuple[Numbers, Numbers]:
    """(keys of each entry, its padding as a call may say it): around the edges of tiles of keys and of the entry."""
    long = 2 * tile + 9
    edges = (0, 1, tile - 1, tile, tile + 1, 2 * tile, long - 1, long, long + 1, 2**31 - 1, -1, -(2**31))
    pairs = [(long, edge) for edge in edges] + [(tile, tile - 1), (1, 0), (1, 1), (0, 3)]
    return tuple(n for n, _ in pairs), tuple(edge for _, edge in pairs)


def padded_lengths(
    q: Numbers, k: Numbers, padding: Numbers, packed_q: bool, packed_k: bool, used_k: bool
) -> dict[str, Any]:
    """With these entries, as far as a dense array has them; behind each there is more room if seqused_k says so."""
    room = tuple(n + 5 * used_k for n in k)
    return lengths(
        rooms(q, packed_q), rooms(room, packed_k), None, k if used_k else None, packed_q, packed_k,
        spare=11 * packed_k, leftpad_k=padding,
    )  # fmt: skip


def unused_rows(dut: Dut, key: str, scale: Scale) -> None:
    """Rows of the output and the LSE that no sequence owns are zeros on request, and where autograd records."""
    report = Report()
    for seed, (packed, records) in enumerate(product((True, False), (False, True))):
        q, k = (rooms(entries, packed) for entries in (scale.entries_q, scale.entries_k))
        call = varlen_call(key, (4, 2), lengths(q, k, used(q), None, packed, packed, 19), seed=seed)
        run = made(call, dut.device)
        given = run.given() | {"zero_unused": not records}
        del given["out"]
        if records:
            given["q"] = given["q"].detach().requires_grad_()
        out, lse = (x.detach() for x in dut.varlen(**given))
        by_row = lse.transpose(-1, -2)
        how = f"{call}, {'autograd records' if records else 'on request'}"
        report.note(how, judged(run.q, out, by_row, run.expected))
        for name, x in (("out", out), ("lse", by_row)):
            nothing = bool((run.q.others(x) == 0).all())
            report.expect(nothing, f"{how}: rows of {name} that nobody owns are not 0")
    report.done()


def rooms(entries: Numbers, packed: bool) -> Numbers:
    return entries if packed else (max(entries),) * len(entries)


def used(rooms: Numbers) -> Numbers:
    """All rows, about half, all but one, none; in turn."""
    return tuple((room, room // 2 + 1, room - 1, 0)[i % 4] if room else 0 for i, room in enumerate(rooms))
