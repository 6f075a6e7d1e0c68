"""Checks of many launches: the same bits each time, in captured graphs, from several threads."""

from __future__ import annotations

from tests.gpu.calls import dense, of_one_size, varlen
from tests.gpu.dut import Dut
from tests.gpu.harness import cold_capture, forced, in_threads, made, repeated, replays
from tests.gpu.report import Report, Scale
from tests.support.call import CAUSAL, lengths


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """The same call gives the same bits, with other work in between: dense and varlen, heads packed or not."""
    report = Report()
    plain = dense(key, 2, (8, 2), scale.ragged, seed=8)
    packed = varlen(key, (8, 2), lengths(scale.entries_q, scale.entries_k), seed=8, sink="fp32")
    with forced(dut, key):
        for pack in (False, True):
            dut.force(key, pack)
            for call in (plain, plain.but(window=CAUSAL), packed, packed.but(window=CAUSAL)):
                repeated(report, dut, call, call.but(seed=9), f", heads packed {pack}")
    report.done()


def graph_capture(dut: Dut, key: str, scale: Scale) -> None:
    """A cold call during capture is refused; a warm one is captured, and its replays see new contents and lengths."""
    report = Report()
    plain = dense(key, 2, (4, 2), scale.ragged, seed=9, window=CAUSAL, sink="fp32", alibi="batch")
    cold = made(plain, dut.device)
    dut.force(key)  # forgets what was loaded
    cold_capture(report, dut, cold)
    sizes = enumerate(of_one_size(scale.entries_q, scale.entries_k))
    ragged = [varlen(key, (4, 2), entries, seed=seed) for seed, entries in sizes]
    with forced(dut, key):
        for pack in (False, True):
            dut.force(key, pack)
            replays(report, dut, [plain, plain.but(seed=10), plain.but(seed=11)])
            replays(report, dut, ragged)
            replays(report, dut, [call.but(window=CAUSAL) for call in ragged])
    report.done()


def streams(dut: Dut, key: str, scale: Scale) -> None:
    """Threads with a stream each, many calls in flight, four calls a thread: each result is that of a lone call.

    The varlen calls of a thread look alike: only what cu_seqlens, seqused and sink point to differs.
    """
    short, long = scale.ragged
    sizes = of_one_size(scale.entries_q, scale.entries_k)[:2]
    work = []
    for i in range(scale.threads):
        calls = [dense(key, 1, (4, 2), (short - i, long - 9 * i - j), seed=20 + i, window=CAUSAL) for j in range(2)]
        work.append(calls + [varlen(key, (4, 2), entries, seed=20 + i, sink="fp32") for entries in sizes])
    in_threads(dut, work, scale.calls)
