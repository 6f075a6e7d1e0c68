"""Cubinery's runtime: fetches, verifies and launches attention kernels that were compiled ahead of time. No compiler.

    out = runtime.flash_attn(q, k, v, causal=True)

`configure` says where the kernels come from, `ledger` where the time of first calls went, `runtime.errors` what can be
raised. Importing this package imports neither torch nor CUDA.
"""

from time import perf_counter as _perf_counter

from runtime import _beside  # first: everything else imports `registry`
from runtime.attention import flash_attn
from runtime.errors import CubineryError
from runtime.session import configure
from runtime.stages import ledger
from runtime.stages import record as _record

__all__ = ["CubineryError", "configure", "flash_attn", "ledger"]

_record("import runtime", "", (_perf_counter() - _beside.STARTED) * 1e3)
