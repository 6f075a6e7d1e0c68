"""Drop-in functions for `flash_attn.flash_attn_func` and `flash_attn_varlen_func` of FlashAttention-2.

Positional order, defaults and results are FA2's. What FA4 adds is taken by keyword, under FA4's names (`runtime.fa4`
has FA4's own order). window_size follows FA2: -1 and None both are an open side. Anything that is not served raises
ArgumentError ('unsupported') under its own name, unless it has the value that upstream means by absence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.api import dropin
from runtime.call.tensors import check_flag
from runtime.errors import ArgumentError
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch

OPEN = (None, -1)


@untraced
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    return_lse: bool = False,
    **unsupported: Any,
) -> Any:
    """`runtime.flash_attn` as FA2 has it; learnable_sink is its `sink`, window_size its `window`.

    dropout_p must be 0.0, num_splits 1 (or 0: our choice). deterministic is about the backward, as there.
    pack_gqa: whether the query heads of a key/value head share tiles, which changes no result; None is our choice.
    Unlike FA2, inputs are not copied: head_dim must be a multiple of 8 and contiguous.
    Returns out; with return_attn_probs (out, lse, S_dmask), S_dmask empty as FA2's without dropout; with return_lse
    (out, lse). The LSE is (batch, heads_q, seqlen_q). Raises what flash_attn raises.
    """
    if unsupported:
        dropin.refuse(**unsupported)
    dropin.check_options(deterministic, dropout_p)
    dropin.check_unsplit(num_splits)
    found = dropin.dense(q, k, v, causal, softmax_scale, window_of(window_size), softcap, learnable_sink, alibi_slopes,
                         _wants_lse(return_attn_probs, return_lse), pack_gqa, deterministic)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


@untraced
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    return_lse: bool = False,
    disable_scheduler_metadata: bool = False,
    **unsupported: Any,
) -> Any:
    """`runtime.flash_attn_varlen` as FA2 has it; otherwise as `flash_attn_func`.

    block_table: (batch, max_pages), int32: k and v are a cache of pages, as `flash_attn_varlen`'s page_table has it;
    then sequences have seqused_k's lengths or, without it, those that cu_seqlens_k's differences say. num_splits: more
    than 1 needs a block_table. disable_scheduler_metadata: there is none to disable. Unlike FA2's, max_seqlen_q and
    max_seqlen_k are hints: any value gives the same result. The LSE is (heads_q, total_q).
    """
    if unsupported:
        dropin.refuse(**unsupported)
    dropin.check_options(deterministic, dropout_p)
    check_flag("disable_scheduler_metadata", disable_scheduler_metadata)
    names = dropin.NAMES
    if block_table is not None:
        names = names | {"page_table": "block_table"}
        if cu_seqlens_k is not None and seqused_k is None:
            names = names | {"seqused_k": "cu_seqlens_k"}  # whose errors they then are
            seqused_k = cu_seqlens_k.diff() if hasattr(cu_seqlens_k, "diff") else cu_seqlens_k
        cu_seqlens_k = None
    found = dropin.varlen(q, k, v, names, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                          max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q,
                          seqused_k=seqused_k, causal=causal, softmax_scale=softmax_scale,
                          window=window_of(window_size), softcap=softcap, sink=learnable_sink,
                          alibi_slopes=alibi_slopes, return_lse=_wants_lse(return_attn_probs, return_lse),
                          deterministic=deterministic, pack_gqa=pack_gqa, page_table=block_table,
                          num_splits=num_splits)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


def window_of(window_size: Any) -> dropin.Pair | None:
    """Ours of FlashAttention-2's; None where both sides are open."""
    if window_size is None:
        return None
    left, right = dropin.sides(window_size)
    return None if left in OPEN else left, None if right in OPEN else right


def _wants_lse(return_attn_probs: Any, return_lse: Any) -> Any:
    check_flag("return_attn_probs", return_attn_probs)
    if return_attn_probs and return_lse:
        raise ArgumentError("return_lse", "return_attn_probs returns the LSE already; ask for one", reason="value")
    return return_attn_probs or return_lse


def _with_probs(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse = found
    return out, lse, out.new_empty(0)
