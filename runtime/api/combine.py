"""`flash_attn_combine`: the outputs of parts of the keys made into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.api.dropin import UNREADABLE, again
from runtime.call import combine
from runtime.call.plain import flag
from runtime.call.plan import prepare
from runtime.call.request import Options, Request
from runtime.call.run import run
from runtime.call.tensors import check_apart_within
from runtime.errors import ArgumentError
from runtime.load import plans
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch

LOW = ("torch.float16", "torch.bfloat16")


@untraced
def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    virtual_batch_idx: torch.Tensor | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over all keys from attention over parts of them: Σ exp(lse_i − lse) · out_i, lse = log Σ exp(lse_i).

    Arguments, order and results are FlashAttention-4's.

    out_partial: (splits, batch, seqlen, heads, head_dim_v) or (splits, tokens, heads, head_dim_v), fp32, bf16 or fp16,
        1 to 256 splits, head_dim_v a multiple of 8 up to 256. Calls are fastest when it is fp32, contiguous but for its
        first stride, and 16-byte aligned; else it is copied.
    lse_partial: the same without head_dim_v, fp32, natural log, any strides. A part that saw no key has -inf, and its
        output, even NaN, does not count.
    out: written and returned in place of a new contiguous tensor; (batch, seqlen, heads, head_dim_v) or (tokens, …),
        of out_dtype, memory apart from the parts'. Where its last dimension is not contiguous, or other strides are no
        multiples of 16 bytes, it is copied into. Not where a part requires grad.
    out_dtype: fp32, bf16 or fp16; None is out's, or out_partial's.
    cu_seqlens: (batch + 1,), int32: where each sequence starts among the tokens, and the end. Only with tokens.
    seqused: (batch,), int32: how many tokens from a sequence's start count; with tokens it needs cu_seqlens. Rows of
        `out` that these two leave out keep their values, for a copy of all rows; in new tensors they hold anything.
    virtual_batch_idx: (batch,), int32: the order in which FlashAttention-4 takes sequences, which changes no result.
    return_lse: True or False (or 1 or 0): also return the LSE, (batch, seqlen, heads) or (tokens, heads), fp32; in
        memory seqlen is its last dimension, as in other functions' LSE.

    Runs on torch's current stream, without synchronising. Not differentiable: a part may require grad, but a backward
    that comes to the call raises ArgumentError ('requires_grad'). Returns (out, lse), or (out, None). Raises what
    flash_attn raises.
    """
    used = None
    if cu_seqlens is not None or seqused is not None or virtual_batch_idx is not None:
        used = combine.used_rows(out_partial, cu_seqlens, seqused, virtual_batch_idx)
    given = {"out_partial": out_partial, "lse_partial": lse_partial}
    if out is None:
        return _served(given, out_dtype, return_lse)
    given["out"] = out
    if used is not None and combine.is_plain_tensor(out):
        return _into(out, used, given, out_dtype, return_lse)
    try:
        return _served(given, out_dtype, return_lse)
    except ArgumentError as error:
        if error.argument != "out" or error.reason not in UNREADABLE:
            raise
    return _into(out, None, given, out_dtype, return_lse)


def _into(out: Any, used: Any, given: dict[str, Any], out_dtype: Any, return_lse: Any) -> Any:
    """By way of a tensor that the kernel can write. used: the rows that count, a mask; None for all."""
    import torch

    check_apart_within("out", out)
    made = torch.empty_like(out, memory_format=torch.contiguous_format).requires_grad_(out.requires_grad)
    _, lse = _served(given | {"out": made}, out_dtype, return_lse)
    out.copy_(made if used is None else torch.where(used[..., None, None], made, out))
    return out, lse


def _served(given: dict[str, Any], out_dtype: Any, return_lse: Any) -> Any:
    """With copies of parts that the kernel cannot read."""
    try:
        return _combined(given, out_dtype, return_lse)
    except ArgumentError as error:
        return again(lambda **given: _combined(given, out_dtype, return_lse), error, given, {}, ("out",))


def _combined(given: dict[str, Any], out_dtype: Any, return_lse: Any) -> Any:
    key: Any = None
    try:
        key = ("fwd_combine", out_dtype, return_lse, given["out_partial"].is_cuda,
               *[(name, t.shape, t.stride(), t.dtype, t.get_device()) for name, t in given.items()])  # fmt: skip
        plan = plans.plans.by_call[key]
    except Exception:  # as in flash_attn
        plan = None
    if plan is None:
        parts = given["out_partial"]
        if str(getattr(parts, "dtype", None)) in LOW:
            kept = parts.dtype if out_dtype is None and "out" not in given else out_dtype
            return _combined(given | {"out_partial": parts.float()}, kept, return_lse)
        if return_lse is not (plain := flag(return_lse)):
            return _combined(given, out_dtype, plain)
        options = Options(return_lse=return_lse, out_dtype=out_dtype)
        plan = prepare(combine, Request("fwd_combine", given, options), key)
    out, lse = run(plan, given, return_lse)
    return out, None if lse is None else lse.transpose(-1, -2)
