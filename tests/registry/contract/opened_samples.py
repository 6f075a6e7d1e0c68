"""An index of the whole table with made-up artifacts, calls near the bounds of its rows, and damaged JSON."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from kernels import dispatch
from registry import ops
from registry.contract import Artifact, DispatchRow, Grid, Index, sha256_hex

ABI = ops.get("fwd").abi


def artifact(variant: str) -> Artifact:
    digest = sha256_hex(variant.encode())
    return Artifact(
        variant=variant, arch="sm_120", symbol="s", abi=ABI.digest, grid=Grid("rows", 4), threads=128, smem=0,
        static_smem=0, registers=64, spills=0, stack=0, blocks_per_sm=1, hot_loop=(("HMMA", 4), ("LDS", 2)),
        cubin_sha256=digest, cubin_size=10, frame_sha256=digest, frame_size=9, ptx_sha256=digest, toolchain="t",
        min_driver=12080,
    )  # fmt: skip


INDEX = Index("sm_120", "0", tuple(artifact(v.key) for v in dispatch.variants()), dispatch.rows(), (ABI,))


def first(index: Index, op: str, call: dict[str, Any]) -> DispatchRow | None:
    rows = (row for row in index.rows if row.op == op)
    return next((row for row in rows if all(condition.holds(call) for condition in row.when)), None)


@st.composite
def facts(draw: st.DrawFn) -> dict[str, Any]:
    """Of a call, near the bounds that rows draw."""
    heads_kv, group = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 4, 8, 16]))
    seqlen_q, seqlen_k, batch = (draw(st.sampled_from([1, 2, 16, 17, 64, 65, 200, 4096])) for _ in range(3))
    found = {name: draw(st.integers(0, 1)) for name in ("causal", "varlen", "varlen_k", "window")}
    found |= {name: draw(st.sampled_from([8, 32, 40, 64, 96, 128, 192, 256])) for name in ("head_dim", "head_dim_v")}
    found |= {"heads_q": heads_kv * group, "heads_kv": heads_kv, "group": group, "batch": batch}
    found |= {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "packed_rows": seqlen_q * group, "rows": seqlen_q * batch}
    dtypes = {"dtype": draw(st.sampled_from(["bf16", "fp16"])), "kv_dtype": draw(st.sampled_from(["bf16", "e4m3"]))}
    return found | {"total_q": batch * seqlen_q, "total_k": batch * seqlen_k} | dtypes


def change(value: Any, path: list[Any], new: Any) -> bytes:
    """The index's JSON with another value at `path`; the value `...` leaves it out."""
    value = json.loads(json.dumps(value))
    at = value
    for step in path[:-1]:
        at = at[step]
    if new is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return json.dumps(value).encode()


def paths(value: Any) -> list[list[Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[name, *rest] for name, child in children for rest in ([], *paths(child))]
