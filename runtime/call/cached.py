"""What a call with a KV cache has beyond a plain one: pages, splits, descales, appended tokens, rotary embedding."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from registry.contract import WINDOW_OPEN
from runtime.call import checks
from runtime.call.splits import MAX_SPLITS
from runtime.errors import ArgumentError

# Optional tensors: of op `fwd_paged`, in the ABI's order, and of calls that also run `kv_append`.
PAGED = ("cu_seqlens_q", "seqused_q", "seqused_k", "page_table", "sink", "alibi_slopes", "k_descale", "v_descale")
NEW = ("k_new", "v_new")
APPENDING = (*PAGED, *NEW, "rotary_cos", "rotary_sin")
PAGES = "(pages, page_size, heads_kv, head_dim)"
ROTARY_STEP = 16  # of rotary_dim: each half of the rotated columns is whole pieces of 16 bytes


class Cached(NamedTuple):
    """The checked part of a call that its cache brings. Strides in elements, 0 where there is but one entry.

    num_splits: as asked for, 0 for the heuristic's choice; 1 where splits are not offered. seqlen_new: tokens that the
    call appends. rotary_dim: 0 without rotary embedding. q_still: all queries are rotated as of the first position.
    """

    page_size: int
    page_table_stride: int
    num_splits: int
    k_descale_stride_b: int
    v_descale_stride_b: int
    seqlen_new: int
    rotary_dim: int
    rotary_rows: int
    rotary_stride: int
    interleaved: int
    q_still: int


def kinds(low: Any, torch: Any) -> dict[str, tuple[tuple[Any, ...], dict[int, str]]]:
    """Of the optional tensors that only such calls have: name -> (dtypes, {dimensions: what they are})."""
    new = ((low,), {4: "(batch, seqlen_new, heads_kv, head_dim)"})
    rotary = ((low,), {2: "(positions, rotary_dim / 2)"})
    descale = ((torch.float32,), {1: "(heads_kv,)", 2: "(batch, heads_kv)"})
    return {
        "page_table": ((torch.int32,), {2: "(batch, max_pages)"}),
        "k_descale": descale,
        "v_descale": descale,
        "k_new": new,
        "v_new": new,
        "rotary_cos": rotary,
        "rotary_sin": rotary,
    }


def check_shapes(q: Any, k: Any, v: Any, optional: dict[str, Any], batch: int) -> None:
    """ArgumentError unless the cache and its tensors fit q and each other. k and v: as arguments.check has seen."""
    heads_kv, head_dim, table = k.shape[2], k.shape[3], optional["page_table"]
    if table is None and k.shape[0] < batch:
        message = f"{k.shape[0]} entries, must be at least q's batch, {batch}, where no table places its pages"
        raise ArgumentError("k", message, reason="shape")
    if table is not None and table.shape[0] != batch:
        message = f"shape {tuple(table.shape)}, must be (batch, max_pages) with the batch of {batch}"
        raise ArgumentError("page_table", message, reason="shape")
    for name in ("k_descale", "v_descale"):
        if optional[name] is not None:
            if k.element_size() > 1:
                message = f"needs a cache of float8_e4m3fn, this one is {k.dtype}"
                raise ArgumentError(name, message, reason="unsupported")
            checks.check_shape(name, optional[name], (heads_kv,), (batch, heads_kv))
    new, rotary = optional.get("k_new"), optional.get("rotary_cos")
    _check_pair(optional, "k_new", "v_new")
    _check_pair(optional, "rotary_cos", "rotary_sin")
    if new is not None:
        checks.check_shape("k_new", new, (batch, new.shape[1], heads_kv, head_dim))
        checks.check_shape("v_new", optional["v_new"], (batch, new.shape[1], heads_kv, v.shape[3]))
        if optional["seqused_k"] is None:
            message = "must say how long each sequence is, as tokens are appended behind it"
            raise ArgumentError("seqused_k", message, reason="value")
        for name, cache in (("k", k), ("v", v)):
            checks.check_apart_within(name, cache)
    if rotary is not None:
        _check_rotary(optional, head_dim)


def _check_pair(optional: dict[str, Any], first: str, second: str) -> None:
    for name, other in ((first, second), (second, first)):
        if optional.get(name) is None and optional.get(other) is not None:
            raise ArgumentError(name, f"must be given with {other}", reason="value")


def _check_rotary(optional: dict[str, Any], head_dim: int) -> None:
    cos, sin = optional["rotary_cos"], optional["rotary_sin"]
    if optional["k_new"] is None:
        message = "needs the new k and v: only what is appended, and q, are rotated"
        raise ArgumentError("rotary_cos", message, reason="value")
    rotary_dim = 2 * cos.shape[1]
    if not 0 < rotary_dim <= head_dim or rotary_dim % ROTARY_STEP or cos.shape[0] == 0:
        message = (
            f"shape {tuple(cos.shape)}, must be (positions, rotary_dim / 2) with a position or more and a rotary_dim "
            f"that is a multiple of {ROTARY_STEP} up to head_dim, {head_dim}"
        )
        raise ArgumentError("rotary_cos", message, reason="shape")
    checks.check_shape("rotary_sin", sin, tuple(cos.shape))
    if cos.stride(0) != sin.stride(0) and cos.shape[0] > 1:
        message = f"row stride {sin.stride(0)}, must be rotary_cos's, {cos.stride(0)}"
        raise ArgumentError("rotary_sin", message, reason="stride")


def check(k: Any, v: Any, optional: dict[str, Any], batch: int, num_splits: Any, window: tuple[int, int],
          interleaved: bool) -> Cached:  # fmt: skip
    """What `check_shapes` has found to fit, as numbers. window: with causal in it. Raises ArgumentError."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[1] > 1 and tensor.stride(1) > checks.MAX_I32:
            message = f"stride {tensor.stride(1)} from token to token, must be below 2**31 elements"
            raise ArgumentError(name, message, reason="stride")
    table, new, cos = optional["page_table"], optional.get("k_new"), optional.get("rotary_cos")
    if table is not None and table.stride(0) > checks.MAX_I32:
        raise ArgumentError("page_table", f"row stride {table.stride(0)}, must be below 2**31", reason="stride")
    descales = [optional[name] for name in ("k_descale", "v_descale")]
    strides = [t.stride(0) if t is not None and t.dim() == 2 and batch > 1 else 0 for t in descales]
    positions, half = (0, 0) if cos is None else cos.shape
    stride = cos.stride(0) if cos is not None and positions > 1 else 0
    if positions * stride > checks.MAX_I32:
        message = f"{positions} rows with a stride of {stride}, must be below 2**31 elements"
        raise ArgumentError("rotary_cos", message, reason="too_large")
    return Cached(
        page_size=k.shape[1],
        page_table_stride=table.stride(0) if table is not None and batch > 1 else 0,
        num_splits=_check_splits(num_splits, optional["seqused_q"] is not None),
        k_descale_stride_b=strides[0],
        v_descale_stride_b=strides[1],
        seqlen_new=0 if new is None else new.shape[1],
        rotary_dim=2 * half,
        rotary_rows=positions,
        rotary_stride=stride,
        interleaved=int(interleaved),
        q_still=int(cos is not None and window == (WINDOW_OPEN, WINDOW_OPEN)),
    )


def _check_splits(num_splits: Any, has_seqused_q: bool) -> int:
    try:
        found = operator.index(num_splits)
    except TypeError:
        found = -1
    if not 0 <= found <= MAX_SPLITS:
        message = f"{num_splits!r:.50}, must be an integer from 1 to {MAX_SPLITS}, or 0 for our choice"
        raise ArgumentError("num_splits", message, reason="value")
    if has_seqused_q and found > 1:
        message = f"{found}, must be 0 or 1 with seqused_q: rows beyond it would hold no partial output"
        raise ArgumentError("num_splits", message, reason="unsupported")
    return 1 if has_seqused_q else found
