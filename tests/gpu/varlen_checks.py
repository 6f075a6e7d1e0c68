"""Checks of entries that differ in length: cu_seqlens and seqused, packed arrays and dense ones."""

from __future__ import annotations

import random
from itertools import product

from tests.gpu.cases import CAUSAL, OPEN, Lengths
from tests.gpu.cases import varlen as varlen_case
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import MODIFIERS
from tests.gpu.inputs import FAMILIES
from tests.gpu.report import MASKS, Report, Scale


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


def rooms(entries: tuple[int, ...], packed: bool) -> tuple[int, ...]:
    return entries if packed else (max(entries),) * len(entries)


def used(rooms: tuple[int, ...]) -> tuple[int, ...]:
    """All rows, about half, all but one, none; in turn."""
    return tuple((room, room // 2 + 1, room - 1, 0)[i % 4] if room else 0 for i, room in enumerate(rooms))
