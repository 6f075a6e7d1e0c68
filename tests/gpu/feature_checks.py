"""Checks of what a call can ask for besides its lengths: smaller head dimensions, changed scores, packed heads."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.calls import MODIFIERS, dense, modified, varlen
from tests.gpu.dut import Dut
from tests.gpu.harness import both_ways, forced, hold, hold_all, refused
from tests.gpu.inputs import DTYPES
from tests.gpu.report import MASKS, Report, Scale
from tests.support.call import CAUSAL, FAMILIES, OPEN, Call, Dims, lengths
from tests.support.covering import covering


def head_dims(dut: Dut, key: str, scale: Scale) -> None:
    """Every smaller multiple of 8 of head_dim and of head_dim_v, either the larger; NaN beside the columns."""
    report = Report()
    variant = Variant.parse(key)
    full, full_v = variant.head_dim, variant.head_dim_v
    pairs = [*smaller_dims(key, scale), (8, 8), (full - 8, full_v), (full, full_v - 8), (full - 8, full_v - 8)]
    for seed, dims in enumerate(pairs):
        more = {"family": FAMILIES[seed % 3], "seed": seed, "window": MASKS[seed % len(MASKS)]}
        hold(report, dut, dense(key, None, (4, 2), scale.near if seed % 2 else scale.ragged, dims, **more))
    wide = torch.zeros(1, 16, 2, max(full, full_v), dtype=DTYPES[variant.dtype], device=dut.device)
    for name, dims in {"head_dim": (full - 4, full_v), "head_dim_v": (full, full_v - 4)}.items():
        narrow, narrow_v = (wide[..., :dim] for dim in dims)
        served = not refused(partial(dut.attn, narrow, narrow, narrow_v))
        report.expect(not served, f"{name} {dims}: no multiple of 8, but accepted")
    report.done()


def smaller_dims(key: str, scale: Scale, step: int = 8) -> list[Dims]:
    """Every smaller multiple of a step of head_dim and of head_dim_v, and each at its smallest beside the other."""
    variant = Variant.parse(key)
    full, full_v = variant.head_dim, variant.head_dim_v
    sides, sides_v = list(range(step, full + 1, step)), list(range(step, full_v + 1, step))
    steps = range(0, max(len(sides), len(sides_v)), 3 if scale.thin else 1)
    pairs = [(sides[i % len(sides)], sides_v[(5 * i + 2) % len(sides_v)]) for i in steps]  # 5 meets every residue
    return [*pairs, (step, full_v), (full, step)]


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
    calls = []
    for seed, case in enumerate(cases):
        seqlens = scale.ragged if case.pop("longer", seed % 5 == 0) else scale.near
        case["softcap"] *= 1 if seed % 2 else 50 / 15
        more = {"family": FAMILIES[seed // 3 % 3], "seed": seed, **case}
        calls.append(dense(key, None, scale.groups[more.pop("group")], seqlens, **more))
    hold_all(dut, calls)


def pack_gqa(dut: Dut, key: str, scale: Scale) -> None:
    """Packed heads: every ratio, also those that do not divide a tile, with every mask and modifier; varlen too."""
    factors = {"ratio": scale.ratios, "modifier": tuple(MODIFIERS), "lengths": scale.decode, "window": MASKS}
    calls = []
    for seed, case in enumerate(covering({**factors, "family": FAMILIES})):
        more = {"family": case["family"], "seed": seed, "window": case["window"], **MODIFIERS[case["modifier"]]}
        calls.append(dense(key, None, case["ratio"], case["lengths"], **more))
    entries = lengths(scale.entries_q, scale.entries_k, used_k=tuple(n // 2 for n in scale.entries_k), spare=19)
    for seed, (ratio, window) in enumerate(product(scale.ratios, (OPEN, CAUSAL))):
        more = {"family": FAMILIES[seed % 3], "seed": seed, "window": window, **modified(seed)}
        calls.append(varlen(key, ratio, entries, **more))
    with forced(dut, key):
        dut.force(key, pack=True)
        hold_all(dut, calls)


def drawn(dut: Dut, key: str, scale: Scale) -> None:
    """Everything at once, drawn at random: the same draws for a variant each time; a failure prints its call."""
    numbers = random.Random(key)
    both_ways(dut, key, [draw(numbers, key, scale) for _ in range(scale.draws)])


def draw(numbers: random.Random, key: str, scale: Scale) -> Call:
    """A call with anything in it that the forward takes."""
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
        return dense(key, pick((None, 1, 3)), heads, longest, dims, **more)
    return varlen(key, heads, _lengths(numbers, scale), dims, **more)


def _lengths(numbers: random.Random, scale: Scale) -> dict[str, Any]:
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
    spare, told = numbers.choice((0, 0, 1, 200)), numbers.random() < 0.5
    return lengths(q, k, used_q, used_k, *packed, spare, max_seqlen=told)


def _length(numbers: random.Random, scale: Scale) -> int:
    """As often from 1 to 10 as from 10 to 100; 0 at times."""
    return 0 if numbers.random() < 0.05 else round(scale.longest ** numbers.random())


def _side(numbers: random.Random, scale: Scale) -> int | None:
    return numbers.choice((None, 0, _length(numbers, scale)))
