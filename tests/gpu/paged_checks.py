"""Checks of the forward over a KV cache: lengths, pages, splits, masks, scores, layouts, addresses."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.cached_run import CachedRun
from tests.gpu.calls import MODIFIERS, append, enough, modified, paged
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import smaller_dims
from tests.gpu.harness import both_ways, hold_all, made, refused
from tests.gpu.paged_inputs import canaries, is_low, raw
from tests.gpu.report import MASKS, Report, Scale
from tests.gpu.run import same
from tests.gpu.varlen_checks import padded_entries, tile_of_keys
from tests.gpu.yardstick import problems
from tests.support.call import CAUSAL, FAMILIES, OPEN, Append, Cache, Call, Dims
from tests.support.covering import covering

DESCALES = ("", "heads", "batch")
FAR_PAGE = 16
LAYOUTS: dict[str, dict[str, bool]] = {"plain": {}, "halves": {"halves": True}, "heads first": {"heads_first": True}}


def around_pages(page: int | None, scale: Scale) -> dict[str, tuple[int, ...]]:
    """Lengths of a call's entries, by what they are about; page None: a contiguous cache."""
    page = page or 64
    return {
        "edges": (page - 1, 0, page, 1, page + 1, 2 * page + 5),
        "long": scale.long_keys,
        "one token": (1,) * 4,
        "nothing": (0, 0),
    }


def yardstick(dut: Dut, key: str, scale: Scale) -> None:
    """Page sizes × lengths around them × orders × queries × head ratios × splits × masks, in every kind of cache."""
    factors: dict[str, tuple[Any, ...]] = {
        "page": (*scale.pages, None),
        "lengths": tuple(around_pages(None, scale)),
        "order": ("in order", "permuted", "shared"),
        "seqlen_q": scale.few_queries,
        "group": tuple(scale.groups),
        "splits": scale.splits,
        "window": MASKS,
        "family": FAMILIES,
        "layout": tuple(LAYOUTS),
        "door": ("kvcache", "varlen"),
        "descale": DESCALES if is_low(key) else ("",),
    }
    cases = []
    for seed, case in enumerate(covering(factors)):
        heads, seqlen_q = scale.groups[case["group"]], case["seqlen_q"]
        lengths = around_pages(case["page"], scale)[case["lengths"]]
        lengths = lengths if case["lengths"] == "long" else enough(lengths, heads[0], seqlen_q)
        cache = Cache(case["page"], case["order"], descale=case["descale"], **LAYOUTS[case["layout"]])
        more = {name: case[name] for name in ("family", "window", "door")}
        cases.append(paged(key, heads, seqlen_q, lengths, cache, num_splits=case["splits"], seed=seed, **more))
    both_ways(dut, key, cases)


def splits(dut: Dut, key: str, scale: Scale) -> None:
    """Any number of splits, more than there are key blocks too, on few and many keys; sinks count once."""
    cases = []
    lengths = ((scale.longest_keys,), (1,), (33, 0, scale.longest_keys // 3))
    for seed, (count, k, window) in enumerate(product(scale.many_splits, lengths, (OPEN, CAUSAL, (50, 0)))):
        more = {"sink": ("", "fp32", "low")[seed % 3], "family": FAMILIES[seed // 3 % 3], "window": window}
        heads, page = ((8, 2), (4, 4), (16, 1))[seed % 3], (16, 64, 1, None)[seed % 4]
        cases.append(paged(key, heads, 1 + seed % 2, k, Cache(page), num_splits=count, seed=seed, **more))
    both_ways(dut, key, cases)


def varlen(dut: Dut, key: str, scale: Scale) -> None:
    """Prefill in chunks mixed with decode, packed queries, with and without seqused_q; rows behind them stay NaN."""
    cases = []
    rows, keys = scale.mixed_q, scale.mixed_k
    for seed, (page, count, window) in enumerate(product((1, 16, 48, 256), (0, 1, 3), MASKS)):
        cache = Cache(page, ("permuted", "shared")[seed % 2], descale=DESCALES[seed % 3])
        used = tuple(max(n - seed % 3, 0) for n in rows) if count < 2 and seed % 2 else None
        heads = tuple(scale.groups.values())[seed % len(scale.groups)]
        # Where the keys are split, rows of nobody are written too.
        spare = 19 if seed % 2 and (used or count == 1) else 0
        asked = {"used_q": used, "spare": spare, "num_splits": count, "seed": seed, "window": window}
        cases.append(paged(key, heads, rows, keys, cache, family=FAMILIES[seed % 3], **asked, **modified(seed)))
    report = both_ways(dut, key, cases, done=False)
    call = paged(key, (4, 2), rows, keys, Cache(16), used_q=rows, num_splits=2)
    report.expect(_refused(dut, call), "num_splits = 2 with seqused_q was accepted")
    report.done()


def score_mods(dut: Dut, key: str, scale: Scale) -> None:
    """Softcap, sinks and ALiBi × masks × splits × head ratios."""
    factors: dict[str, tuple[Any, ...]] = {
        "modifier": tuple(MODIFIERS),
        "window": MASKS,
        "splits": scale.splits,
        "group": tuple(scale.groups),
        "page": (16, 64, None),
        "seqlen_q": scale.few_queries,
    }
    cases = []
    for seed, case in enumerate(covering({**factors, "family": FAMILIES})):
        heads, seqlen_q = scale.groups[case["group"]], case["seqlen_q"]
        lengths = enough(scale.entries_k, heads[0], seqlen_q)
        cache = Cache(case["page"], descale=DESCALES[seed % 3])
        more = {**MODIFIERS[case["modifier"]], "family": case["family"], "window": case["window"], "seed": seed}
        cases.append(paged(key, heads, seqlen_q, lengths, cache, num_splits=case["splits"], **more))
    both_ways(dut, key, cases)


def pack_gqa(dut: Dut, key: str, scale: Scale) -> None:
    """Every ratio of heads, also those that do not divide a tile, packed and not."""
    cases = []
    for seed, (ratio, seqlen_q) in enumerate(product(scale.ratios, scale.few_queries)):
        lengths = enough((scale.entries_k[2], 40, 1), ratio[0], seqlen_q)
        asked = {"num_splits": seed % 3, "window": MASKS[seed % len(MASKS)], "seed": seed}
        asked |= {"family": FAMILIES[seed % 3], **modified(seed)}
        cases.append(paged(key, ratio, seqlen_q, lengths, Cache(16), **asked))
    both_ways(dut, key, [case for case in cases for _ in range(2)])


def head_dims(dut: Dut, key: str, scale: Scale) -> None:
    """Smaller head dims than the variant's, either the larger; NaN beside the columns."""
    variant, step = Variant.parse(key), 16 if is_low(key) else 8
    full, full_v = variant.head_dim, variant.head_dim_v
    pairs = [*smaller_dims(key, scale, step), (full - step, full_v), (full, full_v - step)]
    cases = []
    for seed, dims in enumerate(pairs):
        lengths = enough((scale.entries_k[2], 17, 1), 8, 1)
        asked = {"num_splits": seed % 3, "family": FAMILIES[seed % 3], "window": MASKS[seed % len(MASKS)], "seed": seed}
        cache = Cache((16, 64, None)[seed % 3], halves=seed % 2 == 0, descale=DESCALES[seed // 2 % 3])
        cases.append(paged(key, (8, 2), 1, lengths, cache, dims=dims, **asked))
    report = both_ways(dut, key, cases, done=False)
    for dims in ((full - step // 2, full_v), (full, full_v - step // 2)):
        call = paged(key, (2, 2), 1, (40,), Cache(16, door="varlen"), dims=dims)  # the drop-in pads what it can
        report.expect(_refused(dut, call), f"head dims {dims}: accepted")
    report.done()


def strided(dut: Dut, key: str, scale: Scale) -> None:
    """The same tokens wherever they lie: halves of an array, heads first, pages in any order; the same bits."""
    report = Report()
    for count, seqlen_q in product((1, 3), scale.few_queries):
        # One page size a round, so that keys are summed in the same order; a contiguous cache is one large page.
        for page in (16, 48, None):
            asked = {"num_splits": count, "seed": 3, "window": CAUSAL}
            right: list[torch.Tensor] | None = None
            for order, layout in product(("in order", "permuted"), LAYOUTS.values()):
                case = paged(key, (6, 2), seqlen_q, scale.entries_k, Cache(page, order, **layout), **asked)
                got = [x.clone() for x in made(case, dut.device)(dut)]
                right = right or got
                report.expect(all(map(same, got, right)), f"{case}: differs from pages in order")
    run = made(paged(key, (6, 2), 2, scale.entries_k, Cache(16), seed=4), dut.device)
    out = torch.full_like(run.tensors["out"].transpose(1, 2).contiguous(), float("nan")).transpose(1, 2)
    got, _ = run(dut, out=out)
    report.expect(got is out, "`out` is not returned")
    report.expect(same(out, run(dut)[0]), "an output with its heads first differs")
    report.done()


def empty(dut: Dut, key: str, scale: Scale) -> None:
    """No keys, no queries, no entries, and rows that a mask empties: 0 and −∞ (or the sink), nowhere else."""
    calls = []
    for seqlen_q, keys in ((2, (0, 0, 0)), (0, (5, 9)), (3, ()), (40, (5, 0, 17))):
        for window, sink, count in product((OPEN, CAUSAL, (0, 2)), ("", "fp32"), (0, 1, 4)):
            asked = {"window": window, "sink": sink, "num_splits": count, "family": "far_below"}
            calls.append(paged(key, (4, 2), seqlen_q, keys, Cache(16), **asked))
    hold_all(dut, calls)


def beyond_2g(dut: Dut, key: str, scale: Scale) -> None:
    """Pages, and rows of a contiguous cache, beyond 2³¹ elements: addresses need 64 bits."""
    report = Report()
    call = paged(key, (4, 2), 2, (scale.near[1],) * 2, Cache(FAR_PAGE), seed=6, window=CAUSAL)
    run = made(call, dut.device)
    row = 2 * call.heads_kv * max(call.head_dim, call.head_dim_v)  # of k and v side by side
    tokens = scale.near[1]
    step = max(row, (scale.beyond // (2 * tokens - 1) // 16 + 1) * 16)  # from row to row of a contiguous cache
    pages = scale.beyond * 9 // 8 // (FAR_PAGE * row) + 2
    buffer = canaries((max(pages * FAR_PAGE * row, (2 * tokens + 1) * step),), run.low, dut.device)
    token = torch.arange(tokens, device=dut.device)
    columns = -(-tokens // FAR_PAGE)
    table = (pages - 1 - torch.arange(2 * columns, device=dut.device) * (pages // (2 * columns))).view(2, columns)
    entry = torch.arange(2, device=dut.device)[:, None].expand(2, tokens)
    paged_rows = buffer[: pages * FAR_PAGE * row].view(pages, FAR_PAGE, row)
    place = table[:, token // FAR_PAGE], token % FAR_PAGE
    _call_far(report, dut, run, paged_rows, place, {"block_table": table.int()})
    raw(buffer).copy_(raw(canaries((1,), run.low, dut.device)))
    rows = buffer.as_strided((2, tokens, row), (tokens * step, step, 1))
    _call_far(report, dut, run, rows, (entry, token), {})
    report.done()


def _call_far(report: Report, dut: Dut, run: CachedRun, rows: torch.Tensor, place: Any, table: dict[str, Any]) -> None:
    """One call whose keys and values lie at `place` of rows (pages, page_size, row)."""
    heads, dim = run.call.heads_kv, rows.shape[2] // (2 * run.call.heads_kv)
    given = run.given()
    del given["block_table"]
    for i, name in enumerate("kv"):
        stored = run.stored(name, run.clean[name])
        view = rows[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim))[..., : stored.shape[-1]]
        raw(view)[place] = raw(stored)
        given[f"{name}_cache"] = view
    out, lse = dut.kvcache(**given, **table)
    found = problems(run.q.gather(out), lse, run.expected)
    report.note(f"cache {tuple(rows.shape)} with strides {rows.stride()}", found)


def append_and_attend(dut: Dut, key: str, scale: Scale) -> None:
    """New keys and values, rotated and not, written where the table says; then attention over old and new."""
    both_ways(dut, key, list(appending(key, scale)))


def appending(key: str, scale: Scale, dims: tuple[Dims | None, ...] = (None,)) -> Iterable[Call]:
    """Calls that append; dims: of the heads, None for the variant's own."""
    factors: dict[str, tuple[Any, ...]] = {
        "page": (*scale.pages, None),
        "tokens": scale.new_tokens,
        # One factor: how far q is turned depends on the window, with every number of tokens.
        "turn": tuple(product(("", "halves", "interleaved"), MASKS[:3])),
        "before": ("edges", "nothing", "long"),
        "order": ("in order", "permuted", "shared"),
        "layout": tuple(LAYOUTS),
        "splits": (0, 1, 3),
        "group": tuple(scale.groups),
        "dims": dims,
        "descale": DESCALES if is_low(key) else ("",),
        "rows": (None, 40),
        "full": (False, True),
    }
    for seed, case in enumerate(covering(factors)):
        page, tokens, (rotary, window) = case["page"], case["tokens"], case["turn"]
        before = around_pages(page, scale)[case["before"]]
        unit = page or 1
        capacity = -(-(max(before) + 2 * tokens) // unit) * unit if case["full"] else None
        cache = Cache(page, case["order"], descale=case["descale"], **LAYOUTS[case["layout"]])
        head_dim = (case["dims"] or (Variant.parse(key).head_dim,))[0]
        rotary_dim = min(head_dim // 16 * 16, (16, 32, 256)[seed % 3]) if rotary else 0
        new = Append(tokens, rotary if rotary_dim else "", rotary_dim, case["rows"])
        asked = {"family": FAMILIES[seed % 3], "seed": seed, "num_splits": case["splits"], "window": window}
        asked |= {"dims": case["dims"], "capacity": capacity}
        yield append(key, scale.groups[case["group"]], tokens, before, new, cache, **asked)


def leftpad(dut: Dut, key: str, scale: Scale) -> None:
    """Padding in front of keys, around every edge of tiles and pages, × splits × masks × modifiers; long padding; new
    keys behind and inside it.

    Keys of the padding are NaN, and so is what a kernel makes of one that it reads.
    """
    tile = tile_of_keys(key, scale)
    factors: dict[str, tuple[Any, ...]] = {
        "modifier": tuple(MODIFIERS), "window": MASKS, "splits": scale.splits[:4],
        "page": (1, 16, tile, 3 * tile, None), "heads": tuple(scale.groups.values()), "layout": tuple(LAYOUTS),
        "seqlen_q": (*scale.few_queries, 40), "family": FAMILIES, "door": ("kvcache", "varlen"),
        "descale": DESCALES if is_low(key) else ("",),
    }  # fmt: skip
    keys, padding = padded_entries(tile)
    cases: list[Any] = []
    for seed, case in enumerate(covering(factors)):
        cache = Cache(case.pop("page"), descale=case.pop("descale"), **LAYOUTS[case.pop("layout")])
        more = MODIFIERS[case.pop("modifier")] | {"num_splits": case.pop("splits"), "leftpad": padding, "seed": seed}
        cases.append(paged(key, case.pop("heads"), case.pop("seqlen_q"), keys, cache, **case, **more))
    for seed, (count, window) in enumerate(product((0, 1, 7), (OPEN, CAUSAL, (50, 0)))):
        k, longest = (scale.longest_keys, scale.longest_keys // 3, scale.longest_keys), scale.longest_keys
        more = {"leftpad": (longest * 4 // 5, longest // 3 - 2, longest), "num_splits": count, "seed": seed}
        cases.append(paged(key, (16, 2), 2, k, Cache(16), window=window, sink=("", "fp32", "low")[seed % 3], **more))
    for seed, (rotary, window) in enumerate(product(("", "halves", "interleaved"), (OPEN, CAUSAL))):
        new, cache = Append(2, rotary, 16 if rotary else 0), Cache((16, None)[seed % 2])
        asked = {"window": window, "num_splits": seed % 3, "leftpad": padding, "seed": seed}
        cases.append(append(key, (4, 2), 2, keys, new, cache, **asked))
    both_ways(dut, key, cases)


def drawn(dut: Dut, key: str, scale: Scale) -> None:
    """Everything at once, drawn at random: the same draws for a variant each time; a failure prints its case."""
    numbers = random.Random(key)
    both_ways(dut, key, [draw(numbers, key, scale) for _ in range(scale.draws // 2)])


def draw(numbers: random.Random, key: str, scale: Scale) -> Call:
    """A call with anything in it that a call over a cache takes."""
    pick, variant, step = numbers.choice, Variant.parse(key), 16 if is_low(key) else 8
    heads_kv, group, batch = numbers.randint(1, 3), pick((1, 2, 3, 4, 5, 7, 8, 16)), numbers.randint(1, 6)
    dims = tuple(pick((dim, step * numbers.randint(1, dim // step))) for dim in (variant.head_dim, variant.head_dim_v))

    def length() -> int:
        return 0 if numbers.random() < 0.1 else round(scale.longest ** numbers.random())

    page, packed = pick((None, 1, 16, 64, numbers.randint(1, 300))), numbers.random() < 0.4
    door = "varlen" if packed else pick(("kvcache", "varlen"))
    cache = Cache(
        page if door == "kvcache" else page or 32, pick(("in order", "permuted", "shared")), pick((False, True)),
        pick((False, True)), descale=pick(DESCALES), spare=numbers.randint(0, 3), door=door,
    )  # fmt: skip
    queries: Any = tuple(length() % 60 for _ in range(batch)) if packed else pick((1, 1, 2, 3, 9, 40))
    more: dict[str, Any] = {"family": pick(FAMILIES), "seed": numbers.randrange(2**20)}
    more |= pick(tuple(MODIFIERS.values()))
    more["window"] = pick((OPEN, CAUSAL, (pick((None, 0, length())), pick((None, 0, length())))))
    count = pick((0, 0, 1, 2, numbers.randint(1, 20)))
    keys, heads = [length() for _ in range(batch)], (heads_kv * group, heads_kv)
    return paged(key, heads, queries, keys, cache, num_splits=count, dims=dims, **more)


def _refused(dut: Dut, call: Call) -> bool:
    return bool(refused(partial(made(call, dut.device), dut)))
