"""Host time of warm calls along each path of the runtime, in nanoseconds, as one JSON object: see host_paths.

Run as a file, so that the runtime (and with --stand-in its test doubles) comes from whatever checkout PYTHONPATH names.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--registry", action="append", default=[])
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--series", type=int, default=15)
    options = parser.parse_args()
    import runtime

    device = "cpu" if options.stand_in else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        registries = _stand_in(Path(folder)) if options.stand_in else options.registry * 2
        found: dict[str, float] = {}
        for registry, paths in zip(registries, (training_paths, cache_paths), strict=True):
            runtime.configure(registry=registry)
            for name, call in paths(runtime, device).items():
                found[name] = median_ns(call, options.calls, options.series, device)
    print(json.dumps(found))


def _stand_in(folder: Path) -> list[Path]:
    """Registries of toy kernels, and a driver that launches nothing."""
    try:
        from runtime.load import session
    except ImportError:  # earlier commits
        from runtime import session  # type: ignore[attr-defined, no-redef]
    from tests.runtime.backward_kernels import write_backward_registry
    from tests.runtime.cache_kernels import write_cache_registry
    from tests.runtime.fakes import FakeBackend, FakeDriver

    class NoLaunch(FakeDriver):
        def launch(self, *_: Any) -> tuple[Any]:
            return (self.success,)

    backend = FakeBackend(NoLaunch())
    session.BACKEND = lambda: backend
    paths = [folder / name for name in ("training.db", "cache.db")]
    write_backward_registry(paths[0])
    write_cache_registry(paths[1])
    return paths


def training_paths(runtime: Any, device: str) -> dict[str, Callable[[], Any]]:
    q, k, v = (torch.randn(1, 64, heads, 64, device=device).bfloat16() for heads in (8, 2, 2))
    starts = torch.tensor([0, 20, 64], dtype=torch.int32, device=device)
    packed = [x[0] for x in (q, k, v)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    out = runtime.flash_attn(*leaves, causal=True)

    def forward_backward() -> None:
        runtime.flash_attn(*leaves, causal=True).backward(dout)
        for leaf in leaves:
            leaf.grad = None

    buffers = [torch.randn(1, 8192, 2, 64, device=device).bfloat16() for _ in range(2)]
    token, lengths = q[:, :1].contiguous(), itertools.count(1)

    def grown() -> None:
        n = next(lengths) % 8192 + 1
        runtime.flash_attn(token, *(buffer[:, :n] for buffer in buffers), causal=True)

    sixteen = itertools.cycle([[buffer[:, : 64 + 8 * i] for buffer in buffers] for i in range(16)])
    totals = itertools.count(1)
    long = [torch.randn(4096, heads, 64, device=device).bfloat16() for heads in (8, 2, 2)]

    def new_totals() -> None:
        n = next(totals) % 4000 + 64
        runtime.flash_attn_varlen(*(x[:n] for x in long), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=44)

    return {
        "dense, growing keys": grown,
        "dense, 16 lengths": lambda: runtime.flash_attn(token, *next(sixteen), causal=True),
        "varlen, new totals": new_totals,
        "dense": lambda: runtime.flash_attn(q, k, v, causal=True),
        "dense with LSE": lambda: runtime.flash_attn(q, k, v, causal=True, return_lse=True),
        "varlen": lambda: runtime.flash_attn_varlen(
            *packed, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=44, max_seqlen_k=44, causal=True
        ),
        "forward, recorded": lambda: runtime.flash_attn(*leaves, causal=True),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "forward and backward": forward_backward,
    }


def cache_paths(runtime: Any, device: str) -> dict[str, Callable[[], Any]]:
    q, new = (torch.randn(4, 1, heads, 64, device=device).bfloat16() for heads in (8, 2))
    pages = torch.randn(64, 2, 16, 2, 64, device=device).bfloat16()
    k, v = pages.unbind(1)
    table = torch.arange(64, dtype=torch.int32, device=device).view(4, 16)
    used = torch.full((4,), 100, dtype=torch.int32, device=device)
    attn = runtime.flash_attn_with_kvcache
    return {
        "decode": lambda: attn(q, k, v, cache_seqlens=used, block_table=table, causal=True, num_splits=2),
        "decode with append": lambda: attn(
            q, k, v, new, new, cache_seqlens=used, block_table=table, causal=True, num_splits=2
        ),
    }


def median_ns(call: Callable[[], Any], calls: int, series: int, device: str) -> float:
    """Nanoseconds a call, the median over series. The queue is emptied before each; without a GPU only this thread's
    own time counts, whatever else the machine does."""
    now = time.perf_counter_ns if device == "cuda" else time.thread_time_ns
    for _ in range(calls):
        call()
    times = []
    gc.disable()
    for _ in range(series):
        if device == "cuda":
            torch.cuda.synchronize()
        start = now()
        for _ in range(calls):
            call()
        times.append((now() - start) / calls)
    gc.enable()
    return statistics.median(times)


if __name__ == "__main__":
    main()
