"""Checks of dense calls with the variant's own head dimensions: lengths, masks, strides, addresses."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.calls import dense
from tests.gpu.dut import Dut
from tests.gpu.harness import hold, hold_all
from tests.gpu.inputs import DTYPES, integers, values
from tests.gpu.report import Report, Scale
from tests.gpu.yardstick import Rule, expected, problems
from tests.support.call import CAUSAL, FAMILIES, OPEN, Window
from tests.support.covering import covering


def yardstick(dut: Dut, key: str, scale: Scale) -> None:
    """Lengths × head ratios × masks, input families in turn, against the error yardstick, LSE included."""
    factors: dict[str, tuple[Any, ...]] = {
        "seqlen_q": scale.seqlens,
        "seqlen_k": scale.seqlens,
        "group": tuple(scale.groups),
        "window": (OPEN, CAUSAL),
    }
    if scale.thin:
        cases = covering({**factors, "family": FAMILIES})
    else:
        cases = [dict(zip(factors, combination, strict=True)) for combination in product(*factors.values())]
        # The innermost factors have 4 · 2 values and the families are 3: each meets every mask, ratio and length.
        cases = [{**case, "family": FAMILIES[i % 3]} for i, case in enumerate(cases)]
    calls = []
    for seed, case in enumerate(cases):
        heads, seqlens = scale.groups[case.pop("group")], (case.pop("seqlen_q"), case.pop("seqlen_k"))
        calls.append(dense(key, None, heads, seqlens, seed=seed, **case))
    hold_all(dut, [*calls, dense(key, scale.grid_batch, (64, 1), (1, 17), seed=1)])


def lse(dut: Dut, key: str, scale: Scale) -> None:
    """Scales other than the default, and that asking for the LSE changes nothing in the output."""
    report = Report()
    for seed, softmax_scale in enumerate((None, 0.3, 0.02, 1.0)):
        more = {"family": FAMILIES[seed % 3], "seed": seed, "softmax_scale": softmax_scale}
        for window in (OPEN, CAUSAL):
            hold(report, dut, dense(key, 2, (4, 2), scale.ragged, window=window, **more))
    tensors = values(dense(key, 2, (4, 2), scale.ragged, seed=7), dut.device)
    both = dut.attn(**tensors, causal=True, return_lse=True)
    alone = dut.attn(**tensors, causal=True)
    report.expect(isinstance(alone, torch.Tensor) and torch.equal(both[0], alone), "return_lse changes the output")
    report.done()


def strided(dut: Dut, key: str, scale: Scale) -> None:
    """Packed qkv, (batch, heads, seqlen, head_dim) storage, expanded keys, strided outputs: each bit-equal to dense."""
    report = Report()
    plain = values(dense(key, 2, (6, 2), scale.ragged, seed=3), dut.device)
    square = values(dense(key, 2, (6, 2), (scale.ragged[1],) * 2, seed=4), dut.device)
    layouts = {
        "packed qkv": _packed(square),
        "heads before seqlen": {name: _heads_first(x) for name, x in plain.items()},
        "k and v expanded over the batch": {
            "q": plain["q"], **{name: plain[name][:1].expand_as(plain[name]) for name in "kv"}
        },
        "k and v expanded over the heads": {
            "q": plain["q"], **{name: plain[name][:, :, :1].expand_as(plain[name]) for name in "kv"}
        },
    }  # fmt: skip
    for name, tensors in layouts.items():
        for causal in (False, True):
            copies = {name: x.contiguous() for name, x in tensors.items()}
            right, right_lse = dut.attn(**copies, causal=causal, return_lse=True)
            out = _heads_first(torch.full_like(right, float("nan")))
            got, got_lse = dut.attn(**tensors, causal=causal, return_lse=True, out=out)
            report.expect(got is out, f"{name}: `out` is not returned")
            report.expect(torch.equal(got, right) and torch.equal(got_lse, right_lse), f"{name}: differs from dense")
            wanted = expected(**copies, rule=Rule(copies["q"].shape[-1] ** -0.5, CAUSAL if causal else OPEN))
            report.note(f"{name}, causal {causal}", problems(got, got_lse, wanted))
    report.done()


def windows(dut: Dut, key: str, scale: Scale) -> None:
    """Windows with either side open, narrow and wide, on lengths that put the diagonal everywhere."""
    report = Report()
    short, long = scale.ragged
    lengths = (scale.near, (short, long), (long, short), (1, long), (long, long))
    sides: tuple[Window, ...] = (
        (0, 0), (16, 0), (64, 64), (None, 5), (5, None), (200, 3), (0, None), (None, 1000), (1, 300)
    )  # fmt: skip
    for seed, (seqlens, window) in enumerate(product(lengths, sides)):
        more = {"family": FAMILIES[seed % 3], "seed": seed, "window": window}
        hold(report, dut, dense(key, None, (4, 2), seqlens, **more))
    tensors = values(dense(key, 1, (2, 1), (short, long), seed=5), dut.device)
    one = dut.attn(**tensors, causal=True, window=(33, 9))
    other = dut.attn(**tensors, window=(33, 0))
    report.expect(torch.equal(one, other), "causal=True does not close the right side of a window")
    report.done()


def empty(dut: Dut, key: str, scale: Scale) -> None:
    """No keys, no queries, no batch, and rows that a mask empties: 0 and −inf (or the sink), nowhere else."""
    calls = []
    for batch, *seqlens in ((2, 65, 0), (2, 0, 65), (0, 65, 65), (0, 0, 0)):
        for window, sink in product((OPEN, CAUSAL), ("", "fp32")):
            calls.append(dense(key, batch, (4, 2), tuple(seqlens), seed=1, window=window, sink=sink))
    for window, sink in product((CAUSAL, (3, 0), (0, 2)), ("", "fp32")):
        more = {"family": "far_below", "seed": 2, "window": window, "sink": sink}
        calls.append(dense(key, 2, (4, 2), (scale.ragged[1], 5), **more))
    hold_all(dut, calls)


def beyond_2g(dut: Dut, key: str, scale: Scale) -> None:
    """Offsets beyond 2³¹ elements along the batch, and along dense and packed tokens: addresses need 64 bits."""
    report = Report()
    rows, longer = 64, scale.beyond // 32
    steps = {"the batch": (scale.beyond + 64, 0), "the seqlen": (0, longer), "packed tokens": (0, longer)}
    elements = 2 * scale.beyond + scale.beyond // 8
    dtype = DTYPES[Variant.parse(key).dtype]
    nan = (torch.full((elements,), float("nan"), dtype=dtype, device=dut.device) for _ in range(2))
    inputs_buffer, output_buffer = nan
    for name, (step_b, step_s) in steps.items():
        call = dense(key, 2 if step_b else 1, (2, 1), (rows, rows), seed=6)
        tensors = values(call, dut.device)
        # q, k and v share the rows of one buffer: heads 0-1, 2 and 3 of each.
        dim = max(call.head_dim, call.head_dim_v)
        stride = (step_b, step_s or 4 * dim, dim, 1)
        views = {
            part: inputs_buffer.as_strided(tensors[part].shape, stride, offset * dim)
            for part, offset in (("q", 0), ("k", 2), ("v", 3))
        }
        for part, view in views.items():
            view.copy_(tensors[part])
        out = output_buffer.as_strided(call.sizes["o"], stride, 0)
        out.fill_(float("nan"))
        if name == "packed tokens":
            statistics = _one_packed_entry(dut, views, out)
        else:
            _, statistics = dut.attn(**views, causal=True, return_lse=True, out=out)
        wanted = expected(**tensors, rule=Rule(call.head_dim**-0.5, CAUSAL))
        report.note(f"offsets beyond 2^31 along {name}", problems(out.clone(), statistics, wanted))
    report.done()


def _one_packed_entry(dut: Dut, views: Mapping[str, torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """A batch of one as a packed array; its LSE as that of a batch."""
    cu = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), integers((0, out.shape[1]), dut.device))
    packed = {name: view[0] for name, view in views.items()}
    _, statistics = dut.varlen(**packed, **cu, causal=True, return_lse=True, out=out[0])
    return statistics[None]


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with storage (batch, heads, seqlen, head_dim)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q, k and v as slices of one (batch, seqlen, heads_q + 2·heads_kv, head_dim) tensor; v apart if it is narrower."""
    names = "qkv" if tensors["v"].shape[3] == tensors["q"].shape[3] else "qk"
    packed = torch.cat([tensors[name] for name in names], dim=2)
    sizes = [tensors[name].shape[2] for name in names]
    return {**tensors, **dict(zip(names, packed.split(sizes, dim=2), strict=True))}
