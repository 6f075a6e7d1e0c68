"""Checks of gradients of entries that differ in length: packed arrays and dense ones, cu_seqlens and seqused."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from tests.gpu.bwd_cases import dims_of
from tests.gpu.bwd_cases import varlen as varlen_case
from tests.gpu.cases import CAUSAL, OPEN, Lengths
from tests.gpu.covering import covering
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import MODIFIERS
from tests.gpu.inputs import FAMILIES
from tests.gpu.report import MASKS, Report, Scale
from tests.gpu.varlen_checks import padded_entries, padded_lengths, rooms, tile_of_keys, used


def varlen(dut: Dut, key: str, scale: Scale) -> None:
    """cu_seqlens and seqused of q and of k in all combinations × masks; empty entries, entries of one token.

    Rows that do not count are NaN in every input and in dout, and their gradients 0.
    """
    report = Report()
    sides = tuple(product((True, False), (False, True)))  # packed, used
    heads = tuple(scale.groups.values())
    combinations = [(q, k) for q, k in product(sides, sides) if (q, k) != ((False, False), (False, False))]
    masks = (MASKS[1], MASKS[3]) if scale.thin else MASKS
    for seed, (((packed_q, used_q), (packed_k, used_k)), window) in enumerate(product(combinations, masks)):
        q, k = rooms(scale.entries_q, packed_q), rooms(scale.entries_k, packed_k)
        lengths = Lengths(
            q, k, used(q) if used_q else None, used(k[::-1])[::-1] if used_k else None, packed_q, packed_k,
            spare=(0, 37)[seed % 2], told=seed % 3 > 0,
        )  # fmt: skip
        more = {"family": FAMILIES[seed % 3], "seed": seed, "window": window, "dlse": seed % 3 == 2}
        more |= tuple(MODIFIERS.values())[seed % len(MODIFIERS)] | {"deterministic": seed % 4 == 3}
        report.call(dut, varlen_case(key, heads[seed % len(heads)], lengths, dims_of(key, seed), **more))
    report.done()


def varlen_many(dut: Dut, key: str, scale: Scale) -> None:
    """Many short sequences; lengths that end on tiles and beside; far more tiles than there are rows for; no rows."""
    report = Report()
    numbers = random.Random(1)
    count, low, high = scale.short
    short = tuple(numbers.randint(low, high) for _ in range(count // 4))
    other = tuple(numbers.randint(low, high) for _ in range(count // 4))
    room = tuple(n + 7 for n in short)
    tiles = tuple(n + beside for n in scale.bwd_seqlens for beside in (-1, 0, 1))
    batches = {
        "short sequences": Lengths(short, short),
        "short, seqused": Lengths(room, room, short, short),
        "short, other keys": Lengths(short, other),
        "on tiles and beside": Lengths(tiles, tiles[::-1]),
        "few rows in a large array": Lengths((1, *(0,) * 98, 2), (3, *(0,) * 98, 40), spare=1500),
        "nothing used": Lengths((50, 20), (50, 20), (0, 0), (0, 0)),
        "no keys used": Lengths((50, 20), (50, 20), None, (0, 0)),
        "no rows": Lengths((0, 0, 0), (5, 0, 7)),
        "no keys": Lengths((5, 0, 7), (0, 0, 0)),
        "no entries": Lengths((), ()),
    }
    for seed, (lengths, window) in enumerate(product(batches.values(), (OPEN, CAUSAL))):
        more = {"family": FAMILIES[seed % 3], "seed": seed, "window": window, "deterministic": seed % 4 == 3}
        report.call(dut, varlen_case(key, (4, 2), lengths, dims_of(key, seed), **more))
    report.done()


def leftpad(dut: Dut, key: str, scale: Scale) -> None:
    """Padding in front of keys, around every edge, × packed and dense × seqused × masks × modifiers × head ratios.

    Keys of the padding are NaN, so that one that is read shows; their gradients are 0.
    """
    report = Report()
    keys, padding = padded_entries(tile_of_keys(key, scale))
    queries = tuple((scale.near[0], 1, 17, 40)[i % 4] for i in range(len(keys)))
    factors: dict[str, tuple[Any, ...]] = {
        "modifier": tuple(MODIFIERS), "window": MASKS, "family": FAMILIES,
        "heads": (*scale.groups.values(), (8, 1)), "packed_k": (True, False), "used_k": (False, True),
        "packed_q": (True, False), "dlse": (False, True), "deterministic": (False, True),
    }  # fmt: skip
    for seed, case in enumerate(covering(factors)):
        lengths = padded_lengths(queries, keys, padding, *(case.pop(n) for n in ("packed_q", "packed_k", "used_k")))
        more = MODIFIERS[case.pop("modifier")]
        report.call(dut, varlen_case(key, case.pop("heads"), lengths, dims_of(key, seed), seed=seed, **case, **more))
    few = ((3 * max(keys), 40), (2 * max(keys), 9))  # of so few keys, blocks share a group's heads
    for seed, packed in enumerate((True, False)):
        lengths = padded_lengths((scale.near[0], 17), *few, packed, packed, not packed)
        report.call(dut, varlen_case(key, (8, 1), lengths, dims_of(key, seed), seed=seed, window=CAUSAL))
    report.done()
