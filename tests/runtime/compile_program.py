"""Compiled calls against eager ones, in a process of their own.

    python -m tests.runtime.compile_program 'torch first' inductor           # on stand-ins, on the CPU
    python -m tests.runtime.compile_program 'torch first' inductor cuda      # on a GPU, from CUBINERY_REGISTRY

ORDER: which of torch and runtime is imported first. Prints one JSON object: {case: same results}, and how many frames
Dynamo looked at.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ORDERS = {"torch first": ("torch", "runtime"), "runtime first": ("runtime", "torch")}


def main(order: str, backend: str, device: str = "cpu") -> None:
    for name in ORDERS[order]:
        importlib.import_module(name)
    import torch

    import runtime

    with tempfile.TemporaryDirectory() as folder:
        registries = stand_ins(Path(folder)) if device == "cpu" else [None, None]
        runtime.configure(registry=registries[0])
        starts = torch.tensor([0, 20, 64], dtype=torch.int32, device=device)
        found = {
            "dense": training(torch, backend, device, lambda q, k, v: runtime.flash_attn(q * 1.5, k, v, causal=True)),
            "varlen": training(torch, backend, device, lambda q, k, v: runtime.flash_attn_varlen(
                q[0] * 1.5, k[0], v[0], cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True)[0]),
        }  # fmt: skip
        runtime.configure(registry=registries[1])
        found["decode with append"] = decode(torch, backend, device, runtime)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    print(json.dumps({"same": found, "frames": frames}))


def stand_ins(folder: Path) -> list[Path]:
    """Registries of toy kernels for training and for decode, behind a driver that runs them on the CPU."""
    from runtime.load import session
    from tests.runtime.backward_kernels import write_backward_registry
    from tests.runtime.cache_kernels import write_cache_registry
    from tests.runtime.fakes import FakeBackend

    made = FakeBackend()
    session.BACKEND = lambda: made
    paths = [folder / name for name in ("training.db", "cache.db")]
    write_backward_registry(paths[0])
    write_cache_registry(paths[1])
    return paths


def close(torch: Any, a: Any, b: Any) -> bool:
    """What a compiler makes of the code around our calls rounds in its own way."""
    return bool(torch.allclose(a.float(), b.float(), atol=2e-2, rtol=2e-2))


def training(torch: Any, backend: str, device: str, attend: Callable[..., Any]) -> bool:
    """Cold and warm, with gradients and without."""
    model = lambda q, k, v: attend(q, k, v).float().sin()  # noqa: E731
    compiled = torch.compile(model, backend=backend)
    same = []
    for _ in range(2):
        inputs = [torch.randn(1, 64, heads, 64, device=device).bfloat16() for heads in (4, 2, 2)]
        results = []
        for run in (compiled, model):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves)
            out.sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves), run(*inputs)])
        same.append(all(close(torch, a, b) for a, b in zip(*results, strict=True)))
    return all(same)


def decode(torch: Any, backend: str, device: str, runtime: Any) -> bool:
    def step(q: Any, pages: Any, new: Any, used: Any, table: Any) -> Any:
        out = runtime.flash_attn_with_kvcache(q * 1.5, pages[:, 0], pages[:, 1], new, new, cache_seqlens=used,
                                              block_table=table, causal=True, num_splits=2)  # fmt: skip
        return out.float().sin()

    compiled, same = torch.compile(step, backend=backend), []
    torch.set_default_device(device)
    pages = torch.randn(8, 2, 16, 2, 64).bfloat16()
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    for length in (5, 6):
        q, new = torch.randn(2, 1, 4, 64).bfloat16(), torch.randn(2, 1, 2, 64).bfloat16()
        used, caches = torch.full((2,), length, dtype=torch.int32), (pages.clone(), pages.clone())
        with torch.no_grad():
            outs = [run(q, cache, new, used, table) for run, cache in zip((compiled, step), caches, strict=True)]
        same.append(close(torch, *outs) and close(torch, *caches) and not torch.equal(caches[0], pages))
    return all(same)


if __name__ == "__main__":
    main(*sys.argv[1:])
