"""Drop-in functions for `flash_attn.flash_attn_func` of FlashAttention-2, its varlen and its packed forms.

Positional order, defaults and results are FA2's. What FA4 adds is taken by keyword, under FA4's names (`runtime.fa4`
has FA4's own order). window_size follows FA2: a negative number and None both are an open side; a softcap below 0 is
none. As FA2 does it, a tensor that the kernels cannot read where it lies is copied, and head dims that are no multiple
of 8 are padded with zeros. Anything that is not served raises ArgumentError ('unsupported') under its own name, unless
it has the value that upstream means by absence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.api import dropin
from runtime.call.plain import number
from runtime.call.tensors import check_flag
from runtime.errors import ArgumentError
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch

BOTH_OPEN = (-1, -1)  # the default, which is told by its identity
NAMES_OF_QKV = (
    dropin.NAMES | dict.fromkeys("qkv", "qkv") | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "cu_seqlens")
)
NAMES_OF_QKV |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "max_seqlen")
NAMES_OF_KV = dropin.NAMES | dict.fromkeys("kv", "kv")


@untraced
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
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

    dropout_p must be 0.0. num_splits: as `flash_attn_varlen` has it. deterministic is about the backward, as there.
    pack_gqa: whether the query heads of a key/value head share tiles, which changes no result; None is our choice.
    Returns out; with return_attn_probs (out, lse, S_dmask), S_dmask empty as FA2's without dropout; with return_lse
    (out, lse). The LSE is (batch, heads_q, seqlen_q). Raises what flash_attn raises.
    """
    if unsupported:
        dropin.refuse(**unsupported)
    dropin.check_options(deterministic, dropout_p)
    found = dropin.dense(q, k, v, causal, softmax_scale, window_of(window_size), softcap_of(softcap), learnable_sink,
                         alibi_slopes, _wants_lse(return_attn_probs, return_lse), deterministic, pack_gqa,
                         num_splits)  # fmt: skip
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
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
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
    then sequences have seqused_k's lengths or, without it, those that cu_seqlens_k's differences say. num_splits: 1 is
    taken where cu_seqlens_k places the keys or there is a seqused_q. disable_scheduler_metadata: there is none to
    disable. Unlike FA2's, max_seqlen_q and max_seqlen_k are hints: any value gives the same result. The LSE is
    (heads_q, total_q).
    """
    if unsupported:
        dropin.refuse(**unsupported)
    dropin.check_options(deterministic, dropout_p)
    if disable_scheduler_metadata is not False:
        check_flag("disable_scheduler_metadata", disable_scheduler_metadata)
    names = dropin.NAMES
    if block_table is not None:
        names = names | {"page_table": "block_table"}
        if cu_seqlens_k is not None and seqused_k is None:
            names = names | {"seqused_k": "cu_seqlens_k"}  # whose errors they then are
            seqused_k = _lengths(cu_seqlens_k)
        cu_seqlens_k = None
    found = dropin.varlen(q, k, v, names, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                          max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q,
                          seqused_k=seqused_k, causal=causal, softmax_scale=softmax_scale,
                          window=window_of(window_size), softcap=softcap_of(softcap), sink=learnable_sink,
                          alibi_slopes=alibi_slopes, return_lse=_wants_lse(return_attn_probs, return_lse),
                          deterministic=deterministic, pack_gqa=pack_gqa, page_table=block_table,
                          num_splits=num_splits)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


@untraced
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q, k and v in one array.

    qkv: (batch, seqlen, 3, heads, head_dim). Its gradient is one new contiguous array. Everything else: as there.
    """
    q, k, v = _parts("qkv", qkv, "(batch, seqlen, 3, heads, head_dim)", 3, 5)
    dropin.check_options(deterministic, dropout_p)
    found = dropin.dense(q, k, v, causal, softmax_scale, window_of(window_size), softcap_of(softcap), None,
                         alibi_slopes, _wants_lse(return_attn_probs, False), deterministic,
                         names=NAMES_OF_QKV)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


@untraced
def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of k and v in one array.

    kv: (batch, seqlen_k, 2, heads_kv, head_dim). Its gradient is one new contiguous array. Everything else: as there.
    """
    k, v = _parts("kv", kv, "(batch, seqlen_k, 2, heads_kv, head_dim)", 2, 5)
    dropin.check_options(deterministic, dropout_p)
    found = dropin.dense(q, k, v, causal, softmax_scale, window_of(window_size), softcap_of(softcap), None,
                         alibi_slopes, _wants_lse(return_attn_probs, False), deterministic,
                         names=NAMES_OF_KV)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


@untraced
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q, k and v in one array.

    qkv: (total, 3, heads, head_dim). cu_seqlens: (batch + 1,), int32. max_seqlen: a hint. Its gradient is one new
    contiguous array. Everything else: as there.
    """
    q, k, v = _parts("qkv", qkv, "(total, 3, heads, head_dim)", 3, 4)
    dropin.check_options(deterministic, dropout_p)
    found = dropin.varlen(q, k, v, NAMES_OF_QKV, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                          max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=causal, softmax_scale=softmax_scale,
                          window=window_of(window_size), softcap=softcap_of(softcap), alibi_slopes=alibi_slopes,
                          return_lse=_wants_lse(return_attn_probs, False), deterministic=deterministic)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


@untraced
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of k and v in one array.

    kv: (total_k, 2, heads_kv, head_dim). Its gradient is one new contiguous array. Everything else: as there.
    """
    k, v = _parts("kv", kv, "(total_k, 2, heads_kv, head_dim)", 2, 4)
    dropin.check_options(deterministic, dropout_p)
    found = dropin.varlen(q, k, v, NAMES_OF_KV, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                          max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, causal=causal,
                          softmax_scale=softmax_scale, window=window_of(window_size), softcap=softcap_of(softcap),
                          alibi_slopes=alibi_slopes, return_lse=_wants_lse(return_attn_probs, False),
                          deterministic=deterministic)  # fmt: skip
    return _with_probs(found) if return_attn_probs else found


def _lengths(cu_seqlens_k: Any) -> Any:
    """Of the sequences that cu_seqlens_k places."""
    plain = str(getattr(cu_seqlens_k, "layout", "")) == "torch.strided" and not cu_seqlens_k.is_nested
    if not plain or cu_seqlens_k.dim() != 1:
        raise ArgumentError("cu_seqlens_k", "must be a plain torch.Tensor of shape (batch + 1,), int32", reason="rank")
    return cu_seqlens_k.diff()


def _parts(name: str, packed: Any, form: str, n: int, rank: int) -> tuple[Any, ...]:
    """The arrays that lie in a packed one, n of them along the dimension before heads.

    `unbind` has one backward, which stacks their gradients.
    """
    if not hasattr(packed, "unbind"):
        raise ArgumentError(name, f"{type(packed).__name__}, must be a torch.Tensor", reason="type")
    if str(packed.layout) != "torch.strided" or packed.is_nested:
        raise ArgumentError(name, f"layout {packed.layout}, must be a plain strided tensor", reason="layout")
    if packed.dim() != rank:
        raise ArgumentError(name, f"{packed.dim()} dimensions, must be the {rank} of {form}", reason="rank")
    if packed.shape[-3] != n:
        raise ArgumentError(name, f"shape {tuple(packed.shape)}, must be {form}", reason="shape")
    parts: tuple[Any, ...] = packed.unbind(-3)
    return parts


def window_of(window_size: Any) -> dropin.Pair | None:
    """Ours of FlashAttention-2's, where a negative side is open; None where both sides are."""
    if window_size is BOTH_OPEN:
        return None
    left, right = dropin.sides(window_size)
    if type(left) is int and left < 0:
        left = None
    if type(right) is int and right < 0:
        right = None
    return None if left is right is None else (left, right)


def softcap_of(softcap: Any) -> Any:
    """Ours of FlashAttention-2's, where only a positive one counts."""
    found = softcap if type(softcap) is float else number(softcap)
    return 0.0 if type(found) in (int, float) and found <= 0 else softcap


def _wants_lse(return_attn_probs: Any, return_lse: Any) -> Any:
    if return_attn_probs is False:
        return return_lse
    check_flag("return_attn_probs", return_attn_probs)
    if return_attn_probs and return_lse:
        raise ArgumentError("return_lse", "return_attn_probs returns the LSE already; ask for one", reason="value")
    return return_attn_probs or return_lse


def _with_probs(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse = found
    return out, lse, out.new_empty(0)
