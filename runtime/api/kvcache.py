"""`flash_attn_with_kvcache`: FlashAttention-2's decode function."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.api import dropin
from runtime.api.attention import attend, given_of
from runtime.api.fa2 import BOTH_OPEN, softcap_of, window_of
from runtime.call.request import Options
from runtime.call.tensors import check_apart_within
from runtime.errors import ArgumentError
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch

NAMES = {
    "k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v",
    "seqused_k": "cache_seqlens", "leftpad_k": "cache_leftpad", "page_table": "block_table", "window": "window_size",
    "return_lse": "return_softmax_lse",
}  # fmt: skip
KEPT = ("k", "v", "out")  # not copied where the kernels cannot read them: a cache is large, and may be written


@untraced
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = BOTH_OPEN,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sink: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> Any:
    """Attention of new queries over a KV cache, to which new keys and values may be appended first.

    q: (batch, seqlen_q, heads_q, head_dim), bf16 or fp16, as in `flash_attn`.
    k_cache, v_cache: (pages, page_size, heads_kv, head_dim) and (…, head_dim_v) with block_table, any page_size; else
        (entries, capacity, heads_kv, …) with at least `batch` entries. Of q's dtype or both float8_e4m3fn, then with
        head dims and strides that are multiples of 16. They may be two parts of one array. The last dimension
        contiguous, other strides multiples of 16 bytes.
    k, v: (batch, seqlen_new, heads_kv, head_dim) and (…, head_dim_v) of q's dtype, memory apart from the cache: go into
        the cache, in place, at positions cache_seqlens and on; what lies behind its capacity is dropped. Both or none;
        they need cache_seqlens. In a float8 cache: value / descale, rounded to nearest even, saturated at ±448.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2), q's dtype, one row stride for both, rotary_dim a multiple of 16
        up to head_dim: k and q are rotated, token i as of position cache_seqlens + i, but all of q as of position
        cache_seqlens if there is neither causal nor a window. Positions behind the last row take it. They need k.
    rotary_interleaved: True rotates dimensions 2i and 2i + 1 together, False i and i + rotary_dim / 2.
    cache_seqlens: tokens in the cache before this call: (batch,) int32 on the device, which nothing reads on the host,
        or an int for all, which takes a copy to the device in each call. None: caches are full.
    cache_batch_idx: (batch,), int32: which entry of the cache each sequence has. Not with block_table.
    cache_leftpad: (batch,), int32: each sequence's first key in its cache: those before it are padding, neither read
        nor attended to. Positions, rotary ones too, stay as they are without it.
    block_table: (batch, max_pages), int32, any row stride: key j of sequence b lies in row j % page_size of page
        block_table[b, j // page_size]. Entries behind a sequence's length are not read, nor are rows of pages.
    causal, window_size: as FlashAttention-2 has them; masks are aligned with the last of the keys, new ones included.
    num_splits: how many blocks share the keys of one tile, 1 to 256; 0 chooses by shapes alone. Partial outputs take
        num_splits · (head_dim_v + 1) · 4 bytes for each head of each query, from torch's allocator.
    return_softmax_lse: also return the LSE, (batch, heads_q, seqlen_q).
    sink, out: as in `flash_attn`. k_descale, v_descale: (heads_kv,) or (batch, heads_kv), fp32, factors of a float8
        cache; None is 1.
    softmax_scale, softcap, alibi_slopes: as in `flash_attn`.

    q and what goes into the cache are copied where the kernels cannot read them where they lie. The cache is not, but
    where its head dims are no multiple of 8: then it is padded, whole, in each call, and what is appended copied back.
    Runs on torch's current stream, without synchronising: append, forward and combination, as far as they are needed.
    Not differentiable: inputs may require grad, but a backward that comes to the call raises ArgumentError
    ('requires_grad').
    Contents of cache_seqlens, block_table and cache may change between calls and between replays of a CUDA graph.
    Returns out, (batch, seqlen_q, heads_q, head_dim_v), or (out, lse). Raises what flash_attn raises.
    """
    names, given = NAMES, None
    try:
        window = window_of(window_size)
        if cache_batch_idx is not None:
            names = NAMES | {"page_table": "cache_batch_idx"}
            block_table = _as_table(cache_batch_idx, block_table)
        if isinstance(cache_seqlens, numbers.Integral):
            cache_seqlens = _on_device(int(cache_seqlens), q)
        given = given_of(q, k_cache, v_cache, out, seqused_k=cache_seqlens, leftpad_k=cache_leftpad,
                         page_table=block_table, sink=sink, alibi_slopes=alibi_slopes, k_descale=k_descale,
                         v_descale=v_descale, k_new=k, v_new=v, rotary_cos=rotary_cos,
                         rotary_sin=rotary_sin)  # fmt: skip
        options = Options(causal, softmax_scale, window, softcap_of(softcap), return_softmax_lse, None, num_splits,
                   rotary_interleaved)  # fmt: skip
        found = attend("fwd_paged", given, options)
        if out is not None or not (found[0] if return_softmax_lse else found).requires_grad:
            return found
        return dropin.renamed_later(found, names)
    except ArgumentError as error:
        if given is None:
            raise dropin.renamed(error, names) from None
        return _again(error, given, options, names)


def _again(error: ArgumentError, given: dict[str, Any], options: Options, names: Mapping[str, str]) -> Any:
    """`dropin.again` of a call whose cache may be padded: what was appended to the copy goes back."""
    caches = {name: given[name] for name in ("k", "v")}

    def attended(softmax_scale: Any, **tensors: Any) -> Any:
        padded = [name for name in caches if "k_new" in tensors and tensors[name] is not caches[name]]
        for name in padded:
            check_apart_within(name, caches[name])
        found = attend("fwd_paged", tensors, options._replace(softmax_scale=softmax_scale))
        for name in padded:
            _put_back(caches[name], tensors[name])
        return found if "out" in given else dropin.renamed_later(found, names)

    return dropin.again(attended, error, given | {"softmax_scale": options.softmax_scale}, names, KEPT)


def _put_back(cache: Any, padded: Any) -> None:
    import torch

    with torch.no_grad():
        cache.copy_(padded[..., : cache.shape[-1]])


def _as_table(cache_batch_idx: Any, block_table: Any) -> Any:
    """A table of one page for each sequence."""
    if block_table is not None:
        message = "cannot be given with block_table, which says where each sequence lies"
        raise ArgumentError("cache_batch_idx", message, reason="value")
    if not hasattr(cache_batch_idx, "unsqueeze") or cache_batch_idx.dim() != 1:
        raise ArgumentError("cache_batch_idx", "must be a torch.Tensor of shape (batch,), int32", reason="type")
    return cache_batch_idx.unsqueeze(1)


def _on_device(cache_seqlens: int, q: Any) -> Any:
    """The same length for all sequences, as a tensor on q's device."""
    import torch

    if not isinstance(q, torch.Tensor) or q.dim() == 0:
        raise ArgumentError("q", f"{type(q).__name__}, must be a torch.Tensor", reason="type")
    if not 0 <= cache_seqlens < 2**31:
        raise ArgumentError("cache_seqlens", f"{cache_seqlens}, must be from 0 to 2**31 - 1", reason="value")
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
