"""Checks of gradients: lengths, masks, head ratios, scores, head dims, strides, nothing to do, few blocks, draws.

`bwd_preprocess`, `bwd_sum` and `bwd_postprocess` take the same checks, with head dims of every `bwd` of the table in
turn. Every fourth case or so is deterministic; each is held to the yardstick.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.bwd_cases import BwdCall, BwdCase, dense, dims_of, same, varlen
from tests.gpu.cases import CAUSAL, OPEN, Lengths
from tests.gpu.covering import covering
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import MODIFIERS, draw
from tests.gpu.inputs import FAMILIES
from tests.gpu.report import MASKS, Report, Scale

ROUNDING = 2**-6  # of the largest gradient: what an output that is rounded otherwise changes


def lengths(dut: Dut, key: str, scale: Scale) -> None:
    """Lengths × head ratios × masks, input families in turn."""
    factors: dict[str, tuple[Any, ...]] = {
        "seqlen_q": scale.bwd_seqlens, "seqlen_k": scale.bwd_seqlens, "group": tuple(scale.groups),
        "window": (OPEN, CAUSAL), "family": FAMILIES,
    }  # fmt: skip
    report = Report()
    for seed, case in enumerate(covering(factors)):
        heads, seqlens = scale.groups[case.pop("group")], (case.pop("seqlen_q"), case.pop("seqlen_k"))
        report.call(dut, dense(key, None, heads, seqlens, dims_of(key, seed), **_turn(seed), **case))
    report.done()


def masks(dut: Dut, key: str, scale: Scale) -> None:
    """Windows with either side open, narrow and wide, on lengths that put the diagonal everywhere."""
    report = Report()
    short, long = scale.bwd_ragged
    seqlens = (scale.near, (short, long), (long, short), (1, long), (long, long))
    windows = (CAUSAL, (0, 0), (16, 0), (64, 64), (None, 5), (5, None), (200, 3), (0, None), (None, 100), (1, 300))
    windows = windows[:6] if scale.thin else windows
    for seed, case in enumerate(covering({"seqlens": seqlens, "window": windows, "family": FAMILIES})):
        report.call(dut, dense(key, None, (4, 2), case.pop("seqlens"), dims_of(key, seed), **_turn(seed), **case))
    report.done()


def gqa(dut: Dut, key: str, scale: Scale) -> None:
    """Head ratios, also odd ones, × masks and modifiers: dense, and packed entries whose rows are padded to tiles."""
    report = Report()
    factors = {"ratio": scale.ratios, "modifier": tuple(MODIFIERS), "window": MASKS, "family": FAMILIES}
    for seed, case in enumerate(covering(factors)):
        more = MODIFIERS[case.pop("modifier")] | _turn(seed)
        report.call(dut, dense(key, None, case.pop("ratio"), scale.near, dims_of(key, seed), **more, **case))
    packed = Lengths(scale.entries_q, scale.entries_k, used_k=tuple(n - n // 3 for n in scale.entries_k), spare=19)
    for seed, (ratio, window) in enumerate(product(scale.ratios, (OPEN, CAUSAL))):
        more = tuple(MODIFIERS.values())[seed % len(MODIFIERS)] | _turn(seed)
        more |= {"family": FAMILIES[seed % 3], "window": window}
        report.call(dut, varlen(key, ratio, packed, dims_of(key, seed), **more))
    report.done()


def scores(dut: Dut, key: str, scale: Scale) -> None:
    """Softcap × sink × ALiBi × a gradient of the LSE, with masks and head ratios in turn; scales of the softmax."""
    report = Report()
    heads = tuple(scale.groups.values())[:3]
    factors: dict[str, tuple[Any, ...]] = {
        "softcap": (0.0, 15.0), "sink": ("", "fp32", "low"), "alibi": ("", "heads", "batch"), "dlse": (False, True),
    }  # fmt: skip
    cases = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    if scale.thin:
        cases = covering(factors)
    for seed, case in enumerate(cases):
        more = {"window": MASKS[(seed + seed // 4) % 4], "family": FAMILIES[seed % 3], "seed": seed} | case
        seqlens = scale.bwd_ragged if seed % 3 else scale.near
        more["deterministic"] = seed % 5 == 0
        report.call(dut, dense(key, None, heads[seed % len(heads)], seqlens, dims_of(key, seed), **more))
    for seed, (softmax_scale, window) in enumerate(product((0.3, 0.02), (OPEN, CAUSAL))):
        more = {"window": window, "softmax_scale": softmax_scale, "seed": seed, "dlse": True}
        report.call(dut, dense(key, None, (4, 2), scale.bwd_ragged, dims_of(key, seed), **more))
    report.done()


def head_dims(dut: Dut, key: str, scale: Scale) -> None:
    """Every smaller multiple of 8 of head_dim and of head_dim_v, either the larger; NaN beside the columns."""
    report = Report()
    variant = Variant.parse(key)
    full, full_v = variant.head_dim, variant.head_dim_v
    sides, sides_v = list(range(8, full + 1, 8)), list(range(8, full_v + 1, 8))
    steps = range(0, max(len(sides), len(sides_v)), 3 if scale.thin else 1)
    pairs = [(sides[i % len(sides)], sides_v[(5 * i + 2) % len(sides_v)]) for i in steps]  # 5 meets every residue
    pairs += [(8, full_v), (full, 8), (8, 8), (full - 8, full_v), (full, full_v - 8)]
    for seed, dims in enumerate(pairs):
        seqlens = scale.near if seed % 2 else scale.bwd_ragged
        more = {"family": FAMILIES[seed % 3], "window": MASKS[seed % len(MASKS)]}
        report.call(dut, dense(key, None, (4, 2), seqlens, dims, **more, **_turn(seed)))
    report.done()


def strides(dut: Dut, key: str, scale: Scale) -> None:
    """Strided inputs and gradients of outputs: each bit-equal to the same values in order. Heads that are one run as
    one, in another tile of the forward: those gradients are equal but for rounding."""
    report = Report()
    case = dense(key, 2, (6, 2), scale.bwd_ragged, dims_of(key, 2), dlse=True, deterministic=True, window=CAUSAL)
    call = BwdCall(case, dut.device)
    ordered = {name: x.contiguous() for name, x in call.inputs.items()}
    dout, dlse = call.dout.contiguous(), call.dlse.contiguous()
    for name, inputs in _layouts(ordered).items():
        call.dout, call.dlse = dout, dlse
        call.inputs = {part: x.contiguous() for part, x in inputs.items()}
        (right,) = call(dut)
        call.inputs = inputs
        (got,) = call(dut)
        equal = near if name == "k and v expanded over the heads" else same
        report.expect(bool(equal(got, right)), f"{name}: differs from contiguous inputs")
        if "expanded" not in name:
            report.note(name, call.problems(got))
    call.inputs = ordered
    for name, (given, given_lse) in _gradients_of_outputs(dout, dlse).items():
        call.dout, call.dlse = given.contiguous(), given_lse.contiguous()
        (right,) = call(dut)
        call.dout, call.dlse = given, given_lse
        (got,) = call(dut)
        report.expect(bool(same(got, right)), f"{name}: differs from a contiguous one")
    report.done()


def near(got: Any, right: Any) -> bool:
    """Whether gradients differ by no more than the forward's rounding of its output brings about."""
    pairs = [(got[name].float(), right[name].float()) for name in right]
    return all(bool((a - b).abs().max() <= ROUNDING * b.abs().max()) for a, b in pairs)


def _layouts(ordered: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    packed = torch.cat([ordered["q"], ordered["k"][:, :1].expand(-1, ordered["q"].shape[1], -1, -1)], 2)
    first = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in ordered.items()}
    both = torch.cat([ordered["k"], ordered["v"]], 3)
    split = dict(zip("kv", both.split([ordered["k"].shape[3], ordered["v"].shape[3]], 3), strict=True))
    return {
        "contiguous": ordered,
        "heads before seqlen": first,
        "q in a packed array": {**ordered, "q": packed[:, :, : ordered["q"].shape[2]]},
        "k and v side by side": {**ordered, **split},
        "k and v expanded over the batch": {**ordered, **{n: ordered[n][:1].expand_as(ordered[n]) for n in "kv"}},
        "k and v expanded over the heads": {
            **ordered, **{n: ordered[n][:, :, :1].expand_as(ordered[n]) for n in "kv"}
        },
    }  # fmt: skip


def _gradients_of_outputs(dout: torch.Tensor, dlse: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    flat = torch.cat([dout.new_zeros(1), dout.flatten()])[1:].view(dout.shape)
    odd = torch.nn.functional.pad(dout, (0, 1))[..., :-1]
    return {
        "dout with heads before seqlen": (dout.transpose(1, 2).contiguous().transpose(1, 2), dlse),
        "dout with columns before heads": (dout.transpose(2, 3).contiguous().transpose(2, 3), dlse),
        "dout of one number": (dout[:1, :1, :1, :1].expand_as(dout), dlse[:1, :1, :1].expand_as(dlse)),
        "dout of one row": (dout[:1, :1, :1].expand_as(dout), dlse),
        "dout off by an element": (flat, dlse),
        "dout with odd strides": (odd, dlse),
        "dlse with seqlen before heads": (dout, dlse.transpose(1, 2).contiguous().transpose(1, 2)),
    }


def empty(dut: Dut, key: str, scale: Scale) -> None:
    """No keys, no queries, no batch; rows and keys that a mask leaves alone: gradients of 0."""
    report = Report()
    for turn, (batch, *seqlens) in enumerate(((2, 65, 0), (2, 0, 65), (0, 65, 65), (0, 0, 0))):
        for window, more in product((OPEN, CAUSAL), ({}, {"sink": "fp32", "alibi": "batch", "dlse": True})):
            report.call(dut, dense(key, batch, (4, 2), tuple(seqlens), dims_of(key, turn), window=window, **more))
    for seed, (window, sink, seqlens) in enumerate(
        product((CAUSAL, (3, 0), (0, 2)), ("", "fp32"), ((scale.bwd_ragged[1], 5), (5, scale.bwd_ragged[1])))
    ):
        more = {"family": "far_below", "window": window, "sink": sink, "dlse": bool(seed % 3), **_turn(seed)}
        report.call(dut, dense(key, 15, (4, 2), seqlens, dims_of(key, seed), **more))
    report.done()


def splits(dut: Dut, key: str, scale: Scale) -> None:
    """Few keys, one entry and large groups: blocks share a group's heads, and their parts are added up."""
    report = Report()
    ratios = ((8, 1), (7, 1), (6, 1), (16, 2), (3, 3))
    factors = {"ratio": ratios, "seqlen_k": scale.bwd_seqlens, "window": (OPEN, CAUSAL), "modifier": tuple(MODIFIERS)}
    for seed, case in enumerate(covering(factors)):
        more = MODIFIERS[case["modifier"]] | {"window": case["window"], "family": FAMILIES[seed % 3]} | _turn(seed)
        seqlens = (scale.bwd_ragged[0], case["seqlen_k"])
        report.call(dut, dense(key, 1, case["ratio"], seqlens, dims_of(key, seed), **more))
    for seed, ratio in enumerate(ratios):
        entries = Lengths((scale.bwd_ragged[0], 0, 17), (scale.near[1], 9, 40), used_k=(scale.near[0], 9, 33), spare=5)
        report.call(dut, varlen(key, ratio, entries, dims_of(key, seed), window=CAUSAL, **_turn(seed)))
    report.done()


def drawn(dut: Dut, key: str, scale: Scale) -> None:
    """Everything at once, drawn at random: the same draws for a variant each time; a failure prints its case."""
    report = Report()
    numbers = random.Random(key)
    for _ in range(scale.bwd_draws):
        report.call(dut, BwdCase(draw(numbers, key, scale), numbers.random() < 0.4, numbers.random() < 0.3))
    report.done()


def _turn(seed: int) -> dict[str, Any]:
    """What goes round from case to case."""
    return {"seed": seed, "deterministic": seed % 4 == 3, "dlse": seed % 3 == 2}
