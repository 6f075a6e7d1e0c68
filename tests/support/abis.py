"""Every op's ABI, by name."""

from registry import ops

ABIS = {name: ops.get(name).abi for name in ops.OPS}
FWD, FWD_PAGED, FWD_COMBINE, KV_APPEND = (ABIS[op] for op in ("fwd", "fwd_paged", "fwd_combine", "kv_append"))
BWD_PREPROCESS, BWD, BWD_SUM, BWD_POSTPROCESS = (
    ABIS[op] for op in ("bwd_preprocess", "bwd", "bwd_sum", "bwd_postprocess")
)
