"""Checks of what a call can ask for besides its lengths: smaller head dimensions, changed scores, packed heads."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import torch

from registry.contract import CubineryError, Variant
from tests.gpu.cases import CAUSAL, OPEN, Case, Lengths, shape_of, varlen
from tests.gpu.covering import covering
from tests.gpu.dut import Dut
from tests.gpu.inputs import DTYPES, FAMILIES
from tests.gpu.report import MASKS, Report, Scale

MODIFIERS: dict[str, dict[str, Any]] = {
    "none": {},
    "softcap": {"softcap": 15.0},
    "sink": {"sink": "fp32"},
    "low sink": {"sink": "low"},
    "slopes": {"alibi": "heads"},
    "slopes by entry": {"alibi": "batch"},
    "all": {"softcap": 50.0, "sink": "fp32", "alibi": "batch"},
}


def head_dims(dut: Dut, key: str, scale: Scale) -> None:
    """Every smaller multiple of 8 of head_dim and of head_dim_v, either the larger; NaN beside the columns."""
    report = Report()
    variant = Variant.parse(key)
    full, full_v = variant.head_dim, variant.head_dim_v
    sides, sides_v = list(range(8, full + 1, 8)), list(range(8, full_v + 1, 8))
    steps = range(0, max(len(sides), len(sides_v)), 3 if scale.thin else 1)
    pairs = [(sides[i % len(sides)], sides_v[(5 * i + 2) % len(sides_v)]) for i in steps]  # 5 meets every residue
    pairs += [(8, full_v), (full, 8), (8, 8), (full - 8, full_v), (full, full_v - 8), (full - 8, full_v - 8)]
    for seed, dims in enumerate(pairs):
        lengths = scale.near if seed % 2 else scale.ragged
        shape = shape_of(key, None, (4, 2), *lengths, dims)
        report.call(dut, Case(shape, FAMILIES[seed % 3], seed, MASKS[seed % len(MASKS)]))
    wide = torch.zeros(1, 16, 2, max(full, full_v), dtype=DTYPES[variant.dtype], device=dut.device)
    for name, dims in {"head_dim": (full - 4, full_v), "head_dim_v": (full, full_v - 4)}.items():
        narrow, narrow_v = (wide[..., :dim] for dim in dims)
        report.expect(_refused(dut, narrow, narrow, narrow_v), f"{name} {dims}: no multiple of 8, but accepted")
    report.done()


def _refused(dut: Dut, *tensors: torch.Tensor) -> bool:
    try:
        dut.attn(*tensors)
    except CubineryError:
        return True
    return False


def score_mods(dut: Dut, key: str, scale: Scale) -> None:
    """Softcap × sink (fp32, low precision) × ALiBi (per head, per entry) × masks × head ratios."""
    factors: dict[str, tuple[Any, ...]] = {
        "softcap": (0.0, 15.0),
        "sink": ("", "fp32", "low"),
        "alibi": ("", "heads", "batch"),
        "window": MASKS,
        "group": tuple(scale.groups)[:3],
    }
    cases = [dict(zip(factors, combination, strict=True)) for combination in product(*factors.values())]
    cases = covering({**factors, "longer": (False, True)}) if scale.thin else cases
    report = Report()
    for seed, case in enumerate(cases):
        longer = case.pop("longer", seed % 5 == 0)
        case["softcap"] *= 1 if seed % 2 else 50 / 15
        shape = shape_of(key, None, scale.groups[case.pop("group")], *(scale.ragged if longer else scale.near))
        report.call(dut, Case(shape, FAMILIES[seed // 3 % 3], seed, **case))
    report.done()


def pack_gqa(dut: Dut, key: str, scale: Scale) -> None:
    """Packed heads: every ratio, also those that do not divide a tile, with every mask and modifier; varlen too."""
    factors = {"ratio": scale.ratios, "modifier": tuple(MODIFIERS), "lengths": scale.decode, "window": MASKS}
    report = Report()
    dut.force(key, pack=True)
    try:
        for seed, case in enumerate(covering({**factors, "family": FAMILIES})):
            shape = shape_of(key, None, case["ratio"], *case["lengths"])
            more = MODIFIERS[case["modifier"]]
            report.call(dut, Case(shape, case["family"], seed, case["window"], **more))
        lengths = Lengths(scale.entries_q, scale.entries_k, used_k=tuple(n // 2 for n in scale.entries_k), spare=19)
        for seed, (ratio, window) in enumerate(product(scale.ratios, (OPEN, CAUSAL))):
            more = tuple(MODIFIERS.values())[seed % len(MODIFIERS)]
            report.call(dut, varlen(key, ratio, lengths, family=FAMILIES[seed % 3], seed=seed, window=window, **more))
    finally:
        dut.force(key)
    report.done()


def drawn(dut: Dut, key: str, scale: Scale) -> None:
    """Everything at once, drawn at random: the same draws for a variant each time; a failure prints its case."""
    report = Report()
    numbers = random.Random(key)
    cases = [draw(numbers, key, scale) for _ in range(scale.draws)]
    try:
        for pack in (False, True):
            dut.force(key, pack)
            for case in cases[pack::2]:
                report.call(dut, case, "heads packed, " * pack)
    finally:
        dut.force(key)
    report.done()


def draw(numbers: random.Random, key: str, scale: Scale) -> Case:
    """A case with anything in it that the forward takes."""
    variant, pick = Variant.parse(key), numbers.choice
    heads_kv, group = numbers.randint(1, 3), pick((1, 2, 3, 4, 5, 6, 7, 8, 16))
    dims = tuple(pick((dim, 8 * numbers.randint(1, dim // 8))) for dim in (variant.head_dim, variant.head_dim_v))
    more: dict[str, Any] = {
        "family": pick(FAMILIES),
        "seed": numbers.randrange(2**20),
        "window": pick((OPEN, CAUSAL, (_side(numbers, scale), _side(numbers, scale)))),
        # Not much above the default: a sharper softmax leaves an RMS to the few rows in which two keys compete.
        "softmax_scale": pick((None, None, dims[0] ** -0.5 * 10 ** numbers.uniform(-1, 0.2))),
        **pick(tuple(MODIFIERS.values())),
    }
    heads = (heads_kv * group, heads_kv)
    if numbers.random() < 0.4:
        longest = (_length(numbers, scale), _length(numbers, scale))
        return Case(shape_of(key, pick((None, 1, 3)), heads, *longest, dims), **more)
    return varlen(key, heads, _lengths(numbers, scale), dims, **more)


def _lengths(numbers: random.Random, scale: Scale) -> Lengths:
    batch, packed, used = numbers.randint(1, 6), [True, True], [False, False]
    while any(packed) and numbers.random() < 0.4:
        packed[numbers.randrange(2)] = False
    if not any(packed):
        used[numbers.randrange(2)] = True  # else it would be a dense call
    sides = []
    for i in range(2):
        used[i] = used[i] or numbers.random() < 0.4
        rooms = tuple(_length(numbers, scale) for _ in range(batch))
        rooms = rooms if packed[i] else (max(rooms),) * batch
        sides.append((rooms, tuple(numbers.randint(0, room) for room in rooms) if used[i] else None))
    (q, used_q), (k, used_k) = sides
    return Lengths(q, k, used_q, used_k, *packed, numbers.choice((0, 0, 1, 200)), numbers.random() < 0.5)


def _length(numbers: random.Random, scale: Scale) -> int:
    """As often from 1 to 10 as from 10 to 100; 0 at times."""
    return 0 if numbers.random() < 0.05 else round(scale.longest ** numbers.random())


def _side(numbers: random.Random, scale: Scale) -> int | None:
    return numbers.choice((None, 0, _length(numbers, scale)))
