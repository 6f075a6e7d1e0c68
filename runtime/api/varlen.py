"""`flash_attn_varlen`: sequences of different lengths in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.api.attention import attend, given_of
from runtime.call.cache import check_num_splits
from runtime.call.request import Hints, Options
from runtime.call.tensors import check_flag
from runtime.errors import ArgumentError
from runtime.load.dynamo import untraced

if TYPE_CHECKING:
    import torch


@untraced
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
    deterministic: bool = False,
    pack_gqa: bool | None = None,
    page_table: torch.Tensor | None = None,
    num_splits: int = 0,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    zero_unused: bool = False,
) -> Any:
    """`flash_attn` over sequences of different lengths, which stay on the device: nothing reads them on the host.

    q: (total_q, heads_q, head_dim) with cu_seqlens_q, else (batch, seqlen_q, heads_q, head_dim). k and v: the same
        with cu_seqlens_k and heads_kv, v with head_dim_v. total_q + total_k below 2**30.
    cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32: where each sequence starts in the packed array, and the end.
    seqused_q, seqused_k: (batch,), int32: how many tokens from a sequence's start count; the others neither attend
        nor are attended to. Masks are aligned with these lengths. With or without cu_seqlens.
    max_seqlen_q, max_seqlen_k: ints, a hint about the longest sequence of a packed array, by which a tile is chosen
        and nothing else: any value gives the same result. None takes the mean, total / batch; a dense array's length
        is known. A tensor counts as its value on the CPU and as None on a device: reading it there would synchronise.
        With page_table, max_seqlen_k guides num_splits too.
    pack_gqa: whether the query heads of a key/value head share tiles, which changes no result; None is our choice.
    page_table: (batch, max_pages), int32, any row stride: k and v then are a cache, (pages, page_size, heads_kv,
        head_dim or head_dim_v) of any page size, and key j of sequence b lies in row j % page_size of page
        page_table[b, j // page_size]. Lengths are seqused_k's, or max_pages · page_size without; entries of the table
        behind a sequence's length are not read, nor are rows of pages. Pages may be shared, and k and v two parts of
        one array. cu_seqlens_k must be None.
    num_splits: how many blocks share the keys of one tile, 1 to 256, for few queries and long keys; 0 chooses by shapes
        and hints alone, so that a CUDA graph keeps its choice. More than 1 needs k and v that are a cache or dense, and
        no seqused_q; partial outputs take num_splits · (head_dim_v + 1) · 4 bytes for each head of each query, from
        torch's allocator, and rows of `out` that belong to no sequence are written, too. Without page_table 0 is 1,
        and so is any number where dense k and v, or another input, require grad.
    k_descale, v_descale: (heads_kv,) or (batch, heads_kv), fp32: factors of a k and v that are float8_e4m3fn (head dims
        and strides multiples of 16); None is 1. A float8 k and v need page_table or one of these.
    leftpad_k: (batch,), int32: each sequence's first key, counted from its start: those before it are padding, which is
        neither read nor attended to. Where keys end stays as cu_seqlens_k or seqused_k has it, and masks stay aligned
        with that end.
    zero_unused: True or False (or 1 or 0): rows of a new output and LSE that belong to no sequence are zeros, for one
        more pass over them; where an input requires grad they always are. With cu_seqlens_q num_splits is then 1.
    Everything else: as in `flash_attn`, whose errors this function raises as well. Without page_table and descales it
        is differentiable as that function is; a packed q has (total_q / 128 + batch) · 128 rows there. With them an
        input may require grad, but a backward that comes to the call raises ArgumentError ('requires_grad').

    Totals and hints may differ in every call; a batch size is prepared for once, like any other shape.
    Lengths that point outside an array are cut to it. Rows that belong to no sequence, or lie beyond its seqused_q,
    are not written: in a new tensor, or LSE, they hold anything unless zero_unused. Gradients of such rows are zeros.
    Returns out, (total_q or batch, seqlen_q, heads_q, head_dim_v), or (out, lse); the LSE is (heads_q, total_q) for a
    packed q, else (batch, heads_q, seqlen_q).
    """
    if deterministic is not False:
        check_flag("deterministic", deterministic)
    if zero_unused is not False:
        check_flag("zero_unused", zero_unused)
    given = given_of(q, k, v, out, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q,
                     seqused_k=seqused_k, leftpad_k=leftpad_k, page_table=page_table, sink=sink,
                     alibi_slopes=alibi_slopes, k_descale=k_descale, v_descale=v_descale)  # fmt: skip
    op = "fwd"
    if type(num_splits) is not int:
        num_splits = check_num_splits(num_splits, False)
    if page_table is not None or k_descale is not None or v_descale is not None or num_splits not in (0, 1):
        if cu_seqlens_k is not None:
            raise _needs_cache(page_table, num_splits)
        if _unsplit_for_gradients(given, num_splits):
            num_splits = 1
        else:
            op = "fwd_paged"
        if zero_unused and cu_seqlens_q is not None:
            num_splits = _unsplit(num_splits)
    options = Options(causal, softmax_scale, window, softcap, return_lse, pack_gqa, num_splits)
    return attend(op, given, options, Hints(max_seqlen_q, max_seqlen_k), deterministic, zero_unused)


def _unsplit_for_gradients(given: dict[str, Any], num_splits: Any) -> bool:
    """Whether splits, which change no result, are left out: only the forward of dense k and v has gradients."""
    if not {"page_table", "k_descale", "v_descale"}.isdisjoint(given):
        return False
    check_num_splits(num_splits, "seqused_q" in given)
    import torch

    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in given.values())


def _unsplit(num_splits: Any) -> int:
    """Partial outputs are combined in all rows, whether they belong to a sequence or not."""
    if num_splits not in (0, 1):
        message = f"{num_splits!r:.50}, must be 0 or 1 with zero_unused and cu_seqlens_q"
        raise ArgumentError("num_splits", message, reason="unsupported")
    return 1


def _needs_cache(page_table: Any, num_splits: Any) -> ArgumentError:
    """For a packed k with something that only a cache has."""
    if page_table is not None:
        message = "cannot be given with cu_seqlens_k: seqused_k says how long the sequences of a cache are"
        return ArgumentError("page_table", message, reason="unsupported")
    if num_splits not in (0, 1):
        message = f"{num_splits!r:.50}: keys that cu_seqlens_k places are not split, must be 1, or 0 for our choice"
        return ArgumentError("num_splits", message, reason="unsupported")
    message = "cannot be given with descales, which are of a cache"
    return ArgumentError("cu_seqlens_k", message, reason="unsupported")
