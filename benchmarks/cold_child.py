"""One fresh process of cold_start: prints one JSON line. Run as a script: it imports nothing of ours before its clock.

python benchmarks/cold_child.py ours|sdpa|whole|bindings cuda|cpu
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]
Call = Callable[[], torch.Tensor]


def main(which: str, device: str) -> None:
    """Inputs and the device's context first; then the clock, the import, the first call and a second one; then torch's
    autograd is started, and the first backward and a second one run. whole: ours, and that backward starts autograd.
    bindings: nothing but the import of NVIDIA's bindings of the driver."""
    qkv = _inputs(device)
    _wait(device)
    if which == "bindings":
        print(json.dumps({"ms": {"import": round(_bindings() * 1e3, 3)}}))
        return
    call, imported = _sdpa(qkv, device) if which == "sdpa" else _ours(qkv)
    first, second = _timed(call, device), _timed(call, device)
    seconds = {"import": imported, "first": first, "total": imported + first, "second": second}
    stages = _ledger(which)
    for x in qkv:
        x.requires_grad_()
    if which != "whole":
        seconds["autograd"], _ = _backward(lambda: qkv[0] * 2, qkv[:1], device)
    seconds["backward"], seconds["grad_forward"] = _backward(call, qkv, device)
    seconds["second_backward"], _ = _backward(call, qkv, device)
    ms = {name: round(s * 1e3, 3) for name, s in seconds.items()}
    print(json.dumps({"ms": ms, "stages": stages, "backward_stages": _ledger(which)[len(stages) :]}))


def _inputs(device: str) -> list[torch.Tensor]:
    shape_q, shape_kv = (2, 1024, 32, 128), (2, 1024, 8, 128)
    if device == "cpu":  # the scripts' own tests
        shape_q, shape_kv = (1, 16, 4, 64), (1, 16, 2, 64)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in (shape_q, shape_kv, shape_kv)]


def _ours(qkv: Tensors) -> tuple[Call, float]:
    """The call, and the seconds of its import."""
    start = time.perf_counter()
    import runtime

    imported = time.perf_counter() - start

    def call() -> torch.Tensor:
        out = runtime.flash_attn(*qkv, causal=True)
        return out if isinstance(out, torch.Tensor) else out[0]

    return call, imported


def _bindings() -> float:
    """Seconds of the import without which nothing in Python launches a kernel."""
    start = time.perf_counter()
    import cuda.bindings.driver

    assert cuda.bindings.driver.cuInit
    return time.perf_counter() - start


def _sdpa(qkv: Tensors, device: str) -> tuple[Call, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if device == "cuda" else SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call, 0.0


def _backward(call: Call, leaves: Tensors, device: str) -> tuple[float, float]:
    """Seconds of the backward, and of the forward before it."""
    start = time.perf_counter()
    out = call()
    _wait(device)
    forward = time.perf_counter() - start
    dout = torch.randn_like(out)
    _wait(device)
    return _timed(partial(torch.autograd.grad, out, leaves, dout), device), forward


def _timed(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has the result."""
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _ledger(which: str) -> list[Any]:
    if which == "sdpa":
        return []
    import runtime

    return runtime.ledger()


if __name__ == "__main__":
    main(*sys.argv[1:])
