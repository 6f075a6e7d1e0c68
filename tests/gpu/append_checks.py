"""Checks of appending to a cache with one variant of kv_append in force; the attention behind it is the table's."""

from __future__ import annotations

from itertools import product

import torch

from registry.contract import Variant
from tests.gpu.calls import append, dense
from tests.gpu.dut import Dut
from tests.gpu.harness import hold_all, made
from tests.gpu.inputs import values
from tests.gpu.paged_checks import DESCALES, FAR_PAGE, LAYOUTS, appending, around_pages
from tests.gpu.paged_inputs import E4M3, cache_dtype, canaries, quantised, raw
from tests.gpu.paged_launch_checks import repeated_append
from tests.gpu.report import Report, Scale
from tests.support.call import CAUSAL, FAMILIES, OPEN, Append, Cache

DIMS = ((128, 128), (64, 64), (192, 128), (256, 256), (48, 32))


def append_rows(dut: Dut, key: str, scale: Scale) -> None:
    """Page sizes × lengths × orders × layouts × rotary × head dims: new rows right, no other byte touched."""
    hold_all(dut, list(appending(key, scale, _dims(key, scale))))


def rotary(dut: Dut, key: str, scale: Scale) -> None:
    """Every rotary dim, interleaved and not, and tables that end before the positions do."""
    calls, before = [], around_pages(16, scale)["edges"]
    for seed, dims in enumerate(_dims(key, scale)):
        for turn, rotary_dim in enumerate(range(16, dims[0] + 1, 48 if scale.thin else 16)):
            new = Append(3, ("halves", "interleaved")[turn % 2], rotary_dim, (None, 20)[turn // 2 % 2])
            asked = {"family": FAMILIES[turn % 3], "seed": seed, "window": (OPEN, CAUSAL)[turn // 4 % 2]}
            calls.append(append(key, (4, 2), 3, before, new, Cache(16), dims=dims, **asked))
    hold_all(dut, calls)


def lost_pages(dut: Dut, key: str, scale: Scale) -> None:
    """Pages of number -1: new tokens in them are written nowhere, not before the cache either; all others arrive."""
    report = Report()
    pages = (1, 3, 16, 64)
    for seed, (page, whole, rotary) in enumerate(product(pages, (False, True), ("", "halves", "interleaved"))):
        before, new = around_pages(page, scale)["edges"], Append((1, 3, 17)[seed % 3], rotary, 16 if rotary else 0)
        cache = Cache(page, descale=DESCALES[seed % 3], **tuple(LAYOUTS.values())[seed % 3])
        dims = _dims(key, scale)[seed % len(_dims(key, scale))]
        run = made(append(key, (4, 2), 3, before, new, cache, dims=dims, window=CAUSAL, seed=seed), dut.device)
        # Of every other entry the last of its pages or, as graphs are padded, all of them.
        last = (run.k.ends - 1)[:, None] // page
        column = torch.arange(run.pages.table.shape[1], device=dut.device)
        odd = torch.arange(len(before), device=dut.device)[:, None] % 2 == seed // 2 % 2
        run.lose(odd & ((column == last) | whole))
        run(dut)
        report.note(f"{run.call}, whole entries {whole}", run.cache_problems())
    report.done()


def beyond_2g(dut: Dut, key: str, scale: Scale) -> None:
    """New rows in pages beyond 2³¹ elements: addresses need 64 bits."""
    report = Report()
    dims, tokens, heads = _dims(key, scale)[0], 20, 2
    call = dense(key, 2, (2 * heads, heads), (tokens, tokens), dims, seed=3)
    fresh, low = values(call, dut.device), cache_dtype(key)
    row = 2 * heads * max(dims)
    pages = scale.beyond * 9 // 8 // (FAR_PAGE * row) + 4
    rows = canaries((pages, FAR_PAGE, row), low, dut.device)
    table = (pages - 1 - torch.arange(4, device=dut.device)).view(2, 2)
    token = torch.arange(tokens, device=dut.device)
    halves = (half.unflatten(-1, (heads, -1)) for half in rows.split(row // 2, -1))
    k, v = (half[..., :dim] for half, dim in zip(halves, dims, strict=True))
    dut.kvcache(
        fresh["q"], k, v, k=fresh["k"], v=fresh["v"], cache_seqlens=torch.zeros_like(table[:, 0]).int(),
        block_table=table.int(),
    )  # fmt: skip
    at = table[:, token // FAR_PAGE], token % FAR_PAGE
    for name, view in (("k", k), ("v", v)):
        stored = quantised(fresh[name]) if low == E4M3 else fresh[name]
        report.expect(torch.equal(raw(view)[at], raw(stored)), f"{name}: not in pages beyond 2^31 elements")
    report.done()


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """The same tokens appended again to the same cache leave the same bits."""
    report = Report()
    report.note("appending", repeated_append(dut, key, scale, _dims(key, scale)[0]))
    report.done()


def _dims(key: str, scale: Scale) -> tuple[tuple[int, int], ...]:
    variant = Variant.parse(key)
    fitting = tuple(dims for dims in DIMS if dims[0] <= variant.head_dim and dims[1] <= variant.head_dim_v)
    return fitting[-1:] if scale.thin else fitting
