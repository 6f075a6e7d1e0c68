"""What every check is made of: how large its problems are, and a report of all that is wrong with their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MASKS: tuple[Any, ...] = ((None, None), (None, 0), (64, 0), (3, 5))


@dataclass(frozen=True)
class Scale:
    """How large the problems are. groups, ratios: (heads_q, heads_kv); beyond: elements that an offset must pass."""

    seqlens: tuple[int, ...] = (1, 17, 64, 113, 128, 1024, 4097)
    groups: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {"mha": (3, 3), "4:1": (8, 2), "7:1": (14, 2), "mqa": (5, 1)}
    )
    near: tuple[int, int] = (113, 128)
    ragged: tuple[int, int] = (700, 1300)
    # Packed heads: more than a tile has rows, and all that do and do not divide one.
    ratios: tuple[tuple[int, int], ...] = ((4, 2), (3, 1), (8, 2), (10, 2), (6, 1), (14, 2), (16, 2), (80, 1), (3, 3))
    decode: tuple[tuple[int, int], ...] = ((1, 300), (5, 113), (17, 128), (113, 200), (130, 64))
    entries_q: tuple[int, ...] = (113, 0, 1, 64, 300, 17, 0, 129)
    entries_k: tuple[int, ...] = (113, 40, 500, 1, 0, 333, 0, 64)
    short: tuple[int, int, int] = (256, 64, 400)  # sequences, of how many tokens at least and at most
    long: tuple[int, ...] = (4097, 1, 2500)
    grid_batch: int = 1100  # with 64 heads: more blocks than a 16-bit grid dimension holds
    beyond: int = 2**31
    threads: int = 4
    calls: int = 20
    draws: int = 100
    longest: int = 700  # that is drawn
    # Over a KV cache: page sizes; queries of an entry; splits of the keys, 0 for as many as the runtime likes.
    pages: tuple[int, ...] = (1, 3, 16, 48, 64, 128, 256, 1024)
    few_queries: tuple[int, ...] = (1, 2, 5, 17)
    splits: tuple[int, ...] = (0, 1, 2, 3, 7)
    many_splits: tuple[int, ...] = (2, 3, 8, 17, 64, 128)
    long_keys: tuple[int, ...] = (1300, 700, 2049)
    longest_keys: int = 5000
    mixed_q: tuple[int, ...] = (1, 113, 1, 0, 40, 1, 17)
    mixed_k: tuple[int, ...] = (300, 113, 17, 64, 500, 0, 1025)
    new_tokens: tuple[int, ...] = (1, 2, 17)
    layers: int = 32
    # Gradients: lengths, also of a pair that no tile divides; runs that must agree; random draws; how long, with how
    # many heads, an array is that has more elements than `beyond`.
    bwd_seqlens: tuple[int, ...] = (1, 17, 64, 113, 128, 300, 1100)
    bwd_ragged: tuple[int, int] = (200, 330)
    bwd_runs: int = 1000
    bwd_draws: int = 40
    bwd_long: tuple[int, int] = (8192, 64)
    most_heads: int = 65_535  # heads · heads is beyond `beyond`
    thin: bool = False  # every pair of factor values instead of the product


FULL = Scale()
TINY = Scale(
    seqlens=(1, 17, 40), near=(21, 24), ragged=(37, 53), ratios=((4, 2), (3, 1), (14, 2)), decode=((1, 30), (21, 40)),
    entries_q=(21, 0, 1, 40), entries_k=(21, 9, 30, 0), short=(12, 3, 20), long=(70, 1), grid_batch=3, beyond=2**14,
    threads=2, calls=3, draws=16, longest=40, pages=(1, 3, 16),
    few_queries=(1, 3), splits=(0, 1, 3), many_splits=(2, 9), long_keys=(70, 33), longest_keys=90,
    mixed_q=(1, 20, 0, 5), mixed_k=(30, 20, 8, 41), new_tokens=(1, 4), layers=3, bwd_seqlens=(1, 17, 40),
    bwd_ragged=(37, 53), bwd_runs=4, bwd_draws=8, bwd_long=(40, 4), most_heads=150, thin=True,
)  # fmt: skip


class Report:
    """Gathers what is wrong over many cases, so that one run tells all of it."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def note(self, case: str, wrong: list[str]) -> None:
        self.failures += [f"{case}: {text}" for text in wrong]

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(otherwise)

    def done(self, shown: int = 8) -> None:
        """AssertionError that lists what was found, if anything was."""
        more = f"\n… and {len(self.failures) - shown} more" if len(self.failures) > shown else ""
        assert not self.failures, f"{len(self.failures)} failures:\n" + "\n".join(self.failures[:shown]) + more
