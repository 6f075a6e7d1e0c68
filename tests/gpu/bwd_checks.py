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
from tests.gpu.calls import MODIFIERS, dense, dims_of, in_turn, modified, varlen
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import draw, smaller_dims
from tests.gpu.gradient_run import same_bits
from tests.gpu.harness import hold_all, made
from tests.gpu.report import MASKS, Report, Scale
from tests.support.call import CAUSAL, FAMILIES, OPEN
from tests.support.call import lengths as of_lengths
from tests.support.covering import covering

ROUNDING = 2**-6  # of the largest gradient: what an output that is rounded otherwise changes


def lengths(dut: Dut, key: str, scale: Scale) -> None:
    """Lengths × head ratios × masks, input families in turn."""
    factors: dict[str, tuple[Any, ...]] = {
        "seqlen_q": scale.bwd_seqlens, "seqlen_k": scale.bwd_seqlens, "group": tuple(scale.groups),
        "window": (OPEN, CAUSAL), "family": FAMILIES,
    }  # fmt: skip
    calls = []
    for seed, case in enumerate(covering(factors)):
        heads, seqlens = scale.groups[case.pop("group")], (case.pop("seqlen_q"), case.pop("seqlen_k"))
        calls.append(dense(key, None, heads, seqlens, dims_of(key, seed), **in_turn(key, seed), **case))
    hold_all(dut, calls)


def masks(dut: Dut, key: str, scale: Scale) -> None:
    """Windows with either side open, narrow and wide, on lengths that put the diagonal everywhere."""
    calls = []
    short, long = scale.bwd_ragged
    seqlens = (scale.near, (short, long), (long, short), (1, long), (long, long))
    windows = (CAUSAL, (0, 0), (16, 0), (64, 64), (None, 5), (5, None), (200, 3), (0, None), (None, 100), (1, 300))
    windows = windows[:6] if scale.thin else windows
    for seed, case in enumerate(covering({"seqlens": seqlens, "window": windows, "family": FAMILIES})):
        more = in_turn(key, seed)
        calls.append(dense(key, None, (4, 2), case.pop("seqlens"), dims_of(key, seed), **more, **case))
    hold_all(dut, calls)


def gqa(dut: Dut, key: str, scale: Scale) -> None:
    """Head ratios, also odd ones, × masks and modifiers: dense, and packed entries whose rows are padded to tiles."""
    calls = []
    factors = {"ratio": scale.ratios, "modifier": tuple(MODIFIERS), "window": MASKS, "family": FAMILIES}
    for seed, case in enumerate(covering(factors)):
        more = MODIFIERS[case.pop("modifier")] | in_turn(key, seed)
        calls.append(dense(key, None, case.pop("ratio"), scale.near, dims_of(key, seed), **more, **case))
    packed = of_lengths(scale.entries_q, scale.entries_k, used_k=tuple(n - n // 3 for n in scale.entries_k), spare=19)
    for seed, (ratio, window) in enumerate(product(scale.ratios, (OPEN, CAUSAL))):
        more = modified(seed) | in_turn(key, seed) | {"family": FAMILIES[seed % 3], "window": window}
        calls.append(varlen(key, ratio, packed, dims_of(key, seed), **more))
    hold_all(dut, calls)


def scores(dut: Dut, key: str, scale: Scale) -> None:
    """Softcap × sink × ALiBi × a gradient of the LSE, with masks and head ratios in turn; scales of the softmax."""
    heads = tuple(scale.groups.values())[:3]
    factors: dict[str, tuple[Any, ...]] = {
        "softcap": (0.0, 15.0), "sink": ("", "fp32", "low"), "alibi": ("", "heads", "batch"), "dlse": (False, True),
    }  # fmt: skip
    cases = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    if scale.thin:
        cases = covering(factors)
    calls = []
    for seed, case in enumerate(cases):
        more = {"window": MASKS[(seed + seed // 4) % 4], "family": FAMILIES[seed % 3], "seed": seed} | case
        seqlens = scale.bwd_ragged if seed % 3 else scale.near
        more["deterministic"] = seed % 5 == 0
        calls.append(dense(key, None, heads[seed % len(heads)], seqlens, dims_of(key, seed), **more))
    for seed, (softmax_scale, window) in enumerate(product((0.3, 0.02), (OPEN, CAUSAL))):
        more = {"window": window, "softmax_scale": softmax_scale, "seed": seed, "dlse": True}
        calls.append(dense(key, None, (4, 2), scale.bwd_ragged, dims_of(key, seed), **more))
    hold_all(dut, calls)


def head_dims(dut: Dut, key: str, scale: Scale) -> None:
    """Every smaller multiple of 8 of head_dim and of head_dim_v, either the larger; NaN beside the columns."""
    variant, calls = Variant.parse(key), []
    full, full_v = variant.head_dim, variant.head_dim_v
    pairs = [*smaller_dims(key, scale), (8, 8), (full - 8, full_v), (full, full_v - 8)]
    for seed, dims in enumerate(pairs):
        seqlens = scale.near if seed % 2 else scale.bwd_ragged
        more = {"family": FAMILIES[seed % 3], "window": MASKS[seed % len(MASKS)], **in_turn(key, seed)}
        calls.append(dense(key, None, (4, 2), seqlens, dims, **more))
    hold_all(dut, calls)


def strides(dut: Dut, key: str, scale: Scale) -> None:
    """Strided inputs and gradients of outputs: each bit-equal to the same values in order. Heads that are one run as
    one, in another tile of the forward: those gradients are equal but for rounding."""
    report = Report()
    call = dense(key, 2, (6, 2), scale.bwd_ragged, dims_of(key, 2), dlse=True, deterministic=True, window=CAUSAL)
    run = made(call, dut.device)
    ordered = {name: x.contiguous() for name, x in run.inputs.items()}
    dout, dlse = run.dout.contiguous(), run.dlse.contiguous()
    for name, inputs in _layouts(ordered).items():
        run.dout, run.dlse = dout, dlse
        run.inputs = {part: x.contiguous() for part, x in inputs.items()}
        (right,) = run(dut)
        run.inputs = inputs
        (got,) = run(dut)
        equal = near if name == "k and v expanded over the heads" else same_bits
        report.expect(bool(equal(got, right)), f"{name}: differs from contiguous inputs")
        if "expanded" not in name:
            report.note(name, run.problems(got))
    run.inputs = ordered
    for name, (given, given_lse) in _gradients_of_outputs(dout, dlse).items():
        run.dout, run.dlse = given.contiguous(), given_lse.contiguous()
        (right,) = run(dut)
        run.dout, run.dlse = given, given_lse
        (got,) = run(dut)
        report.expect(bool(same_bits(got, right)), f"{name}: differs from a contiguous one")
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
    calls = []
    for turn, (batch, *seqlens) in enumerate(((2, 65, 0), (2, 0, 65), (0, 65, 65), (0, 0, 0))):
        for window, more in product((OPEN, CAUSAL), ({}, {"sink": "fp32", "alibi": "batch", "dlse": True})):
            calls.append(dense(key, batch, (4, 2), tuple(seqlens), dims_of(key, turn), window=window, **more))
    for seed, (window, sink, seqlens) in enumerate(
        product((CAUSAL, (3, 0), (0, 2)), ("", "fp32"), ((scale.bwd_ragged[1], 5), (5, scale.bwd_ragged[1])))
    ):
        more = {"family": "far_below", "window": window, "sink": sink, **in_turn(key, seed)}
        calls.append(dense(key, 15, (4, 2), seqlens, dims_of(key, seed), **more))
    hold_all(dut, calls)


def splits(dut: Dut, key: str, scale: Scale) -> None:
    """Few keys, one entry and large groups: blocks share a group's heads, and their parts are added up."""
    calls = []
    ratios = ((8, 1), (7, 1), (6, 1), (16, 2), (3, 3))
    factors = {"ratio": ratios, "seqlen_k": scale.bwd_seqlens, "window": (OPEN, CAUSAL), "modifier": tuple(MODIFIERS)}
    for seed, case in enumerate(covering(factors)):
        more = MODIFIERS[case["modifier"]] | {"window": case["window"], "family": FAMILIES[seed % 3]}
        seqlens = (scale.bwd_ragged[0], case["seqlen_k"])
        calls.append(dense(key, 1, case["ratio"], seqlens, dims_of(key, seed), **more, **in_turn(key, seed)))
    for seed, ratio in enumerate(ratios):
        entries = of_lengths(
            (scale.bwd_ragged[0], 0, 17), (scale.near[1], 9, 40), used_k=(scale.near[0], 9, 33), spare=5
        )
        calls.append(varlen(key, ratio, entries, dims_of(key, seed), window=CAUSAL, **in_turn(key, seed)))
    hold_all(dut, calls)


def drawn(dut: Dut, key: str, scale: Scale) -> None:
    """Everything at once, drawn at random: the same draws for a variant each time; a failure prints its case."""
    numbers, calls = random.Random(key), []
    for _ in range(scale.bwd_draws):
        call = draw(numbers, key, scale)
        calls.append(call.but(dlse=numbers.random() < 0.4, deterministic=numbers.random() < 0.3))
    hold_all(dut, calls)
