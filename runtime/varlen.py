"""`flash_attn_varlen`: sequences of different lengths in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.attention import attend

if TYPE_CHECKING:
    import torch


def flash_attn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    pack_gqa: bool | None = None,
) -> Any:
    """`flash_attn` over sequences of different lengths, which stay on the device: nothing reads them on the host.

    q: (total_q, heads_q, head_dim) with cu_seqlens_q, else (batch, seqlen_q, heads_q, head_dim). k and v: the same
        with cu_seqlens_k and heads_kv, v with head_dim_v. total_q + total_k below 2**30.
    cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32: where each sequence starts in the packed array, and the end.
    seqused_q, seqused_k: (batch,), int32: how many tokens from a sequence's start count; the others neither attend
        nor are attended to. Masks are aligned with these lengths. With or without cu_seqlens.
    max_seqlen_q, max_seqlen_k: ints, a hint about the longest sequence of a packed array, by which a tile is chosen
        and nothing else: any value gives the same result. None takes the mean, total / batch; a dense array's length
        is known. Not tensors: reading one would synchronise.
    pack_gqa: whether the query heads of a key/value head share tiles, which changes no result; None is our choice.
    Everything else: as in `flash_attn`, whose errors this function raises as well.

    Totals and hints may differ in every call; a batch size is prepared for once, like any other shape.
    Lengths that point outside an array are cut to it. Rows that belong to no sequence, or lie beyond its seqused_q,
    are not written: in a new tensor, or LSE, they hold anything.
    Returns out, (total_q or batch, seqlen_q, heads_q, head_dim_v), or (out, lse); the LSE is (heads_q, total_q) for a
    packed q, else (batch, heads_q, seqlen_q).
    """
    optional = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None, sink, alibi_slopes)
    return attend(q, k, v, causal, softmax_scale, window, softcap, return_lse, out, optional, max_seqlen_q,
                  max_seqlen_k, pack_gqa)  # fmt: skip
