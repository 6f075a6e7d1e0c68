"""Drop-in functions for `flash_attn.cute.flash_attn_func` and `flash_attn_varlen_func` of FlashAttention-4.
`runtime.api.combine` has its `flash_attn_combine`.

Positional order, defaults and results are FA4's: always (out, lse), where lse is None unless return_lse or an input
requires grad. A tensor that the kernels cannot read where it lies is copied, as FA4 does it.

window_size follows FA4: None is an open side; causal makes right 0; then two numbers whose sum is negative, such as
(-1, -1), are two open sides, and so is (-1, 0), which FA2 takes for a causal mask. A negative side that remains moves
the window off the diagonal, which is not served. Anything that is not served raises ArgumentError ('unsupported' or
'value') under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime.api import dropin
from runtime.call.plain import flag, number
from runtime.call.tensors import check_flag
from runtime.errors import ArgumentError
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch

    Result = tuple[torch.Tensor, torch.Tensor | None]

BOTH_OPEN = (None, None)  # the default, which is told by its identity


@untraced
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = BOTH_OPEN,
    learnable_sink: torch.Tensor | None = None,
    softcap: float | None = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[torch.Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> Result:
    """`runtime.flash_attn` as FA4 has it; learnable_sink is its `sink`, window_size its `window`.

    qv, gather_kv_indices, score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors,
    block_sparse_tensors_bwd: must be None. num_splits: as `flash_attn_varlen` has it; 0 is our choice.
    deterministic is about the backward, as there.
    pack_gqa: whether the query heads of a key/value head share tiles, which changes no result; None is our choice.
    Returns (out, lse); lse is (batch, heads_q, seqlen_q), or None where neither return_lse nor an input that requires
    grad asks for it. Raises what flash_attn raises.
    """
    dropin.refuse(qv=qv, gather_kv_indices=gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd,
                  mask_mod=mask_mod, aux_tensors=aux_tensors, aux_scalars=aux_scalars,
                  block_sparse_tensors=block_sparse_tensors,
                  block_sparse_tensors_bwd=block_sparse_tensors_bwd)  # fmt: skip
    dropin.check_options(deterministic)
    wants_lse = _wants_lse(return_lse, q, k, v, learnable_sink)
    found = dropin.dense(q, k, v, causal, softmax_scale, _window(window_size, causal), _softcap(softcap),
                         learnable_sink, None, wants_lse, deterministic, pack_gqa, num_splits)  # fmt: skip
    return found if wants_lse else (found, None)


@untraced
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = BOTH_OPEN,
    learnable_sink: torch.Tensor | None = None,
    softcap: float | None = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[torch.Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> Result:
    """`runtime.flash_attn_varlen` as FA4 has it; otherwise as `flash_attn_func`.

    seqlen_k_per_split: must be None, too. min_seqlen_k, scheduler_metadata, disable_scheduler_metadata: change nothing
    here; min_seqlen_k is upstream's for gather_kv_indices. max_seqlen_q, max_seqlen_k: hints. page_table: k and v are a
    cache of pages, whose sequences have seqused_k's lengths. num_splits: 1 is taken where cu_seqlens_k places the keys
    or there is a seqused_q. Returns (out, lse); lse is (heads_q, total_q) for a packed q, (batch, heads_q, seqlen_q)
    for a dense one, or None.
    """
    dropin.refuse(qv=qv, gather_kv_indices=gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd,
                  mask_mod=mask_mod, block_sparse_tensors=block_sparse_tensors, aux_tensors=aux_tensors,
                  aux_scalars=aux_scalars, seqlen_k_per_split=seqlen_k_per_split)  # fmt: skip
    dropin.check_options(deterministic)
    if disable_scheduler_metadata is not False:
        check_flag("disable_scheduler_metadata", disable_scheduler_metadata)
    wants_lse = _wants_lse(return_lse, q, k, v, learnable_sink)
    found = dropin.varlen(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                          max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k, causal=causal,
                          softmax_scale=softmax_scale, window=_window(window_size, causal), softcap=_softcap(softcap),
                          sink=learnable_sink, return_lse=wants_lse, deterministic=deterministic, pack_gqa=pack_gqa,
                          page_table=page_table, num_splits=num_splits)  # fmt: skip
    return found if wants_lse else (found, None)


def _wants_lse(return_lse: Any, q: Any, k: Any, v: Any, sink: Any) -> bool:
    """Upstream asks for `requires_grad` alone, so without autograd too."""
    if return_lse is not False:
        check_flag("return_lse", return_lse)
        if return_lse:
            return True
    try:
        found: bool = q.requires_grad or k.requires_grad or v.requires_grad
        return found or (sink is not None and sink.requires_grad)
    except AttributeError:  # of what is no tensor
        return False


def _window(window_size: Any, causal: Any) -> dropin.Pair | None:
    left, right = window_size if window_size is BOTH_OPEN else dropin.sides(window_size)
    if causal is not False and causal is not True:
        causal = flag(causal)
    if type(causal) in (bool, int) and causal:
        right = 0
    if type(left) is type(right) is int and left + right < 0:
        return None
    for side in (left, right):
        if type(side) is int and side < 0:
            message = f"{window_size!r:.50}: a window that is moved off the diagonal by a negative side is not served"
            raise ArgumentError("window_size", message, reason="value")
    return None if left is right is None else (left, right)


def _softcap(softcap: Any) -> Any:
    """Upstream has softcap · tanh(score / softcap), in which a sign changes nothing."""
    found = softcap if type(softcap) is float else number(softcap)
    return 0.0 if found is None else abs(found) if type(found) in (int, float) else softcap
