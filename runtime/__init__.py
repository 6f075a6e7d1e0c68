"""Cubinery's runtime: fetches, verifies and launches attention kernels that were compiled ahead of time. No compiler.

    out = runtime.flash_attn(q, k, v, causal=True)
    out.backward(dout)

`flash_attn_varlen` takes sequences of different lengths and paged KV caches, `flash_attn_with_kvcache` is
FlashAttention-2's function for decode, `flash_attn_combine` joins attention over parts of the keys. `flash_attn_func`,
`flash_attn_varlen_func` and their forms for packed arrays take FlashAttention-2's arguments in its order, and those of
the module `fa4` FlashAttention-4's.

`configure` says where the kernels come from, `ledger` where the time of first calls went, `runtime.errors` what can be
raised. Importing this package imports neither torch nor CUDA.
"""

from time import perf_counter as _perf_counter

from runtime import (
    _beside,  # first: everything else imports `registry`
    fa4,
)
from runtime.api.attention import flash_attn
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
from runtime.errors import CubineryError
from runtime.load.session import configure
from runtime.stages import ledger
from runtime.stages import record as _record

__all__ = ["CubineryError", "configure", "fa4", "flash_attn", "flash_attn_combine", "flash_attn_func",
           "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
           "ledger"]  # fmt: skip

_record(("import runtime", "", (_perf_counter() - _beside.STARTED) * 1e3))
