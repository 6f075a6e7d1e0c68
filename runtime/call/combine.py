"""`flash_attn_combine`: its rules across arguments, its numbers, its one launch."""

from __future__ import annotations

from functools import partial
from typing import Any

from runtime.call import checks, numbers, tensors
from runtime.call.numbers import Numbers
from runtime.call.plan import Chain, Maker, Outputs
from runtime.call.request import Call, Request
from runtime.call.splits import MAX_SPLITS
from runtime.errors import ArgumentError

OUTPUTS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def fixed(request: Request) -> Any:
    return request.options


def check(request: Request, torch: Any, device_type: str) -> Call:
    """Everything that the call's key determines. Raises ArgumentError."""
    given, asked = request.tensors, request.options
    tensors.check_kinds(request.op, given, torch, device_type)
    _check_ranks(given)
    sizes = tensors.sizes(request.op, given)
    partials, out = given["out_partial"], given.get("out")
    splits, heads, head_dim_v = sizes["splits"], sizes["heads"], sizes["head_dim_v"]
    if not 1 <= splits <= MAX_SPLITS:
        raise ArgumentError("out_partial", f"{splits} splits, must be from 1 to {MAX_SPLITS}", reason="shape")
    checks.check_head_dim("out_partial", head_dim_v)
    dtype = asked.out_dtype
    if dtype is None:
        dtype = torch.float32 if out is None else out.dtype
    if not isinstance(dtype, torch.dtype) or str(dtype) not in OUTPUTS:
        raise ArgumentError("out_dtype", f"{dtype!r:.50}, must be fp32, bf16 or fp16", reason="dtype")
    if out is not None and out.dtype != dtype:
        raise ArgumentError("out", f"dtype {out.dtype}, must be out_dtype, {dtype}", reason="dtype")
    if partials.numel() and not partials[0].is_contiguous():
        message = "must be contiguous but for its first stride; .contiguous() it"
        raise ArgumentError("out_partial", message, reason="contiguity")
    tensors.check_memory(request.op, given)
    checks.check_flag("return_lse", asked.return_lse)
    checks.check_tangents(torch.autograd.forward_ad, given.items())
    batch, seqlen = (sizes["batch"], sizes["seqlen"]) if "seqlen" in sizes else (1, sizes["tokens"])
    rows = batch * seqlen * heads
    if rows > checks.MAX_I32:
        raise ArgumentError("out_partial", f"{rows} rows, must be below 2**31; split it", reason="too_large")
    facts = {"dtype": OUTPUTS[str(dtype)], "head_dim": head_dim_v, "head_dim_v": head_dim_v, "rows": rows}
    found = _strides(given, splits, heads, seqlen)
    found |= {"num_splits": splits, "partial_rows": rows, "seqlen": seqlen, "heads": heads, "head_dim_v": head_dim_v}
    return Call(request.op, facts, found, sizes, tuple(given))


def _check_ranks(given: dict[str, Any]) -> None:
    """All dense or all packed: the description allows each tensor either."""
    wanted = given["out_partial"].dim() - 1
    for name in ("lse_partial", "out"):
        if name in given and given[name].dim() != wanted:
            message = f"{given[name].dim()} dimensions, must be {wanted}, one less than out_partial's"
            raise ArgumentError(name, message, reason="rank")


def _strides(given: dict[str, Any], splits: int, heads: int, seqlen: int) -> Numbers:
    partials, lse, out = given["out_partial"], given["lse_partial"], given.get("out")
    shape = partials.shape[1:]
    found = numbers.contiguous("o", shape) if out is None else numbers.strides("o", shape, out.stride())
    found |= numbers.strides("lse_partial", (*lse.shape[1:], 1), (*lse.stride()[1:], 1))
    found["o_partial_stride_split"] = partials.stride(0) if splits > 1 else 0
    found["lse_partial_stride_split"] = lse.stride(0) if splits > 1 else 0
    return found | {"lse_stride_b": heads * seqlen, "lse_stride_s": 1, "lse_stride_h": seqlen}


def chain(call: Call, request: Request, maker: Maker) -> Chain:
    if not call.facts["rows"]:
        return Chain(())
    return Chain((maker.prepared("fwd_combine", call.facts, lambda _: (call.numbers, 1, 1)),))


def outputs(call: Call, request: Request, torch: Any) -> Outputs:
    """The LSE is contiguous along seqlen: (batch, heads, seqlen) or (heads, tokens)."""
    partials = request.tensors["out_partial"]
    *outer, head_dim_v = partials.shape[1:]
    dtype = next(name for name, ours in OUTPUTS.items() if ours == call.facts["dtype"]).removeprefix("torch.")
    new = partial(torch.empty, device=partials.device)
    new_out = partial(new, (*outer, head_dim_v), dtype=getattr(torch, dtype))
    new_lse = partial(new, (*outer[:-2], outer[-1], outer[-2]), dtype=torch.float32)
    return Outputs(lambda _: new_out(), new_lse, lambda _: new_out(), new_lse)
