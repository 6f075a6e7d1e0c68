"""`flash_attn_combine`: the outputs of parts of the keys made into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.call import combine
from runtime.call.plan import prepare
from runtime.call.request import Options, Request
from runtime.call.run import run
from runtime.load import plans
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch


@untraced
def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = True,
) -> Any:
    """Attention over all keys from attention over parts of them: Σ exp(lse_i − lse) · out_i, lse = log Σ exp(lse_i).

    out_partial: (splits, batch, seqlen, heads, head_dim_v) or (splits, tokens, heads, head_dim_v), fp32, 1 to 256
        splits, head_dim_v a multiple of 8 up to 256; contiguous but for its first stride; 16-byte aligned.
    lse_partial: the same without head_dim_v, fp32, natural log, any strides. A part that saw no key has -inf, and its
        output, even NaN, does not count.
    out: written and returned in place of a new contiguous tensor; (batch, seqlen, heads, head_dim_v) or (tokens, …),
        of out_dtype, the last dimension contiguous, other strides multiples of 16 bytes, memory of its own.
    out_dtype: fp32, bf16 or fp16; None is out's, or fp32.
    return_lse: True or False (or 1 or 0): also return the LSE, (batch, seqlen, heads) or (tokens, heads), fp32; in
        memory seqlen is its last dimension, as in other functions' LSE.

    Runs on torch's current stream, without synchronising. Not differentiable. Returns (out, lse), or out. Raises what
    flash_attn raises.
    """
    given = {"out_partial": out_partial, "lse_partial": lse_partial}
    if out is not None:
        given["out"] = out
    key: Any = None
    try:
        key = ("fwd_combine", out_dtype, return_lse, out_partial.is_cuda,
               *[(name, t.shape, t.stride(), t.dtype, t.get_device()) for name, t in given.items()])  # fmt: skip
        plan = plans.plans.by_call[key]
    except Exception:  # as in flash_attn
        plan = None
    if plan is None:
        options = Options(return_lse=return_lse, out_dtype=out_dtype)
        plan = prepare(combine, Request("fwd_combine", given, options), key)
    out, lse = run(plan, given, return_lse)
    return out if lse is None else (out, lse.transpose(-1, -2))
