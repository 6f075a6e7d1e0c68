"""The forward at the largest legal numbers of heads, rows and tokens that fit into 60 GB and take seconds.

Arrays that memory has no room for are views: of entries that are all one, of keys and values one row apart. What is too
much to judge whole is judged in places, and elsewhere held to be the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.calls import dense
from tests.gpu.dut import Dut
from tests.gpu.harness import forced, hold
from tests.gpu.inputs import DTYPES, slopes, values
from tests.gpu.report import Report, Scale
from tests.gpu.yardstick import Rule, expected, problems
from tests.support.call import CAUSAL, OPEN, Dims, Window

HEAD_DIM = 8  # the smallest
CHUNK = 1 << 26  # elements that are compared at a time
PLACE = 300  # tokens that are judged at a time
SPARE = 128  # tokens by which lengths stay below the largest sum of two


def largest(dut: Dut, key: str, scale: Scale) -> None:
    """The most heads; rows beyond 2³¹; sequences near 2³⁰ tokens; heads beyond 2³¹ elements apart."""
    report = Report()
    release(dut)
    with forced(dut, key):
        for check in (_most_heads, _most_rows, _most_tokens, _far_heads):
            check(report, dut, key, scale)
            release(dut)
    report.done()


def release(dut: Dut) -> None:
    """Give back what torch's allocator holds free."""
    if dut.device == "cuda":
        torch.cuda.empty_cache()


def small_dims(key: str, most: int = 16) -> Dims:
    variant = Variant.parse(key)
    return min(most, variant.head_dim), min(most, variant.head_dim_v)


def _most_heads(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """Products of two numbers of heads beyond 2³¹, in groups and not, packed and not."""
    n = scale.most_heads
    for seed, (heads, pack) in enumerate((((n, n), False), ((n, 1), False), ((n, 1), True), ((2 * n, n), True))):
        dut.force(key, pack)
        more: dict[str, Any] = {"sink": "fp32", "alibi": "heads"} if seed % 2 else {}
        call = dense(key, 1, heads, (20, 20), small_dims(key), seed=seed, window=CAUSAL, **more)
        hold(report, dut, call, "heads packed, " * pack)


def _most_rows(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """Entries × heads beyond 2³¹, which packed heads allow: 64 of one query and one to seven keys, over and over."""
    heads, turns = 64, 7
    batch = (scale.beyond // heads // turns + 1) * turns
    tensors = values(dense(key, turns, (heads, 1), (1, turns), (HEAD_DIM, HEAD_DIM), seed=3), dut.device)
    lengths = torch.arange(turns, device=dut.device) + 1
    clean = {name: x[:1].expand_as(x) for name, x in tensors.items()}
    given = {name: x[:1].expand(batch, *x.shape[1:]) for name, x in tensors.items()}
    dut.force(key, pack=True)
    out, lse = dut.varlen(**given, seqused_k=lengths.int().repeat(batch // turns), return_lse=True)
    ones = torch.ones_like(lengths)
    right = expected(**clean, rule=Rule(HEAD_DIM**-0.5, lengths_q=ones, lengths_k=lengths))
    report.note(f"{batch} entries of {heads} heads", problems(out[:turns], lse[:turns], right))
    for name, x in (("out", out), ("lse", lse)):
        report.expect(repeats(x, turns), f"{name}: not the same again and again in {batch} entries of {heads} heads")
    dut.force(key)


def repeats(x: torch.Tensor, count: int) -> bool:
    """Whether the first `count` entries of x come again and again, to its end. NaN never does."""
    runs = x.unflatten(0, (-1, count))
    step = max(1, CHUNK // max(runs[0].numel(), 1))
    return all(bool((part == runs[:1]).all()) for part in runs.split(step))


def _most_tokens(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """As many queries and keys as there may be together: of both, of keys alone, of queries alone."""
    most = scale.beyond // 2 - SPARE
    dtype = DTYPES[Variant.parse(key).dtype]
    rows = torch.empty(scale.beyond // 2, 1, HEAD_DIM, dtype=dtype, device=dut.device)
    rows.normal_(generator=torch.Generator(dut.device).manual_seed(4))
    # The same rows, one further on, serve as values.
    half, few = most // 2, 40
    of_both = {"q": rows[:half], "k": rows[half : 2 * half], "v": rows[1 : half + 1]}
    of_keys = {"q": rows[:few], "k": rows[few:most], "v": rows[few + 1 : most + 1]}
    of_queries = {"q": rows[few:most], "k": rows[:few], "v": rows[1 : few + 1]}
    slope = slopes((1,), dut.device, 4)
    near: Window = (40, 0)
    for name, given, rule in (
        ("queries and keys", of_both, Rule(HEAD_DIM**-0.5, near, slopes=slope)),
        ("keys", of_keys, Rule(HEAD_DIM**-0.5, near)),
        ("queries", of_queries, Rule(HEAD_DIM**-0.5, CAUSAL)),
    ):
        whole = {part: x[None] for part, x in given.items()}
        out, lse = dut.attn(**whole, window=rule.window, alibi_slopes=rule.slopes, return_lse=True)
        for place, found in _in_places(whole, out, lse, rule):
            report.note(f"as many {name} as there may be, from row {place}", found)
        del out, lse
    padding = torch.tensor([most - few - PLACE], dtype=torch.int32, device=dut.device)
    whole = {part: x[None] for part, x in of_keys.items()}
    out, lse = dut.varlen(**whole, leftpad_k=padding, return_lse=True)
    last = {part: x if part == "q" else x[:, -PLACE:] for part, x in whole.items()}
    report.note("as long a padding as there may be", problems(out, lse, expected(**last, rule=Rule(HEAD_DIM**-0.5))))


def _in_places(
    tensors: Mapping[str, torch.Tensor], out: torch.Tensor, lse: torch.Tensor, rule: Rule
) -> Iterator[tuple[int, list[str]]]:
    """(first row, what is wrong) of a window's first, middle and last rows; a side of it is open or 0, and keys may be
    fewer than rows."""
    seqlen_q, seqlen_k = tensors["q"].shape[1], tensors["k"].shape[1]
    for row in (0, seqlen_q // 2, max(seqlen_q - PLACE, 0)):
        end = min(row + PLACE, seqlen_q)
        left = seqlen_k if rule.window[0] is None else rule.window[0]
        last = max(end + seqlen_k - seqlen_q, 0)
        keys = slice(max(row + seqlen_k - seqlen_q - left, 0), last)
        if last == 0:
            empty = bool((out[:, row:end] == 0).all() and torch.isneginf(lse[..., row:end]).all())
            yield row, [] if empty else ["rows that see no key are not 0 and -inf"]
            continue
        part = {"q": tensors["q"][:, row:end], "k": tensors["k"][:, keys], "v": tensors["v"][:, keys]}
        yield row, problems(out[:, row:end].clone(), lse[..., row:end], expected(**part, rule=rule))


def _far_heads(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """Heads beyond 2³¹ elements apart, of q, k, v and the output, and rows of slopes as far as they may be."""
    rows, step = 64, scale.beyond // 2 + 64
    call = dense(key, 2, (3, 3), (rows, rows), seed=6)
    tensors = values(call, dut.device)
    dim = max(call.head_dim, call.head_dim_v)
    stride = (rows * 4 * dim, 4 * dim, max(step, 2 * rows * 4 * dim), 1)
    nan = (
        torch.full((2 * stride[2] + 2 * stride[0],), float("nan"), dtype=tensors["q"].dtype, device=dut.device)
        for _ in range(2)
    )
    inputs_buffer, output_buffer = nan
    views = {
        part: inputs_buffer.as_strided(x.shape, stride, offset * dim).copy_(x)
        for offset, (part, x) in enumerate(tensors.items())
    }
    out = output_buffer.as_strided(call.sizes["o"], stride, 0)
    slope = slopes((2, 3), dut.device, 6)
    far = torch.empty(scale.beyond, device=dut.device).as_strided((2, 3), (scale.beyond // 2 - 8, 1)).copy_(slope)
    _, statistics = dut.attn(**views, causal=True, alibi_slopes=far, return_lse=True, out=out)
    wanted = expected(**tensors, rule=Rule(call.head_dim**-0.5, CAUSAL, slopes=slope))
    report.note("heads beyond 2^31 elements apart", problems(out.clone(), statistics, wanted))
    sink = torch.zeros(3, device=dut.device)
    plain = dut.attn(**views, window=OPEN, sink=sink)
    wanted = expected(**tensors, rule=Rule(call.head_dim**-0.5, OPEN, sink=sink))
    report.note("heads beyond 2^31 elements apart, into a new output", problems(plain, None, wanted))
