"""The calls on which tiles are chosen: a few typical ones for each class of the dispatch table."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.cases import Case, dense, varlen
from kernels.tables import Tiles, groups


@dataclass(frozen=True)
class Workload:
    """A class of calls. rows: the least and the most rows of a query tile that can make sense for it."""

    cases: tuple[Case, ...]
    rows: tuple[int, int]


def lengths(count: int, low: int = 64, high: int = 400, seed: int = 0) -> tuple[int, ...]:
    """Sequence lengths, drawn evenly."""
    draw = random.Random(seed)
    return tuple(draw.randint(low, high) for _ in range(count))


def workloads(head_dim: int, head_dim_v: int) -> dict[str, Workload]:
    """Class name → its cases with these head dims. Groups of 1, 4, 7 and 8 query heads; calls of 0.1 to 1 ms."""

    def case(heads_q: int, heads_kv: int, seqlen: int, batch: int, mask: str | int, keys: int | None = None) -> Case:
        window = mask if isinstance(mask, int) else None
        model, causal = f"{heads_q}h{heads_kv}", mask == "causal"
        return dense(model, seqlen, causal, heads_q, heads_kv, head_dim, batch, keys, head_dim_v, window)

    def short_sequences(heads_q: int, heads_kv: int, causal: bool) -> Case:
        heads = heads_q, heads_kv, head_dim
        return varlen(f"{heads_q}h{heads_kv}", heads, lengths(48), causal, head_dim_v)

    return {
        "packed_decode": Workload(
            (
                case(32, 8, 1, 16, "full", 8192),
                case(28, 4, 4, 16, "causal", 4096),
                case(32, 4, 8, 16, "causal", 4096),
            ),
            (16, 64),
        ),
        "packed_short": Workload(
            (
                case(32, 8, 32, 8, "causal", 4096),
                case(28, 4, 64, 8, "causal", 2048),
                case(32, 4, 256, 4, "causal", 2048),
                case(32, 8, 128, 32, "full"),
            ),
            (32, 128),
        ),
        "short": Workload(
            (
                case(32, 32, 1, 8, "full", 4096),
                case(32, 32, 16, 8, "causal", 2048),
                case(16, 16, 64, 16, "causal", 4096),
            ),
            (16, 64),
        ),
        "packed_window": Workload((case(32, 8, 8192, 1, 1023), case(28, 4, 4096, 1, 255)), (64, 128)),
        "window": Workload((case(16, 16, 8192, 1, 1023), case(32, 32, 4096, 1, 255)), (64, 128)),
        "packed_varlen": Workload((short_sequences(32, 8, False), short_sequences(28, 4, True)), (64, 128)),
        "varlen": Workload((short_sequences(16, 16, False), short_sequences(32, 32, True)), (64, 128)),
        "packed_causal": Workload(
            (
                case(32, 8, 1024, 4, "causal"),
                case(32, 8, 4096, 1, "causal"),
                case(28, 4, 2048, 2, "causal"),
                case(32, 4, 2048, 2, "causal"),
            ),
            (64, 128),
        ),
        "packed": Workload((case(32, 8, 1024, 4, "full"), case(28, 4, 4096, 1, "full")), (64, 128)),
        "default": Workload(
            (
                case(16, 16, 1024, 8, "full"),
                case(32, 32, 4096, 1, "full"),
                case(16, 16, 2048, 4, "causal"),
                case(32, 32, 4096, 1, "causal"),
            ),
            (64, 128),
        ),
    }


def packings(call_class: str, table: Tiles) -> tuple[bool, ...]:
    """Which ways of packing are measured for a class: both where every call of it has a group."""
    return (False, True) if groups(table.classes[call_class]) else (False,)
