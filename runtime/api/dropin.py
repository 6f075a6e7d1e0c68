"""What the drop-in functions of `runtime.api.fa2` and `runtime.fa4` share: what is refused, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.api.attention import attend, flash_attn, given_of
from runtime.api.varlen import flash_attn_varlen
from runtime.call.request import Options
from runtime.call.tensors import check_flag
from runtime.errors import ArgumentError

# FlashAttention's arguments that this package does not serve: each must be None, which is upstream's default.
UNSUPPORTED = frozenset((
    *("qv", "gather_kv_indices", "min_seqlen_k", "page_table", "block_table", "score_mod", "score_mod_bwd", "mask_mod"),
    "cache_leftpad",
    *("aux_tensors", "aux_scalars", "block_sparse_tensors", "block_sparse_tensors_bwd", "scheduler_metadata"),
    *("seqlen_k_per_split", "q_descale", "k_descale", "v_descale"),
))  # fmt: skip
NAMES = {"sink": "learnable_sink", "window": "window_size"}  # ours -> theirs
Pair = tuple[Any, Any]


def refuse(**given: Any) -> None:
    """ArgumentError ('unsupported') for the first that is not None; TypeError for a name that is nobody's."""
    for name, value in given.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is not None:
            raise ArgumentError(name, "is not supported here, must be None", reason="unsupported")


def check_options(deterministic: Any, dropout_p: Any = 0.0) -> None:
    """ArgumentError for a dropout, which there is none of, or a deterministic that is no flag."""
    if dropout_p != 0.0:
        raise ArgumentError("dropout_p", f"{dropout_p!r:.50}: there is no dropout, must be 0.0", reason="unsupported")
    check_flag("deterministic", deterministic)


def check_unsplit(num_splits: Any) -> None:
    """ArgumentError for a split where k and v are not a cache."""
    if num_splits not in (0, 1):
        message = f"{num_splits!r:.50}: only keys of a KV cache can be split, must be 1, or 0 for our choice"
        raise ArgumentError("num_splits", message, reason="unsupported")


def sides(window_size: Any) -> Pair:
    """(left, right) of a window_size; None is both sides open."""
    if window_size is None:
        return None, None
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ArgumentError("window_size", f"{window_size!r:.100} is not (left, right)", reason="type") from None
    return left, right


def dense(q: Any, k: Any, v: Any, causal: Any, softmax_scale: Any, window: Pair | None, softcap: Any, sink: Any,
          alibi_slopes: Any, return_lse: Any, pack_gqa: Any, deterministic: Any) -> Any:  # fmt: skip
    """`flash_attn`, whose errors then name the arguments as FlashAttention does."""
    try:
        if pack_gqa is None:
            return flash_attn(q, k, v, causal=causal, softmax_scale=softmax_scale, window=window, softcap=softcap,
                              sink=sink, alibi_slopes=alibi_slopes, return_lse=return_lse,
                              deterministic=deterministic)  # fmt: skip
        options = Options(causal, softmax_scale, window, softcap, return_lse, pack_gqa=pack_gqa)
        given = given_of(q, k, v, None, sink=sink, alibi_slopes=alibi_slopes)
        return attend("fwd", given, options, deterministic=deterministic)
    except ArgumentError as error:
        raise renamed(error) from None


def varlen(q: Any, k: Any, v: Any, names: Mapping[str, str] = NAMES, **options: Any) -> Any:
    """`flash_attn_varlen`, whose errors then have the caller's names. names: ours -> theirs."""
    try:
        return flash_attn_varlen(q, k, v, **options)
    except ArgumentError as error:
        raise renamed(error, names) from None


def renamed(error: ArgumentError, names: Mapping[str, str] = NAMES) -> ArgumentError:
    return error.renamed(names[error.argument]) if error.argument in names else error
