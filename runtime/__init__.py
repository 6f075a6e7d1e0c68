"""Cubinery's runtime: fetches, verifies and launches attention kernels that were compiled ahead of time. No compiler.

    out = runtime.flash_attn(q, k, v, causal=True)
    out.backward(dout)

`flash_attn_varlen` takes sequences of different lengths and paged KV caches, `flash_attn_with_kvcache` is
FlashAttention-2's function for decode, `flash_attn_combine` joins attention over parts of the keys. `flash_attn_func`,
`flash_attn_varlen_func` and their forms for packed arrays take FlashAttention-2's arguments in its order, and those of
the module `fa4` FlashAttention-4's.

`configure` says where the kernels come from, `ledger` where the time of first calls went, `runtime.errors` what can be
raised. Importing this package imports neither torch nor CUDA, and what most first calls do not need only when it is
asked for.
"""

from time import perf_counter as _perf_counter
from typing import TYPE_CHECKING

from runtime import _beside  # first: everything else imports `registry`
from runtime.api.attention import flash_attn
from runtime.errors import CubineryError
from runtime.load.session import configure
from runtime.stages import ledger
from runtime.stages import record as _record

if TYPE_CHECKING:
    from runtime import fa4 as fa4
    from runtime.api.combine import flash_attn_combine
    from runtime.api.fa2 import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from runtime.api.kvcache import flash_attn_with_kvcache
    from runtime.api.varlen import flash_attn_varlen

__all__ = ["CubineryError", "configure", "fa4", "flash_attn", "flash_attn_combine", "flash_attn_func",
           "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
           "ledger"]  # fmt: skip

_FILES = {
    "api.combine": "flash_attn_combine",
    "api.fa2": "flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func flash_attn_varlen_func "
    "flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func",
    "api.kvcache": "flash_attn_with_kvcache",
    "api.varlen": "flash_attn_varlen",
}  # file -> the names that are imported from it when they are first asked for


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "fa4":
        return import_module("runtime.fa4")
    for file, names in _FILES.items():
        if name in names.split():
            value = globals()[name] = getattr(import_module(f"runtime.{file}"), name)
            return value
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_record(("import runtime", "", (_perf_counter() - _beside.STARTED) * 1e3))
