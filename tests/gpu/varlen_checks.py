"""Checks of entries that differ in length: cu_seqlens, seqused and left padding, packed arrays and dense ones."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.cases import CAUSAL, OPEN, Call, Lengths
from tests.gpu.cases import varlen as varlen_case
from tests.gpu.covering import covering
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import MODIFIERS
from tests.gpu.inputs import FAMILIES
from tests.gpu.report import MASKS, Report, Scale
from tests.gpu.yardstick import problems


def varlen(dut: Dut, key: str, scale: Scale) -> None:
    """cu_seqlens and seqused of q and of k in all combinations × masks; empty entries, entries of one token.

    Rows behind the used ones, and behind the last entry, are NaN and stay as they are.
    """
    report = Report()
    sides = tuple(product((True, False), (False, True)))  # packed, used
    heads = tuple(scale.groups.values())
    combinations = [(q, k) for q, k in product(sides, sides) if (q, k) != ((False, False), (False, False))]
    for seed, (((packed_q, used_q), (packed_k, used_k)), window) in enumerate(product(combinations, MASKS)):
        q, k = rooms(scale.entries_q, packed_q), rooms(scale.entries_k, packed_k)
        lengths = Lengths(
            q, k, used(q) if used_q else None, used(k[::-1])[::-1] if used_k else None, packed_q, packed_k,
            spare=(0, 37)[seed % 2], told=seed % 3 > 0,
        )  # fmt: skip
        more = {"family": FAMILIES[seed % 3], "seed": seed, "window": window}
        more |= tuple(MODIFIERS.values())[seed % len(MODIFIERS)]
        report.call(dut, varlen_case(key, heads[seed % len(heads)], lengths, **more))
    report.done()


def varlen_many(dut: Dut, key: str, scale: Scale) -> None:
    """Hundreds of short sequences; a few long ones; far more tiles launched than there are rows for; no rows at all."""
    report = Report()
    numbers = random.Random(1)
    count, low, high = scale.short
    short = tuple(numbers.randint(low, high) for _ in range(count))
    other = tuple(numbers.randint(low, high) for _ in range(count))
    rooms = tuple(n + 7 for n in short)
    batches = {
        "short sequences": Lengths(short, short),
        "short, seqused": Lengths(rooms, rooms, short, short),
        "short, other keys": Lengths(short, other),
        "long sequences": Lengths(scale.long, scale.long),
        "long before short keys": Lengths(scale.long, scale.long[::-1]),
        "few rows in a large array": Lengths((1, *(0,) * 98, 2), (3, *(0,) * 98, 40), spare=1500),
        "nothing used": Lengths((50, 20), (50, 20), (0, 0), (0, 0)),
        "no keys used": Lengths((50, 20), (50, 20), None, (0, 0)),
        "no rows": Lengths((0, 0, 0), (5, 0, 7)),
        "no keys": Lengths((5, 0, 7), (0, 0, 0)),
        "no entries": Lengths((), ()),
    }
    for seed, (lengths, window) in enumerate(product(batches.values(), (OPEN, CAUSAL))):
        report.call(dut, varlen_case(key, (2, 1), lengths, family=FAMILIES[seed % 3], seed=seed, window=window))
    report.done()


def leftpad(dut: Dut, key: str, scale: Scale) -> None:
    """Padding in front of keys, around every edge, × packed and dense × seqused × masks × modifiers × packed heads.

    Keys of the padding are NaN, and so is what a kernel makes of one that it reads.
    """
    keys, padding = padded_entries(tile_of_keys(key, scale))
    queries = tuple((scale.near[0], 1, 17, 40)[i % 4] for i in range(len(keys)))
    factors: dict[str, tuple[Any, ...]] = {
        "modifier": tuple(MODIFIERS), "window": MASKS, "family": FAMILIES, "heads": tuple(scale.groups.values()),
        "packed_k": (True, False), "used_k": (False, True), "packed_q": (True, False),
    }  # fmt: skip
    report, cases = Report(), []
    for seed, case in enumerate(covering(factors)):
        lengths = padded_lengths(queries, keys, padding, *(case.pop(n) for n in ("packed_q", "packed_k", "used_k")))
        more = MODIFIERS[case.pop("modifier")]
        cases.append(varlen_case(key, case.pop("heads"), lengths, seed=seed, **case, **more))
    try:
        for pack in (False, True):
            dut.force(key, pack)
            for case in cases[pack::2]:
                report.call(dut, case, "heads packed, " * pack)
    finally:
        dut.force(key)
    report.done()


def tile_of_keys(key: str, scale: Scale) -> int:
    """Of a variant; few where there is none."""
    return 16 if scale.thin else Variant.parse(key).size("n")


def padded_entries(tile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(keys of each entry, its padding as a call may say it): around the edges of tiles of keys and of the entry."""
    long = 2 * tile + 9
    edges = (0, 1, tile - 1, tile, tile + 1, 2 * tile, long - 1, long, long + 1, 2**31 - 1, -1, -(2**31))
    pairs = [(long, edge) for edge in edges] + [(tile, tile - 1), (1, 0), (1, 1), (0, 3)]
    return tuple(n for n, _ in pairs), tuple(edge for _, edge in pairs)


def padded_lengths(
    q: tuple[int, ...], k: tuple[int, ...], padding: tuple[int, ...], packed_q: bool, packed_k: bool, used_k: bool
) -> Lengths:
    """With these entries, as far as a dense array has them; behind each there is more room if seqused_k says so."""
    room = tuple(n + 5 * used_k for n in k)
    return Lengths(
        rooms(q, packed_q), rooms(room, packed_k), None, k if used_k else None, packed_q, packed_k,
        spare=11 * packed_k, leftpad=padding,
    )  # fmt: skip


def unused_rows(dut: Dut, key: str, scale: Scale) -> None:
    """Rows of the output and the LSE that no sequence owns are zeros on request, and where autograd records."""
    report = Report()
    for seed, (packed, records) in enumerate(product((True, False), (False, True))):
        q, k = (rooms(entries, packed) for entries in (scale.entries_q, scale.entries_k))
        call = Call(varlen_case(key, (4, 2), Lengths(q, k, used(q), None, packed, packed, 19), seed=seed), dut.device)
        given = {**call.tensors, **call.options, "return_lse": True, "zero_unused": not records}
        del given["out"]
        if records:
            given["q"] = given["q"].detach().requires_grad_()
        out, lse = (x.detach() for x in dut.varlen(**given))
        by_row = lse.transpose(-1, -2)
        how = f"{call.case}, {'autograd records' if records else 'on request'}"
        report.note(how, problems(call.q.gather(out), call.q.gather(by_row).transpose(1, 2), call.expected))
        for name, x in (("out", out), ("lse", by_row)):
            rest = torch.ones(x.shape[: 1 if packed else 2], dtype=torch.bool, device=x.device)
            rest[call.q.device] = False
            report.expect(bool((x[rest] == 0).all()), f"{how}: rows of {name} that nobody owns are not 0")
    report.done()


def rooms(entries: tuple[int, ...], packed: bool) -> tuple[int, ...]:
    return entries if packed else (max(entries),) * len(entries)


def used(rooms: tuple[int, ...]) -> tuple[int, ...]:
    """All rows, about half, all but one, none; in turn."""
    return tuple((room, room // 2 + 1, room - 1, 0)[i % 4] if room else 0 for i, room in enumerate(rooms))
