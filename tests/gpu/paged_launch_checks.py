"""Checks of many launches over KV caches: the same bits each time, captured decode steps that grow, several threads."""

from __future__ import annotations

import torch

from registry.contract import Variant
from tests.gpu.calls import append, dense, paged
from tests.gpu.dut import Dut
from tests.gpu.harness import captured, cold_capture, forced, in_threads, made, repeated, replays
from tests.gpu.inputs import DTYPES, integers, padded, place, values
from tests.gpu.paged_inputs import E4M3, Pages, cache_dtype, quantised, raw, take
from tests.gpu.report import Report, Scale
from tests.gpu.rotary import rotated, tables
from tests.gpu.run import same
from tests.gpu.yardstick import Rule, expected, problems
from tests.support.call import CAUSAL, Append, Cache, Call, Dims

HEADS = (8, 2)  # of the captured decode step
GROWTH = (0, 1, 1, 29, 1)  # of the lengths, from replay to replay


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """The same call gives the same bits, with other work in between: any splits, packed queries, appending."""
    report = Report()
    calls = [paged(key, (8, 2), 1, scale.entries_k, Cache(16), num_splits=n, seed=8) for n in (0, 1, 3)]
    calls.append(paged(key, (8, 2), scale.mixed_q, scale.mixed_k, Cache(64), seed=8, sink="fp32", window=CAUSAL))
    with forced(dut, key):
        for pack in (False, True):
            dut.force(key, pack)
            for call in calls:
                repeated(report, dut, call, call.but(seed=9), f", heads packed {pack}")
    report.note("appending", repeated_append(dut, key, scale))
    report.done()


def repeated_append(dut: Dut, key: str, scale: Scale, dims: Dims | None = None) -> list[str]:
    """What differs when the same tokens are appended again to the same cache."""
    call = append(key, (8, 2), 2, scale.entries_k, Append(2, "halves", 16), Cache(16), dims=dims, seed=8)
    run, results = made(call, dut.device), []
    for _ in range(4):
        run.restore()
        results.append([x.clone() for x in (*run(dut), *(raw(run.tensors[name]) for name in "kv"))])
    return ["two calls differ" for other in results[1:] if not all(map(same, results[0], other))]


def graph_capture(dut: Dut, key: str, scale: Scale) -> None:
    """A cold call during capture is refused; a captured decode step of many layers is exact while its lengths grow."""
    report = Report()
    cold = made(paged(key, (4, 2), 1, scale.entries_k, Cache(16), num_splits=2), dut.device)
    dut.force(key)  # forgets what was loaded
    cold_capture(report, dut, cold)
    replays(report, dut, [_of_one_size(key, scale, seed) for seed in range(3)])
    for num_splits, layers in ((0, scale.layers), (3, 2)):
        _grow(report, Decoder(dut, key, scale, layers, num_splits))
    report.done()


def _of_one_size(key: str, scale: Scale, seed: int) -> Call:
    """A call that fits the arrays of the others: its lengths have changed places, and so has every page."""
    keys = scale.entries_k[seed:] + scale.entries_k[:seed]
    return paged(key, (4, 2), 2, keys, Cache(16, door="varlen"), seed=seed, window=CAUSAL, sink="fp32")


class Decoder:
    """A decode step of several layers over static arrays, each layer with a cache of its own; lengths: int32 (batch,),
    tokens that the caches hold before a step."""

    def __init__(self, dut: Dut, key: str, scale: Scale, layers: int, num_splits: int):
        variant, device = Variant.parse(key), dut.device
        self.dut, self.num_splits, self.dtype = dut, num_splits, cache_dtype(key)
        dims, batch, (heads_q, heads_kv) = (variant.head_dim, variant.head_dim_v), len(scale.entries_k), HEADS
        self.call = dense(key, batch, HEADS, (1, 1))
        self.lengths = integers(scale.entries_k, device)
        held = self.lengths.long()
        rooms = held + sum(GROWTH) + 1
        self.pages = Pages(rooms, rooms, Cache(16), device, 5)
        self.caches = [self.pages.empty(heads_kv, dims, self.dtype, Cache(16)) for _ in range(layers)]
        self.given = [{name: place(x) for name, x in self._drawn(i).items()} for i in range(layers)]
        out = (batch, 1, heads_q, variant.head_dim_v)
        self.outs = [padded(out, DTYPES[variant.dtype], device) for _ in range(layers)]
        self.cos_sin = tables(self.pages.capacity, 16, DTYPES[variant.dtype], device)
        self.fill(torch.zeros_like(held), held)

    def _drawn(self, seed: int) -> dict[str, torch.Tensor]:
        return values(self.call.but(seed=seed), self.dut.device)

    def renew(self, seed: int) -> None:
        """Other queries, and other keys and values to append."""
        for i, given in enumerate(self.given):
            for name, x in self._drawn(seed + i).items():
                given[name].copy_(x)

    def fill(self, start: torch.Tensor, end: torch.Tensor) -> None:
        """Tokens start to end of every entry, in every layer."""
        _, at = self.pages.places(start, end)
        for layer, cache in enumerate(self.caches):
            generator = torch.Generator(self.dut.device).manual_seed(layer)
            for view in cache:
                drawn = torch.randn((at[1].numel(), *view.shape[2:]), generator=generator, device=self.dut.device)
                raw(view)[at] = raw(quantised(drawn) if self.dtype == E4M3 else drawn.to(self.dtype))

    def step(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(out, lse) of each layer."""
        options = {
            "cache_seqlens": self.lengths, "block_table": self.pages.table, "rotary_cos": self.cos_sin[0],
            "rotary_sin": self.cos_sin[1], "causal": True, "num_splits": self.num_splits, "return_softmax_lse": True,
        }  # fmt: skip
        return [
            self.dut.kvcache(given["q"], k, v, k=given["k"], v=given["v"], out=out, **options)
            for given, (k, v), out in zip(self.given, self.caches, self.outs, strict=True)
        ]

    def bits(self) -> list[torch.Tensor]:
        """All bytes of every cache, as views."""
        return [raw(view._base) for cache in self.caches for view in cache]

    def problems(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> list[str]:
        """What is wrong with a layer's output, by what its cache holds after the step."""
        held = self.lengths.long()
        at, place = self.pages.places(torch.zeros_like(held), held + 1)
        dense = {}
        for name, view in zip("kv", self.caches[layer], strict=True):
            dense[name] = out.new_zeros(held.numel(), int(held.max()) + 1, *view.shape[2:])
            dense[name][at] = take(view, place).to(out.dtype)
        q = self.given[layer]["q"]
        q = rotated(q, *self.cos_sin, held[:, None], interleaved=True)[0].to(q.dtype)
        rule = Rule(q.shape[-1] ** -0.5, CAUSAL, lengths_q=torch.ones_like(held), lengths_k=held + 1)
        return problems(out, lse, expected(q, **dense, rule=rule))


def _grow(report: Report, decoder: Decoder) -> None:
    """Capture a step, then replay it while the lengths grow: within the yardstick, and the bits that a call gives."""
    decoder.step()
    graph, results = captured(decoder.dut, decoder.step)
    for n, more in enumerate(GROWTH):
        held = decoder.lengths.long()
        decoder.fill(held + 1, held + more)
        decoder.lengths.add_(more)
        decoder.renew(100 * n)
        before = [bits.clone() for bits in decoder.bits()]
        for out, lse in results:
            out._base.fill_(float("nan"))
            lse.fill_(float("nan"))
        graph.replay()
        got = [x.clone() for pair in results for x in pair] + [bits.clone() for bits in decoder.bits()]
        for layer in {0, len(results) - 1}:
            report.note(f"replay {n}, layer {layer}", decoder.problems(layer, *results[layer]))
        for bits, were in zip(decoder.bits(), before, strict=True):
            bits.copy_(were)
        once = [x for pair in decoder.step() for x in pair] + decoder.bits()
        report.expect(all(map(same, got, once)), f"replay {n} differs from calls, num_splits {decoder.num_splits}")


def streams(dut: Dut, key: str, scale: Scale) -> None:
    """Threads with a stream each, many calls in flight: each result is that of a lone call, splits and all."""
    work = []
    for i in range(scale.threads):
        calls = [_of_one_size(key, scale, i + j) for j in range(2)]
        cache = Cache(16 * (i + 1))
        calls += [paged(key, (8, 2), 1, scale.entries_k, cache, num_splits=n, seed=20 + i) for n in (0, 3)]
        work.append(calls)
    in_threads(dut, work, scale.calls)
