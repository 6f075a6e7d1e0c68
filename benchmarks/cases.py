"""The calls that are measured: dense and packed (varlen) ones, and the forward's grid of models × lengths × masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from registry.contract import WINDOW_OPEN
from tests.support.call import CAUSAL, OPEN, Call, Dims, packed

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


@dataclass(frozen=True, repr=False)
class Case(Call):
    """A call that is measured: every field of a `Call`, and the name that result files have for it."""

    name: str = ""

    @property
    def op(self) -> str:
        return "fwd_paged" if self.cache else "fwd"

    @property
    def dims(self) -> Dims:
        return self.head_dim, self.head_dim_v

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def causal(self) -> bool:
        return self.window == CAUSAL

    @property
    def left(self) -> int | None:
        """Keys that a query sees to the left of the diagonal, itself apart; None: all."""
        return self.window[0]

    @property
    def bounds(self) -> tuple[int, int]:
        """window_left and window_right as the kernel takes them."""
        left, right = (WINDOW_OPEN if side is None else side for side in self.window)
        return left, right

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Of the sequences of a packed self-attention."""
        ends = self.cu_seqlens_q
        return None if ends is None else tuple(b - a for a, b in pairwise(ends))

    @cached_property
    def flops(self) -> float:
        """2·H·(D + Dv) a visible pair; a causal mask counts as half, the convention of the published figures."""
        return 2.0 * self.heads_q * sum(self.dims) * sum(self._pairs())

    def _pairs(self) -> Iterator[float]:
        for (_, queries), (_, keys) in zip(self.queries.entries, self.keys.entries, strict=True):
            seqlen_q, seqlen_k = queries.stop - queries.start, keys.stop - keys.start
            if self.left is not None:
                yield visible_pairs(seqlen_q, seqlen_k, *self.bounds)
            else:
                yield seqlen_q * seqlen_k / (2 if self.causal else 1)

    def tflops(self, ms: float, op: str = "fwd") -> float:
        return WORK[op] * self.flops / ms / 1e9

    def facts(self, dtype: str = "bf16") -> dict[str, Any]:
        """The call as dispatch rows see it (docs/design.md)."""
        (seqlen_q, seqlen_k), tokens = self.longest, self.queries
        return {
            "dtype": dtype, "head_dim": self.head_dim, "head_dim_v": self.head_dim_v, "batch": self.batch,
            "heads_q": self.heads_q, "heads_kv": self.heads_kv, "group": self.group,
            "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "total_q": tokens.arrays * tokens.seqlen,
            "packed_rows": seqlen_q * self.group, "causal": int(self.bounds[1] == 0), "varlen": int(tokens.is_packed),
            "window": int(self.left is not None), **({"kv_dtype": self.cache.kv_dtype} if self.cache else {}),
        }  # fmt: skip


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """How many (query, key) pairs a bottom-right aligned window shows."""
    offset = seqlen_k - seqlen_q
    spans = (
        min(i + offset + right + 1, seqlen_k) - max(i + offset - left, 0) for i in range(seqlen_q)
    )  # of keys, empty ones below 0
    return sum(max(span, 0) for span in spans)


def dense(
    model: str, seqlen: int, causal: bool, heads_q: int, heads_kv: int, head_dim: int, batch: int,
    seqlen_k: int | None = None, head_dim_v: int | None = None, window: int | None = None,
) -> Case:  # fmt: skip
    """A call that is named like 'llama3-8b/S2048/causal'.

    seqlen: of the queries; seqlen_k, head_dim_v: None where they are the same as those of the queries. window: keys
    that a query sees to the left of the diagonal, itself apart, and none to its right.
    """
    mask = "causal" if causal else "full" if window is None else f"window{window}"
    keys = "" if seqlen_k is None else f"k{seqlen_k}"
    return Case(
        seqlen, seqlen if seqlen_k is None else seqlen_k, heads_q, heads_kv, batch, head_dim,
        head_dim if head_dim_v is None else head_dim_v, name=f"{model}/S{seqlen}{keys}/{mask}",
        window=CAUSAL if causal else OPEN if window is None else (window, 0),
    )  # fmt: skip


def varlen(
    model: str, heads: tuple[int, int, int], lengths: tuple[int, ...], causal: bool, head_dim_v: int | None = None
) -> Case:
    """Packed self-attention over sequences of these lengths; heads: as of MODELS."""
    heads_q, heads_kv, head_dim = heads
    tokens, ends = packed(lengths)
    name = f"{model}/S{max(lengths)}v{len(lengths)}/{'causal' if causal else 'full'}"
    return Case(
        tokens, tokens, heads_q, heads_kv, len(lengths), head_dim, head_dim_v or head_dim, cu_seqlens_q=ends,
        cu_seqlens_k=ends, window=CAUSAL if causal else OPEN, name=name,
    )  # fmt: skip


def grid(models: dict[str, tuple[int, int, int]] = MODELS, seqlens: tuple[int, ...] = SEQLENS) -> list[Case]:
    """Every model at every length, full and causal, with batch max(1, 8192 / seqlen)."""
    return [
        dense(model, seqlen, causal, *heads_and_dim, batch=max(1, TOKENS // seqlen))
        for model, heads_and_dim in models.items()
        for seqlen in seqlens
        for causal in (False, True)
    ]


def spine() -> frozenset[str]:
    """Names of the 40 calls over which the backward's bars are."""
    models, seqlens = SPINE
    return frozenset(case.name for case in grid({model: MODELS[model] for model in models}, seqlens))
