"""Prefill over a paged KV cache against the same keys contiguous: prefill.free.json and prefill.sm120.json.

    CUBINERY_REGISTRY=registry.db python -m benchmarks.prefill [--modes free sm120]

The last `chunk` tokens of `context` attend causally to all of it: `runtime.flash_attn` over contiguous keys, and
`runtime.flash_attn_with_kvcache` over pages of 16 and 64 in random order, in turn, bf16. over_contiguous: our paged
time over our contiguous time; ratio: SDPA's FlashAttention-2 (contiguous) over our paged time, where the chunk is all
of the context: SDPA aligns a shorter one top-left.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import measure, published
from benchmarks.cases import Case
from benchmarks.cubins import BenchmarkError
from benchmarks.ours import MODES, Ours
from tests.support.call import CAUSAL

PAGES = (16, 64)
MAX_ERROR = 1e-2  # relative, of norms: two of our kernels on the same numbers
MAX_PAGED = 1.10


def prefill(batch: int, chunk: int, context: int, heads_q: int, heads_kv: int, head_dim: int) -> Case:
    name = f"{batch}x{chunk}of{context}/d{head_dim}"
    return Case(chunk, context, heads_q, heads_kv, batch, head_dim, head_dim, window=CAUSAL, name=name)


CASES = (
    *(prefill(2, 4096, 4096, 32, 8, 128), prefill(8, 1024, 1024, 32, 8, 128)),
    *(prefill(8, 512, 8192, 32, 8, 128), prefill(4, 4096, 4096, 16, 4, 64)),
    prefill(2, 4096, 4096, 16, 4, 256),
)


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("prefill", __doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    for mode in options.modes:
        _mode(mode, options)
    return 0


def _mode(mode: str, options: argparse.Namespace) -> None:
    ours = Ours(measure.registry_path(options.registry), mode)
    rows = [row for case in CASES for row in one_case(ours, case, options.repeats)]
    value = measure.result(mode, [row for row in rows if row["ratio"] is not None])
    value |= {"rows": rows, "bars": [published.at_most("paged over contiguous", worst(rows), MAX_PAGED)]}
    print("\n".join([*map(line, rows), *map(published.line, value["bars"])]))
    print(f"{measure.write(options.out, f'prefill.{mode}', value)}: {mode}")


def worst(rows: Sequence[dict[str, Any]]) -> float:
    return max(row["over_contiguous"] for row in rows)


def one_case(ours: Ours, case: Case, repeats: int) -> list[dict[str, Any]]:
    """A row for each page size. BenchmarkError where pages change the result."""
    steps, peer = _calls(ours, case)
    right = steps["contiguous"]()
    for name, step in steps.items():
        error = measure.relative_error(step(), right)
        if not error <= MAX_ERROR:
            raise BenchmarkError(f"{case.name}/{name}: differs from contiguous keys by {error:.2e}")
    runs: dict[str, measure.Run] = {name: partial(measure.call, [step]) for name, step in steps.items()}
    if case.seqlen_q == case.seqlen_k:
        runs["sdpa"] = partial(measure.call, [peer])
    ms = {name: statistics.median(found) for name, found in measure.interleaved(runs, 1, repeats).items()}
    return [
        {
            "case": f"{case.name}/page{page}",
            "ours": round(ms[f"page{page}"], 5),
            "contiguous": round(ms["contiguous"], 5),
            "over_contiguous": round(ms[f"page{page}"] / ms["contiguous"], 4),
            "peer": round(ms["sdpa"], 5) if "sdpa" in ms else None,
            "ratio": round(ms["sdpa"] / ms[f"page{page}"], 4) if "sdpa" in ms else None,
        }
        for page in PAGES
    ]


def _calls(ours: Ours, case: Case) -> tuple[dict[str, Callable[[], Any]], Callable[[], Any]]:
    """(ours by layout, SDPA's), on the same numbers."""
    import torch

    made = torch.Generator(device=measure.DEVICE).manual_seed(0)
    new = partial(torch.randn, generator=made, device=measure.DEVICE, dtype=torch.bfloat16)
    q = new(case.batch, case.seqlen_q, case.heads_q, case.head_dim)
    k, v = (new(case.batch, case.seqlen_k, case.heads_kv, case.head_dim) for _ in "kv")
    steps: dict[str, Callable[[], Any]] = {"contiguous": partial(ours.runtime.flash_attn, q, k, v, causal=True)}
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=measure.DEVICE)
    for page in PAGES:
        pages = case.batch * case.seqlen_k // page
        order = torch.randperm(pages, generator=made, device=measure.DEVICE)
        k_pages, v_pages = (torch.empty_like(x).view(pages, page, *x.shape[2:]) for x in (k, v))
        k_pages[order], v_pages[order] = k.view(k_pages.shape), v.view(v_pages.shape)
        table = order.to(torch.int32).view(case.batch, -1)
        given = {"block_table": table, "cache_seqlens": lengths, "causal": True}
        steps[f"page{page}"] = partial(ours.runtime.flash_attn_with_kvcache, q, k_pages, v_pages, **given)
    return steps, partial(_sdpa, q, k, v)


def _sdpa(q: Any, k: Any, v: Any) -> Any:
    with measure.flash_backend():
        return measure.sdpa(q, k, v, True)


def line(row: dict[str, Any]) -> str:
    peer = f"   FA2 {row['ratio']:.2f}x" if row["ratio"] is not None else ""
    return f"  {row['case']:<28} {row['ours']:8.4f} ms   over_contiguous {row['over_contiguous']:.3f}{peer}"


if __name__ == "__main__":
    sys.exit(measure.exit_code(main))
