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


def used_rows(parts: Any, cu_seqlens: Any, seqused: Any, virtual_batch_idx: Any) -> Any:
    """A mask of the rows that belong to a sequence, (batch, seqlen) or (tokens,), on the device; None for all.

    parts: out_partial of `flash_attn_combine`. Raises ArgumentError for a tensor of lengths that does not fit it.
    """
    import torch

    if not is_plain_tensor(parts) or parts.dim() not in (4, 5):
        return None  # refused with the rest of the call
    if cu_seqlens is not None and parts.dim() == 5:
        message = "needs parts of packed tokens, (splits, tokens, heads, head_dim_v)"
        raise ArgumentError("cu_seqlens", message, reason="rank")
    if cu_seqlens is None and seqused is not None and parts.dim() == 4:
        raise ArgumentError("seqused", "needs cu_seqlens where tokens are packed", reason="value")
    given = {"cu_seqlens": cu_seqlens, "seqused": seqused, "virtual_batch_idx": virtual_batch_idx}
    batch = parts.shape[1] if parts.dim() == 5 else None
    for name, tensor in given.items():
        if tensor is not None:
            batch = _check_lengths(name, tensor, parts.device, batch)
    if cu_seqlens is None:
        return None if seqused is None else torch.arange(parts.shape[2], device=parts.device) < seqused[:, None]
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if seqused is not None:
        ends = torch.minimum(ends, starts + seqused.clamp(min=0))
    steps = torch.zeros(parts.shape[1] + 1, dtype=torch.int32, device=parts.device)
    for edges, step in ((starts, 1), (ends, -1)):
        steps.index_add_(0, edges.clamp(0, parts.shape[1]), torch.full_like(edges, step))
    return steps.cumsum(0)[:-1] > 0


def is_plain_tensor(given: Any) -> bool:
    import torch

    return isinstance(given, torch.Tensor) and given.layout is torch.strided and not given.is_nested


def _check_lengths(name: str, tensor: Any, device: Any, batch: int | None) -> int | None:
    """The batch, which cu_seqlens tells where it is None. Raises ArgumentError."""
    plus = int(name == "cu_seqlens")
    form = f"(batch{' + 1' if plus else ''},)"
    if not is_plain_tensor(tensor):
        raise ArgumentError(name, f"{type(tensor).__name__}, must be a torch.Tensor, {form}", reason="type")
    if str(tensor.dtype) != "torch.int32":
        raise ArgumentError(name, f"dtype {tensor.dtype}, must be torch.int32", reason="dtype")
    if tensor.dim() != 1:
        raise ArgumentError(name, f"{tensor.dim()} dimensions, must be the 1 of {form}", reason="rank")
    if tensor.device != device:
        raise ArgumentError(name, f"is on {tensor.device}, must be on out_partial's device, {device}", reason="device")
    n = tensor.shape[0] - plus
    if n < 0 or (batch is not None and n != batch):
        message = f"{tensor.shape[0]} entries, must be {form} with a batch of {max(n, 0) if batch is None else batch}"
        raise ArgumentError(name, message, reason="shape")
    return n


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
