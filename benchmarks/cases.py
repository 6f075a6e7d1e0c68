"""The shapes that are measured: models × sequence lengths × {full, causal}, about 8,192 tokens a call."""

from __future__ import annotations

from dataclasses import dataclass

# name -> (query heads, key/value heads, head_dim)
MODELS = {
    "llama3-8b": (32, 8, 128),
    "llama2-7b": (32, 32, 128),
    "qwen2.5-7b": (28, 4, 128),
    "hd64": (16, 16, 64),
    "hd64-gqa": (16, 4, 64),
}
# What tiles are chosen on: these head dims have no model above, but tiles of their own.
SWEPT = {**MODELS, "hd96": (32, 8, 96), "hd192": (32, 8, 192), "hd256": (32, 8, 256)}
SEQLENS = (1024, 2048, 4096, 8192)
TOKENS = 8192


@dataclass(frozen=True)
class Case:
    """One self-attention prefill. `name` is like 'llama3-8b/S2048/causal'."""

    model: str
    seqlen: int
    causal: bool
    heads_q: int
    heads_kv: int
    head_dim: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.model}/S{self.seqlen}/{'causal' if self.causal else 'full'}"

    @property
    def flops(self) -> float:
        """4·B·H·S²·D, half of it when causal: the convention of the published figures."""
        return 4.0 * self.batch * self.heads_q * self.seqlen**2 * self.head_dim / (2 if self.causal else 1)

    def tflops(self, ms: float) -> float:
        return self.flops / ms / 1e9


def grid(models: dict[str, tuple[int, int, int]] = MODELS, seqlens: tuple[int, ...] = SEQLENS) -> list[Case]:
    """Every model at every length, full and causal, with batch max(1, 8192 / seqlen)."""
    return [
        Case(model, seqlen, causal, *heads_and_dim, batch=max(1, TOKENS // seqlen))
        for model, heads_and_dim in models.items()
        for seqlen in seqlens
        for causal in (False, True)
    ]
