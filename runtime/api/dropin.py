"""What the drop-in functions of `runtime.api.fa2` and `runtime.fa4` share: what is refused, and under which names.

Upstream's functions copy what their kernels cannot read where it lies. So do these, once ours have refused it: a call
that needs no copy does not look for one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

from runtime.api.attention import flash_attn
from runtime.api.varlen import flash_attn_varlen
from runtime.call.cache import check_num_splits
from runtime.call.plain import integer, number
from runtime.call.request import SIDES
from runtime.call.tensors import MAX_HEAD_DIM, STRIDE, check_flag
from runtime.errors import ArgumentError

# FlashAttention's arguments that this package does not serve: each must be None, which is upstream's default.
UNSUPPORTED = frozenset((
    *("qv", "gather_kv_indices", "min_seqlen_k", "page_table", "block_table", "score_mod", "score_mod_bwd", "mask_mod"),
    "cache_leftpad",
    *("aux_tensors", "aux_scalars", "block_sparse_tensors", "block_sparse_tensors_bwd", "scheduler_metadata"),
    *("seqlen_k_per_split", "q_descale", "k_descale", "v_descale"),
))  # fmt: skip
# Reasons of refusals for which a copy is the remedy.
UNREADABLE = frozenset(("contiguity", "stride", "alignment"))
TOGETHER = {"rotary_sin": ("rotary_cos", "rotary_sin")}  # they have one row stride
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
    found = dropout_p if type(dropout_p) is float else number(dropout_p)
    if type(found) not in (bool, int, float) or found != 0:
        raise ArgumentError("dropout_p", f"{dropout_p!r:.50}: there is no dropout, must be 0.0", reason="unsupported")
    if deterministic is not False:
        check_flag("deterministic", deterministic)


def sides(window_size: Any) -> Pair:
    """(left, right) of a window_size, as plain numbers; None is both sides open."""
    if window_size is None:
        return None, None
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ArgumentError("window_size", f"{window_size!r:.100} is not (left, right)", reason="type") from None
    return left if type(left) in SIDES else integer(left), right if type(right) in SIDES else integer(right)


def dense(q: Any, k: Any, v: Any, causal: Any, softmax_scale: Any, window: Pair | None, softcap: Any, sink: Any,
          alibi_slopes: Any, return_lse: Any, deterministic: Any, pack_gqa: Any = None, num_splits: Any = 1,
          names: Mapping[str, str] = NAMES) -> Any:  # fmt: skip
    """`flash_attn`, with what only `flash_attn_varlen` takes, whose errors have the caller's names: ours -> theirs."""
    call: Callable[..., Any] = flash_attn
    if pack_gqa is not None or type(num_splits) is not int or num_splits not in (0, 1):
        call = partial(flash_attn_varlen, pack_gqa=pack_gqa, num_splits=num_splits)
    try:
        return call(q, k, v, causal=causal, softmax_scale=softmax_scale, window=window, softcap=softcap, sink=sink,
                    alibi_slopes=alibi_slopes, return_lse=return_lse, deterministic=deterministic)  # fmt: skip
    except ArgumentError as error:
        given = {"q": q, "k": k, "v": v, "causal": causal, "softmax_scale": softmax_scale, "window": window,
                 "softcap": softcap, "sink": sink, "alibi_slopes": alibi_slopes, "return_lse": return_lse,
                 "deterministic": deterministic}  # fmt: skip
        return again(call, error, given, names)


def varlen(q: Any, k: Any, v: Any, names: Mapping[str, str] = NAMES, **options: Any) -> Any:
    """`flash_attn_varlen`, whose errors have the caller's names: ours -> theirs.

    num_splits changes no result: keys that cannot be split are not.
    """
    call: Callable[..., Any] = flash_attn_varlen
    try:
        if options.get("page_table") is not None:
            call = partial(_over_pages, names=names)
        num_splits = options.get("num_splits", 1)
        if type(num_splits) is not int or num_splits != 1:
            _leave_whole(options)
        return call(q, k, v, **options)
    except ArgumentError as error:
        return again(call, error, {"q": q, "k": k, "v": v} | options, names)


def _leave_whole(options: dict[str, Any]) -> None:
    """Keys that cu_seqlens_k places, or that queries of several lengths attend to, are not split."""
    placed = options["page_table"] is None and options["cu_seqlens_k"] is not None
    if placed or options["seqused_q"] is not None:
        options["num_splits"] = min(check_num_splits(options["num_splits"], False), 1)


def _over_pages(q: Any, k: Any, v: Any, names: Mapping[str, str], **options: Any) -> Any:
    return renamed_later(flash_attn_varlen(q, k, v, **options), names)


# -- what is not served as it is --------------------------------------------------------------------------------------


def again(call: Callable[..., Any], error: ArgumentError, given: Mapping[str, Any], names: Mapping[str, str],
          kept: Container[str] = ()) -> Any:  # fmt: skip
    """call(**given), which was refused with `error`, once its tensors are made such as the kernels can read.

    kept: names of what is not copied, but for padding. Raises the error under the caller's names where no copy helps.
    """
    given, tried, width = dict(given), set(), None
    while (error.argument, error.reason) not in tried:
        tried.add((error.argument, error.reason))
        if error.reason in UNREADABLE and error.argument not in kept:
            for name in TOGETHER.get(error.argument, (error.argument,)):
                given[name] = _copy(given[name])
        elif error.reason == "head_dim" and _is_padded(given):
            width = given["v"].shape[-1]
            _pad(given)
        else:
            break
        try:
            found = call(**given)
        except ArgumentError as another:
            error = another
            continue
        return found if width is None else _cut(found, width)
    raise renamed(error, names) from None


def _is_padded(given: Mapping[str, Any]) -> bool:
    """Whether padding makes its head dims served. Raises ArgumentError for what it would hide or lose."""
    if "v" not in given or given["v"].element_size() == 1:  # of float8, whose pieces are twice as long
        return False
    head_dim, head_dim_v = given["q"].shape[-1], given["v"].shape[-1]
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        return False
    if "rotary_cos" in given and 2 * given["rotary_cos"].shape[-1] > head_dim:
        message = f"shape {tuple(given['rotary_cos'].shape)}, its rotary_dim must be at most head_dim, {head_dim}"
        raise ArgumentError("rotary_cos", message, reason="shape")
    if "out" in given and head_dim_v % STRIDE:
        message = f"cannot be given with a head_dim of v, {head_dim_v}, that is no multiple of {STRIDE}; leave it out"
        raise ArgumentError("out", message, reason="unsupported")
    return True


def _copy(tensor: Any) -> Any:
    """A contiguous one, through which gradients flow back."""
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def _pad(given: dict[str, Any]) -> None:
    """Zeros behind each head change no score, and what they add to the output is cut off. The scale is the head's."""
    import torch

    if given.get("softmax_scale") is None:
        given["softmax_scale"] = max(given["q"].shape[-1], 1) ** -0.5
    for name in given.keys() & {"q", "k", "v", "k_new", "v_new"}:
        given[name] = torch.nn.functional.pad(given[name], (0, -given[name].shape[-1] % STRIDE))


def _cut(found: Any, width: int) -> Any:
    return (found[0][..., :width], *found[1:]) if isinstance(found, tuple) else found[..., :width]


def renamed(error: ArgumentError, names: Mapping[str, str] = NAMES) -> ArgumentError:
    return error.renamed(names[error.argument]) if error.argument in names else error


def renamed_later(found: Any, names: Mapping[str, str]) -> Any:
    """`found`, of a call over a cache, in new tensors: a backward that comes to it is refused under the caller's names,
    too."""
    out = found[0] if isinstance(found, tuple) else found
    if out.grad_fn is not None:
        out.grad_fn.names = tuple([names.get(name, name) for name in out.grad_fn.names])
    return found
