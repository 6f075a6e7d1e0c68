"""Calls over KV caches, and the ops around them, at the largest legal numbers that fit into 60 GB and take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.calls import append, paged
from tests.gpu.combine_checks import ERROR, OUT_DTYPES, combined
from tests.gpu.dut import Dut
from tests.gpu.harness import both_ways, hold, made
from tests.gpu.inputs import DTYPES
from tests.gpu.large_checks import HEAD_DIM, PLACE, SPARE, release, repeats
from tests.gpu.paged_inputs import E4M3, cache_dtype, quantised, raw, take
from tests.gpu.report import Report, Scale
from tests.gpu.rotary import misrounded
from tests.gpu.yardstick import LSE_TOLERANCE, Rule, expected, problems
from tests.support.call import CAUSAL, OPEN, Append, Cache, Window

ROW = 16  # bytes: the smallest stride, and so the smallest row
DIMS = (16, 16)
SPLITS = 256  # the most


def _memory(dut: Dut, scale: Scale) -> torch.Tensor:
    """Bytes for a row of 16 for each of 2³¹ keys, all of which are NaN in any dtype."""
    release(dut)
    return torch.full((scale.beyond * ROW,), 0xFF, dtype=torch.uint8, device=dut.device)


# ---- fwd_paged ----


def largest(dut: Dut, key: str, scale: Scale) -> None:
    """The most heads and splits; 2³¹ pages; sequences near 2³⁰ tokens; rows of pages and of tables 2³¹ apart."""
    report = both_ways(dut, key, list(_most_heads(key, scale)), done=False)
    memory = _memory(dut, scale)
    far = _Far(report, dut, key, memory)
    for check in (_most_pages, _most_tokens, _far_rows):
        check(far, scale)
        memory.fill_(0xFF)
    _far_tables(report, dut, key, memory, scale)
    del memory, far
    release(dut)
    report.done()


def _most_heads(key: str, scale: Scale) -> Iterator[Any]:
    n, cache = scale.most_heads, Cache(16, descale="batch")
    more: dict[str, Any] = {"sink": "fp32", "alibi": "heads", "window": CAUSAL}
    for heads, rows, count in (((n, n), 3, 0), ((n, n), 1, 3), ((n, 1), 2, 1), ((n, 1), 3, 2), ((2 * n, n), 1, 0)):
        for seed in range(2):  # one of them with packed heads
            yield paged(key, heads, rows, (20,), cache, dims=DIMS, num_splits=count, seed=seed, **more)
    # Partial outputs of more than 2³¹ elements, most of them of no keys; and many splits that all have keys.
    yield paged(key, (n, n), 9, (70,), cache, dims=DIMS, num_splits=SPLITS)
    for seed in range(2):
        yield paged(key, (8, 1), 2, (4 * scale.longest_keys,), cache, num_splits=SPLITS, seed=seed, window=(None, 0))


class _Far:
    """Attention over keys and values that lie in a few places of a large memory."""

    def __init__(self, report: Report, dut: Dut, key: str, memory: torch.Tensor):
        self.report, self.dut, self.low = report, dut, cache_dtype(key)
        self.dtype, self.memory = DTYPES[Variant.parse(key).dtype], memory
        self.cells = memory.view(self.low)
        self.dim = ROW // self.low.itemsize
        self.rows = self.cells.view(-1, 1, self.dim)
        self.generator = torch.Generator(dut.device).manual_seed(5)

    def drawn(self, *size: int) -> torch.Tensor:
        """As a cache holds it."""
        made = torch.randn(size, generator=self.generator, device=self.dut.device)
        return quantised(made) if self.low == E4M3 else made.to(self.low)

    def call(
        self, what: str, k: torch.Tensor, v: torch.Tensor, places: tuple[Any, Any], window: Window = OPEN,
        rows: int = 2, **options: Any,
    ) -> None:  # fmt: skip
        """k, v: (pages, page_size, 1, dim). places: (page, row in it) of the keys that count, (batch, keys) each."""
        for cache in (k, v):
            raw(cache)[places] = raw(self.drawn(*places[0].shape, 1, self.dim))
        # They may be one array, a row apart: only now is it known what is where.
        found = {name: take(cache, places).to(self.dtype) for name, cache in (("k", k), ("v", v))}
        batch, heads = places[0].shape[0], 64
        q = torch.randn(batch, rows, heads, self.dim, generator=self.generator, device=self.dut.device).to(self.dtype)
        right = expected(q, **found, rule=Rule(self.dim**-0.5, window))
        sides = tuple(-1 if side is None else side for side in window)
        for count in (0, 1, 3):
            asked = {"num_splits": count, "window_size": sides, "return_softmax_lse": True, **options}
            out, lse = self.dut.kvcache(q, k, v, **asked)
            self.report.note(f"{what}, num_splits {count}", problems(out, lse, right))


def _most_pages(far: _Far, scale: Scale) -> None:
    """Pages of one token, each a row of memory; values are the rows behind the keys."""
    pages = scale.beyond - 1
    k, v = far.rows[:-1, None], far.rows[1:, None]
    keys = min(PLACE, pages // 8)
    step = (pages - 1) // (2 * keys - 1)
    table = (pages - 1 - torch.arange(2 * keys, device=far.dut.device) * step).view(keys, 2).T.contiguous()
    lengths = torch.full((2,), keys, dtype=torch.int32, device=far.dut.device)
    places = table, torch.zeros_like(table)
    far.call(f"{pages} pages", k, v, places, block_table=table.int(), cache_seqlens=lengths)


def _most_tokens(far: _Far, scale: Scale) -> None:
    """One sequence as long as it may be, of whose keys few are not padding, or outside of the window."""
    device, tokens = far.dut.device, scale.beyond // 2 - SPARE
    for name, pages in (("a contiguous cache", 1), ("pages of 2^30 / 3", 3)):
        size = tokens // pages
        k, v = (far.rows[i : i + pages * size].view(pages, size, 1, far.dim) for i in range(2))
        order = torch.tensor([[2, 0, 1]] if pages == 3 else [[0]], device=device)
        used = pages * size - 3
        token = used - PLACE + torch.arange(PLACE, device=device)[None]
        places = order[0][token // size], token % size
        options = {"cache_seqlens": torch.tensor([used], dtype=torch.int32, device=device)}
        options |= {"block_table": order.int()} if pages == 3 else {}
        padding = torch.tensor([used - PLACE], dtype=torch.int32, device=device)
        far.memory.fill_(0xFF)
        far.call(f"{used} tokens of {name}, most padding", k, v, places, **options, cache_leftpad=padding)
        far.memory.zero_()  # keys outside of a window exist
        far.call(f"{used} tokens of {name}, a window", k, v, places, (PLACE - 2, 0), **options)


def _far_rows(far: _Far, scale: Scale) -> None:
    """Tokens of a page as far apart as they may be: two pages, keys and values lie in between."""
    step, tokens, dim = scale.beyond - 16, 5, far.dim
    strides = (dim, step, dim, 1)
    k, v = (far.cells.as_strided((2, tokens, 1, dim), strides, i * 2 * dim) for i in range(2))
    table = torch.tensor([[1], [0]], device=far.dut.device)
    places = table.expand(2, tokens), torch.arange(tokens, device=far.dut.device).expand(2, tokens)
    lengths = torch.full((2,), tokens, dtype=torch.int32, device=far.dut.device)
    far.call("rows of a page 2^31 elements apart", k, v, places, block_table=table.int(), cache_seqlens=lengths)


def _far_tables(report: Report, dut: Dut, key: str, memory: torch.Tensor, scale: Scale) -> None:
    """Rows of the page table and of descales as far apart as they may be."""
    call = paged(key, (4, 2), 2, (20, 9, 30), Cache(16, descale="batch"), seed=7, window=CAUSAL)
    run = made(call, dut.device)
    given, names = run.given(), ("block_table", "k_descale", "v_descale")
    for i, name in enumerate(name for name in names if name in given):
        x = given[name]
        given[name] = memory.view(x.dtype).as_strided(x.shape, (scale.beyond - 1, 1), 8 * i).copy_(x)
    for count in (1, 3):
        found = run.problems(*dut.kvcache(**{**given, "num_splits": count}))
        report.note(f"{', '.join(names)} with rows 2^31 elements apart, num_splits {count}", found)


# ---- kv_append ----


def largest_append(dut: Dut, key: str, scale: Scale) -> None:
    """The most heads, and close to 2³¹ rows: of heads, of tokens, of entries."""
    report = Report()
    n = scale.most_heads
    for seed, rotary in enumerate(("halves", "interleaved")):
        new, cache = Append(3, rotary, 16), Cache(16, descale="batch")
        hold(report, dut, append(key, (n, n), 3, (5, 40), new, cache, dims=DIMS, seed=seed, window=CAUSAL))
    memory = _memory(dut, scale)
    few = 2 ** ((scale.beyond.bit_length() - 2) // 3)
    many = scale.beyond // 2 // few - 1
    for seed, sizes in enumerate(((1, few, many), (few, many, 1), (many, 1, few))):
        _append_many(report, dut, key, memory, sizes, few, seed)
        memory.fill_(0xFF)
    del memory
    release(dut)
    report.done()


def _append_many(
    report: Report, dut: Dut, key: str, memory: torch.Tensor, sizes: tuple[int, int, int], few: int, seed: int
) -> None:
    """sizes: entries, tokens, heads. New row (b, t, h) is row b + t + h of some; keys lie between values."""
    low, dtype = cache_dtype(key), DTYPES[Variant.parse(key).dtype]
    dim = ROW // low.itemsize
    count = 1
    for size in sizes:
        count *= size
    lanes = memory[: 2 * count * ROW].view(low).view(*sizes, 2, dim)
    caches = {name: lanes[..., i, :] for i, name in enumerate("kv")}
    generator = torch.Generator(dut.device).manual_seed(seed)
    some = {name: torch.randn(sum(sizes), dim, generator=generator, device=dut.device).to(dtype) for name in "kv"}
    new = {name: x.as_strided((*sizes, dim), (dim, dim, dim, 1)) for name, x in some.items()}
    q = torch.zeros(sizes[0], 0, sizes[2], dim, dtype=dtype, device=dut.device)  # nobody attends
    lengths = torch.zeros(sizes[0], dtype=torch.int32, device=dut.device)
    dut.kvcache(q, caches["k"], caches["v"], **new, cache_seqlens=lengths)
    axis = sizes.index(few)
    for name, cache in caches.items():
        stored = raw(quantised(some[name]) if low == E4M3 else some[name])
        parts = (raw(cache).select(axis, i).flatten(0, -2) for i in range(few))
        right = all(torch.equal(part, stored[i : i + len(part)]) for i, part in enumerate(parts))
        report.expect(right, f"{sizes} entries, tokens and heads: {name} is not in the cache")


# ---- fwd_combine ----


def largest_combine(dut: Dut, key: str, scale: Scale) -> None:
    """As many rows as fit, of tokens, of heads, of entries; the most splits; arrays with strides beyond 2³¹."""
    report, heads, turns = Report(), 64, 7
    release(dut)
    # 32 bytes of a row that is read, 16 or 32 of one that is written, 4 of its LSE.
    most = scale.beyond // 2 if "fp32" not in key else scale.beyond * 3 // 8
    period = heads * turns
    rows = most // period * period
    storage = torch.empty(rows + 16 * period, HEAD_DIM, device=dut.device)
    generator = torch.Generator(dut.device).manual_seed(2)
    some = torch.randn(period, HEAD_DIM, generator=generator, device=dut.device)
    storage.view(-1, period, HEAD_DIM).copy_(some)
    for shape in ((1, rows // heads, heads), (rows, 1, 1), (1, 1, rows)):
        _combine_many(report, dut, key, storage, shape, 3, period)
    few = max(rows // SPLITS // period, 1) * period
    _combine_many(report, dut, key, storage, (1, few // heads, heads), SPLITS, period)
    del storage
    release(dut)
    _combine_far(report, dut, key, scale)
    release(dut)
    report.done()


def _combine_many(
    report: Report, dut: Dut, key: str, storage: torch.Tensor, shape: tuple[int, int, int], splits: int, period: int
) -> None:
    """shape: (batch, seqlen, heads). The rows of a split are those of the one before from the sixth on; they come
    again after `period`, and so must the results."""
    _, seqlen, heads = shape
    shift = 5 * HEAD_DIM
    inner = (seqlen * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM, 1)
    outs = storage.as_strided((splits, *shape, HEAD_DIM), (shift, *inner))
    weights = torch.randn(splits, 64, generator=torch.Generator(dut.device).manual_seed(splits), device=dut.device)
    lses = weights.as_strided((splits, *shape), (64, 0, 0, int(heads == 64)))
    out, lse = dut.combine(outs, lses, out_dtype=OUT_DTYPES[Variant.parse(key).dtype])
    out, lse = (x.flatten(0, 1) if heads == 64 else x.flatten(0, 2) for x in (out, lse))  # views, never copies
    count = period // 64 if heads == 64 else period
    of_rows = weights.repeat(1, period // 64) if heads == 64 else weights[:, :1].expand(splits, period)
    what = f"{splits} splits of {shape}"
    first = outs.flatten(1, -2)[:, :period]
    _judge(report, what, out[:count].view(period, -1), lse[:count].reshape(period), first, of_rows)
    for name, x in (("out", out), ("lse", lse)):
        report.expect(repeats(x, count), f"{what}: {name} is not the same again and again")


def _judge(report: Report, what: str, out: Any, lse: Any, outs: Any, lses: Any) -> None:
    exact, size, exact_lse = combined(outs, lses)
    report.expect(not bool(misrounded(out, exact, 2 * size, out.dtype, ERROR).any()), f"{what}: elements are wrong")
    error = (lse.double() - exact_lse).abs() / exact_lse.abs().clamp(min=1)
    report.expect(bool((error <= LSE_TOLERANCE).all()), f"{what}: the LSE is wrong")


def _combine_far(report: Report, dut: Dut, key: str, scale: Scale) -> None:
    """Splits of outputs, tokens of LSEs, and tokens of the result beyond 2³¹ elements apart."""
    shape, dtype = (1, 40, 6), OUT_DTYPES[Variant.parse(key).dtype]
    step, far = scale.beyond // 32, max(scale.beyond + 64, 40 * 6 * HEAD_DIM)
    generator = torch.Generator(dut.device).manual_seed(3)
    outs = torch.randn(3, *shape, HEAD_DIM, generator=generator, device=dut.device)
    lses = torch.randn(3, *shape, generator=generator, device=dut.device)
    strides = (240 * HEAD_DIM, 6 * HEAD_DIM, HEAD_DIM, 1)
    far_outs = torch.empty(2 * far + outs[0].numel(), device=dut.device).as_strided(outs.shape, (far, *strides))
    far_lses = torch.empty(40 * step, device=dut.device).as_strided(lses.shape, (1, 40 * step, step, 4))
    target = torch.empty(40 * step, dtype=dtype, device=dut.device).as_strided(
        (*shape, HEAD_DIM), (40 * step, step, 2 * HEAD_DIM, 1)
    )
    got, lse = dut.combine(far_outs.copy_(outs), far_lses.copy_(lses), out=target)
    _judge(report, "arrays with strides beyond 2^31", got, lse, outs, lses)
