"""Combining parts of the keys: `flash_attn_combine`, and the launch behind a forward that is split."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from runtime.call import tensors
from runtime.call.launch import Launch, Maker, Settled
from runtime.call.plan import Chain, Outputs, Workspace
from runtime.call.request import Call, Request
from runtime.call.splits import MAX_SPLITS
from runtime.call.tensors import Checked, Numbers
from runtime.errors import ArgumentError

OUTPUTS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def fixed(request: Request) -> Any:
    return request.options


def check(request: Request, checked: Checked) -> Call:
    """What depends on the call's key alone, so that a kept plan never asks again. Raises ArgumentError."""
    given, asked, sizes = request.tensors, request.options, checked.sizes
    out = given.get("out")
    splits, heads, head_dim_v = sizes["splits"], sizes["heads"], sizes["head_dim_v"]
    if not 1 <= splits <= MAX_SPLITS:
        raise ArgumentError("out_partial", f"{splits} splits, must be from 1 to {MAX_SPLITS}", reason="shape")
    dtype = asked.out_dtype
    if dtype is None:
        dtype = given["out_partial" if out is None else "out"].dtype
    if isinstance(dtype, str) or str(dtype) not in OUTPUTS:
        raise ArgumentError("out_dtype", f"{dtype!r:.50}, must be fp32, bf16 or fp16", reason="dtype")
    if out is not None and out.dtype != dtype:
        raise ArgumentError("out", f"dtype {out.dtype}, must be out_dtype, {dtype}", reason="dtype")
    tensors.check_flag("return_lse", asked.return_lse)
    batch, seqlen = (sizes["batch"], sizes["seqlen"]) if "seqlen" in sizes else (1, sizes["tokens"])
    rows = batch * seqlen * heads
    if rows > tensors.MAX_I32:
        raise ArgumentError("out_partial", f"{rows} rows, must be below 2**31; split it", reason="too_large")
    facts = {"dtype": OUTPUTS[str(dtype)], "head_dim": head_dim_v, "head_dim_v": head_dim_v, "rows": rows}
    counts = {"num_splits": splits, "partial_rows": rows, "seqlen": seqlen, "heads": heads, "head_dim_v": head_dim_v}
    return Call(request.op, facts, checked.strides | counts, sizes, tuple(given))


def _of_new_lse(heads: int, seqlen: int) -> Numbers:
    """Contiguous along seqlen."""
    return {"lse_stride_b": heads * seqlen, "lse_stride_s": 1, "lse_stride_h": seqlen}


def chain(call: Call, request: Request, maker: Maker) -> Chain:
    if not call.facts["rows"]:
        return Chain(())
    return Chain((maker.prepared("fwd_combine", call.facts, lambda _: Settled(call.numbers)),))


def outputs(call: Call, request: Request, torch: Any) -> Outputs:
    """The LSE is contiguous along seqlen: (batch, heads, seqlen) or (heads, tokens)."""
    partials = request.tensors["out_partial"]
    *outer, head_dim_v = partials.shape[1:]
    dtype = next(name for name, ours in OUTPUTS.items() if ours == call.facts["dtype"]).removeprefix("torch.")
    new = partial(torch.empty, device=partials.device)
    new_out = partial(new, (*outer, head_dim_v), dtype=getattr(torch, dtype))
    new_lse = partial(new, (*outer[:-2], outer[-1], outer[-2]), dtype=torch.float32)
    return Outputs(lambda _: new_out(), new_lse, lambda _: new_out(), new_lse)


# -- behind a forward that is split -----------------------------------------------------------------------------------


def _rows(sizes: Mapping[str, int]) -> int:
    """Of the output: a row is one head of one query."""
    tokens = sizes["total_q"] if "total_q" in sizes else sizes["batch"] * sizes["seqlen_q"]
    return tokens * sizes["heads_q"]


def partials(sizes: Mapping[str, int], num_splits: int) -> tuple[Workspace, Workspace]:
    """Partial outputs, contiguous (splits, [batch,] seqlen_q, heads_q, head_dim_v), and their LSEs."""
    nbytes_of_lse = 4 * num_splits * _rows(sizes)
    return Workspace("o_partial", nbytes_of_lse * sizes["head_dim_v"]), Workspace("lse_partial", nbytes_of_lse)


def partial_numbers(sizes: Mapping[str, int], num_splits: int) -> Numbers:
    """What changes of the forward's numbers where it writes them."""
    rows, head_dim_v, heads = _rows(sizes), sizes["head_dim_v"], sizes["heads_q"]
    tokens = sizes["total_q"] if "total_q" in sizes else sizes["seqlen_q"]
    row = heads * head_dim_v
    return {
        "num_splits": num_splits,
        "o_stride_split": rows * head_dim_v,
        "lse_stride_split": rows,
        "o_stride_b": tokens * row if sizes["batch"] > 1 and "total_q" not in sizes else 0,
        "o_stride_s": row if tokens > 1 else 0,
        "o_stride_h": head_dim_v if heads > 1 else 0,
    }


def joining(call: Call, maker: Maker, num_splits: int) -> Launch:
    """The launch of `fwd_combine` behind the forward `call`."""
    sizes, rows = call.sizes, _rows(call.sizes)
    if rows > tensors.MAX_I32:
        raise ArgumentError("q", f"{rows} rows of partial outputs, must be below 2**31; split it", reason="too_large")
    seqlen, heads, head_dim_v = int(call.numbers["seqlen_q"]), sizes["heads_q"], sizes["head_dim_v"]
    lse = _of_new_lse(heads, seqlen)
    found = {name: value for name, value in call.numbers.items() if name.startswith("o_stride")} | lse
    found |= {name.replace("lse", "lse_partial"): step for name, step in lse.items()}
    found |= {"o_partial_stride_split": rows * head_dim_v, "lse_partial_stride_split": rows}
    found |= {"num_splits": num_splits, "partial_rows": rows, "seqlen": seqlen, "heads": heads}
    found["head_dim_v"] = head_dim_v
    facts = {"dtype": call.facts["dtype"], "head_dim": head_dim_v, "head_dim_v": head_dim_v, "rows": rows}
    names = {"o_partial": "o_partial"}  # not the argument of flash_attn_combine
    return maker.prepared("fwd_combine", facts, lambda _: Settled(found), names)
