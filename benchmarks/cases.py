"""The calls that are measured: dense and packed (varlen) ones, and the forward's grid of models × lengths × masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from registry.contract import WINDOW_OPEN

# name -> (query heads, key/value heads, head_dim)
MODELS = {
    "llama3-8b": (32, 8, 128),
    "llama2-7b": (32, 32, 128),
    "qwen2.5-7b": (28, 4, 128),
    "hd64": (16, 16, 64),
    "hd64-gqa": (16, 4, 64),
    "hd256": (32, 8, 256),
}
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS = 8192
SPINE = ("llama3-8b", "llama2-7b", "qwen2.5-7b", "hd64", "hd64-gqa"), (1024, 2048, 4096, 8192)
WORK = {"fwd": 1.0, "bwd": 2.5}  # an op's floating-point operations over the forward's: five products to two


@dataclass(frozen=True)
class Case:
    """One call. `name` is like 'llama3-8b/S2048/causal'.

    seqlen: of the queries; seqlen_k, head_dim_v: None where they are the same as those of the queries. window: keys
    that a query sees to the left of the diagonal, itself apart, and none to its right. lengths: of the sequences of a
    packed (varlen) self-attention, whose batch is their number and whose seqlen is the longest.
    """

    model: str
    seqlen: int
    causal: bool
    heads_q: int
    heads_kv: int
    head_dim: int
    batch: int
    seqlen_k: int | None = None
    head_dim_v: int | None = None
    window: int | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        keys = "" if self.seqlen_k is None else f"k{self.seqlen_k}"
        packed = "" if self.lengths is None else f"v{len(self.lengths)}"
        mask = "causal" if self.causal else "full" if self.window is None else f"window{self.window}"
        return f"{self.model}/S{self.seqlen}{keys}{packed}/{mask}"

    @property
    def op(self) -> str:
        return "fwd"

    @property
    def keys(self) -> int:
        return self.seqlen if self.seqlen_k is None else self.seqlen_k

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def bounds(self) -> tuple[int, int]:
        """window_left and window_right as the kernel takes them."""
        right = 0 if self.causal or self.window is not None else WINDOW_OPEN
        return WINDOW_OPEN if self.window is None else self.window, right

    @cached_property
    def flops(self) -> float:
        """2·H·(D + Dv) a visible pair; a causal mask counts as half, the convention of the published figures."""
        return 2.0 * self.heads_q * sum(self.dims) * sum(self._pairs())

    def _pairs(self) -> Iterator[float]:
        for length in self.lengths or (self.seqlen,) * self.batch:
            keys = self.keys if self.lengths is None else length
            if self.window is not None:
                yield visible_pairs(length, keys, *self.bounds)
            else:
                yield length * keys / (2 if self.causal else 1)

    def tflops(self, ms: float, op: str = "fwd") -> float:
        return WORK[op] * self.flops / ms / 1e9

    def facts(self, dtype: str = "bf16") -> dict[str, Any]:
        """The call as dispatch rows see it (docs/design.md)."""
        total = self.batch * self.seqlen if self.lengths is None else sum(self.lengths)
        return {
            "dtype": dtype, "head_dim": self.dims[0], "head_dim_v": self.dims[1], "batch": self.batch,
            "heads_q": self.heads_q, "heads_kv": self.heads_kv, "group": self.group,
            "seqlen_q": self.seqlen, "seqlen_k": self.keys, "total_q": total, "packed_rows": self.seqlen * self.group,
            "causal": int(self.bounds[1] == 0), "varlen": int(self.lengths is not None),
            "window": int(self.window is not None),
        }  # fmt: skip


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """How many (query, key) pairs a bottom-right aligned window shows."""
    offset = seqlen_k - seqlen_q
    spans = (
        min(i + offset + right + 1, seqlen_k) - max(i + offset - left, 0) for i in range(seqlen_q)
    )  # of keys, empty ones below 0
    return sum(max(span, 0) for span in spans)


def varlen(model: str, heads: tuple[int, int, int], lengths: tuple[int, ...], causal: bool) -> Case:
    """Packed self-attention over sequences of these lengths; heads: as of MODELS."""
    return Case(model, max(lengths), causal, *heads, batch=len(lengths), lengths=lengths)


def grid(models: dict[str, tuple[int, int, int]] = MODELS, seqlens: tuple[int, ...] = SEQLENS) -> list[Case]:
    """Every model at every length, full and causal, with batch max(1, 8192 / seqlen)."""
    return [
        Case(model, seqlen, causal, *heads_and_dim, batch=max(1, TOKENS // seqlen))
        for model, heads_and_dim in models.items()
        for seqlen in seqlens
        for causal in (False, True)
    ]


def spine() -> frozenset[str]:
    """Names of the 40 calls over which the backward's bars are."""
    models, seqlens = SPINE
    return frozenset(case.name for case in grid({model: MODELS[model] for model in models}, seqlens))
