"""One fresh process of cold_start: prints one JSON line. Run as a script: it imports nothing of ours before its clock.

python benchmarks/cold_child.py ours|sdpa cuda|cpu
"""

import json
import sys
import time

import torch


def main(which: str, device: str) -> None:
    """Inputs and the device's context first; then the clock, the import, the first call and a second one."""
    shape_q, shape_kv = (2, 1024, 32, 128), (2, 1024, 8, 128)
    if device == "cpu":  # the scripts' own tests
        shape_q, shape_kv = (1, 16, 4, 64), (1, 16, 2, 64)
    q = torch.randn(shape_q, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(shape_kv, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    from torch.nn.attention import SDPBackend, sdpa_kernel

    start = time.perf_counter()
    if which == "ours":
        import runtime

        imported = time.perf_counter()

        def call() -> object:
            return runtime.flash_attn(q, k, v, causal=True)

    else:
        imported = start
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

        def call() -> object:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION if device == "cuda" else SDPBackend.MATH):
                return sdpa(qt, kt, vt, is_causal=True, enable_gqa=True)

    call()
    wait()
    first = time.perf_counter()
    call()
    wait()
    second = time.perf_counter()
    times = {"import": imported - start, "first": first - imported, "total": first - start, "second": second - first}
    stages = runtime.ledger() if which == "ours" else []
    print(json.dumps({"ms": {name: round(s * 1e3, 3) for name, s in times.items()}, "stages": stages}))


if __name__ == "__main__":
    main(*sys.argv[1:])
