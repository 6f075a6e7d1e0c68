"""Decode steps that are measured: one query token over a KV cache, contiguous or in pages, bf16 or e4m3."""

from __future__ import annotations

from typing import Any

from benchmarks import measure
from benchmarks.cases import Case
from tests.support.call import Cache

HEADS_Q, HEADS_KV, HEAD_DIM = 32, 8, 128
PAGES = (16, 64)
# (batch, context): the cases of the bars, and one sequence alone.
SIZES = ((32, 8192), (128, 4096), (256, 4096), (32, 32768))
ALONE = (1, 131072)
E4M3_MAX = 448.0


def decode(batch: int, context: int, page: int | None = None, kv: str = "bf16") -> Case:
    """A step that is named like '32x8192/page16/bf16'. page: None for a contiguous cache. kv: 'bf16' or 'e4m3'."""
    layout = f"page{page}" if page else "contiguous"
    return Case(
        1, context, HEADS_Q, HEADS_KV, batch, HEAD_DIM, HEAD_DIM, cache=Cache(page, kv_dtype=kv),
        name=f"{batch}x{context}/{layout}/{kv}",
    )  # fmt: skip


def kept(case: Case) -> Cache:
    """How the keys and values are kept."""
    assert case.cache is not None
    return case.cache


def kv_bytes(case: Case) -> int:
    """Of all keys and values, which a step has to read once."""
    return 2 * case.batch * case.seqlen_k * HEADS_KV * HEAD_DIM * (1 if kept(case).kv_dtype == "e4m3" else 2)


def every(sizes: tuple[tuple[int, int], ...] = (*SIZES, ALONE)) -> list[Case]:
    """Every size in every layout, bf16 and e4m3."""
    return [decode(*size, page, kv) for size in sizes for kv in ("bf16", "e4m3") for page in (None, *PAGES)]


class Caches:
    """The arrays of all cases of one size: the same bytes serve as one contiguous cache and as pages in any order.

    q: (batch, 1, HEADS_Q, HEAD_DIM) bf16. Every cache is several times the L2, so that no step finds it there.
    """

    def __init__(self, batch: int, context: int):
        import torch

        device, shape = measure.DEVICE, (batch, context, HEADS_KV, HEAD_DIM)
        self.generator = torch.Generator(device).manual_seed(0)
        self.batch, self.context, bf16 = batch, context, torch.bfloat16
        self.q = torch.randn((batch, 1, HEADS_Q, HEAD_DIM), generator=self.generator, device=device, dtype=bf16)
        drawn = [torch.randn(shape, generator=self.generator, device=device, dtype=bf16) for _ in range(2)]
        self.kv = {"bf16": drawn, "e4m3": []}
        self.descale = [(x[0].float().abs().amax((0, 2)) / E4M3_MAX).contiguous() for x in drawn]
        for x, factor in zip(drawn, self.descale, strict=True):
            low = torch.empty(shape, device=device, dtype=torch.float8_e4m3fn)
            for b in range(batch):  # in parts: the fp32 of it all would take four times the room
                low[b] = (x[b].float() / factor[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(low.dtype)
            self.kv["e4m3"].append(low)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.tables = {page: self._table(page) for page in PAGES}

    def _table(self, page: int) -> Any:
        import torch

        pages = self.batch * self.context // page
        order = torch.randperm(pages, generator=self.generator, device=measure.DEVICE)
        return order.int().view(self.batch, self.context // page)

    def stored(self, case: Case) -> tuple[Any, Any]:
        """k and v as the case has them: (pages, page_size, heads, dim), or (batch, context, heads, dim)."""
        (k, v), page = self.kv[kept(case).kv_dtype], kept(case).page_size
        if page is None:
            return k, v
        return k.view(-1, page, HEADS_KV, HEAD_DIM), v.view(-1, page, HEADS_KV, HEAD_DIM)

    def options(self, case: Case) -> dict[str, Any]:
        """Keywords of flash_attn_with_kvcache besides q and the cache."""
        found: dict[str, Any] = {"cache_seqlens": self.lengths}
        if (page := kept(case).page_size) is not None:
            found["block_table"] = self.tables[page]
        if kept(case).kv_dtype == "e4m3":
            found["k_descale"], found["v_descale"] = self.descale
        return found

    def exact(self, case: Case, entry: int, quantised: bool = True) -> Any:
        """One entry's output in float64, (1, HEADS_Q, HEAD_DIM). quantised: of what the cache holds, else of what an
        e4m3 cache was made from."""
        import torch

        cache, tensors = kept(case), []
        whole = case if quantised else decode(case.batch, case.seqlen_k, cache.page_size)
        for x, factor in zip(self.stored(whole), self.descale, strict=True):
            if cache.page_size is None:
                rows = x[entry]
            else:  # as bytes: not every torch can index float8
                rows = x.view(torch.uint8)[self.tables[cache.page_size][entry].long()].view(x.dtype).flatten(0, 1)
            rows = rows.to(self.q.dtype).double().transpose(0, 1)  # every e4m3 is a bf16
            tensors.append(rows * factor.double()[:, None, None] if cache.kv_dtype == "e4m3" and quantised else rows)
        k, v = tensors
        scores = self.q[entry].double().view(HEADS_KV, case.group, HEAD_DIM) @ k.mT * HEAD_DIM**-0.5
        return (scores.softmax(-1) @ v).flatten(0, 1)[None]

    def error(self, case: Case, out: Any, quantised: bool = True) -> float:
        """Relative error of the first and the last entry of an output (batch, 1, HEADS_Q, HEAD_DIM)."""
        entries = sorted({0, self.batch - 1})
        return max(measure.relative_error(out[b], self.exact(case, b, quantised)) for b in entries)
