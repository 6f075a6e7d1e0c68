"""A forward over a KV cache: what its call must fulfil beyond a dense one, and the launch that appends to the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from registry.contract import WINDOW_OPEN, fast_divmod
from runtime.call import tensors
from runtime.call.launch import Launch, Maker, Settled
from runtime.call.plain import integer
from runtime.call.plan import Workspace
from runtime.call.request import Call, Options
from runtime.call.splits import MAX_SPLITS
from runtime.call.tensors import Numbers
from runtime.errors import ArgumentError

ROTARY_STEP = 16  # of rotary_dim: each half of the rotated columns is whole pieces of 16 bytes


class Appending(NamedTuple):
    """What comes before the forward. elsewhere: {tensor of the forward: the workspace that is read in its place}."""

    launches: tuple[Launch, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    written: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = {}


# -- rules ------------------------------------------------------------------------------------------------------------


def check(given: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Rules across a cache's arguments. Raises ArgumentError."""
    batch = sizes["batch"]
    if "page_table" not in given and sizes["pages"] < batch:
        message = f"{sizes['pages']} entries, must be at least q's batch, {batch}, where no table places its pages"
        raise ArgumentError("k", message, reason="shape")
    if sizes["page_size"] > tensors.MAX_I32:
        message = f"pages of {sizes['page_size']} tokens, must be below 2**31"
        raise ArgumentError("k", message, reason="too_large")
    for name in ("k", "v"):
        if sizes["page_size"] > 1 and given[name].stride(1) > tensors.MAX_I32:
            message = f"stride {given[name].stride(1)} from token to token, must be below 2**31 elements"
            raise ArgumentError(name, message, reason="stride")
    for name in ("k_descale", "v_descale"):
        if name in given and given["k"].element_size() > 1:
            message = f"needs a cache of float8_e4m3fn, this one is {given['k'].dtype}"
            raise ArgumentError(name, message, reason="unsupported")
    _check_pair(given, *tensors.APPENDED)
    _check_pair(given, "rotary_cos", "rotary_sin")
    if "k_new" in given:
        if "seqused_k" not in given:
            message = "must say how long each sequence is, as tokens are appended behind it"
            raise ArgumentError("seqused_k", message, reason="value")
        for name in ("k", "v"):
            tensors.check_apart_within(name, given[name])
    if "rotary_cos" in given:
        _check_rotary(given, sizes)


def _check_pair(given: Mapping[str, Any], first: str, second: str) -> None:
    for name, other in ((first, second), (second, first)):
        if name not in given and other in given:
            raise ArgumentError(name, f"must be given with {other}", reason="value")


def _check_rotary(given: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    cos, sin = given["rotary_cos"], given["rotary_sin"]
    if "k_new" not in given:
        message = "needs the new k and v: only what is appended, and q, are rotated"
        raise ArgumentError("rotary_cos", message, reason="value")
    rotary_dim, positions, head_dim = sizes["rotary_dim"], sizes["positions"], sizes["head_dim"]
    if not 0 < rotary_dim <= head_dim or rotary_dim % ROTARY_STEP or positions == 0:
        message = (
            f"shape {tuple(cos.shape)}, must be (positions, rotary_dim / 2) with a position or more and a rotary_dim "
            f"that is a multiple of {ROTARY_STEP} up to head_dim, {head_dim}"
        )
        raise ArgumentError("rotary_cos", message, reason="shape")
    if cos.stride(0) != sin.stride(0) and positions > 1:
        message = f"row stride {sin.stride(0)}, must be rotary_cos's, {cos.stride(0)}"
        raise ArgumentError("rotary_sin", message, reason="stride")
    if positions > tensors.MAX_I32 or (positions > 1 and positions * cos.stride(0) > tensors.MAX_I32):
        message = f"{positions} rows with a stride of {cos.stride(0)}, must be below 2**31 elements"
        raise ArgumentError("rotary_cos", message, reason="too_large")


def check_num_splits(given: Any, has_seqused_q: bool) -> int:
    """What is asked for: 0 is our choice. Raises ArgumentError."""
    found = integer(given)
    if type(found) is not int or not 0 <= found <= MAX_SPLITS:
        message = f"{given!r:.50}, must be an integer from 1 to {MAX_SPLITS}, or 0 for our choice"
        raise ArgumentError("num_splits", message, reason="value")
    if has_seqused_q and found > 1:
        message = f"{found}, must be 0 or 1 with seqused_q: rows beyond it would hold no partial output"
        raise ArgumentError("num_splits", message, reason="unsupported")
    return 1 if has_seqused_q else found


# -- numbers ----------------------------------------------------------------------------------------------------------


def numbers(given: Mapping[str, Any], sizes: Mapping[str, int], window: tuple[int, int], asked: Options) -> Numbers:
    """Of `fwd_paged` and `kv_append`, beyond those of `fwd`."""
    tensors.check_flag("rotary_interleaved", asked.rotary_interleaved)
    batch, cos = sizes["batch"], given.get("rotary_cos")
    page_magic, page_shift = fast_divmod(max(sizes["page_size"], 1))
    is_rotated = cos is not None
    return {
        "page_size": sizes["page_size"],
        "page_magic": page_magic,
        "page_shift": page_shift,
        "page_table_stride": tensors.stride_of_batch(given.get("page_table"), batch),
        "k_descale_stride_b": tensors.stride_of_batch(given.get("k_descale"), batch),
        "v_descale_stride_b": tensors.stride_of_batch(given.get("v_descale"), batch),
        "seqlen_new": sizes.get("seqlen_new", 0),
        "seqlen_rotated": sizes.get("seqlen_q", 0) if is_rotated else 0,
        "rotary_dim": sizes.get("rotary_dim", 0),
        "rotary_rows": sizes.get("positions", 0),
        "rotary_stride": cos.stride(0) if cos is not None and sizes["positions"] > 1 else 0,
        "interleaved": int(asked.rotary_interleaved),
        "q_still": int(is_rotated and window == (WINDOW_OPEN, WINDOW_OPEN)),
    }


def numbers_of_copy(call: Call) -> Numbers:
    """Strides of q where the rotated copy takes its place."""
    return {f"q_stride_{axis}": step for axis, step in _steps_of_copy(call.sizes).items()}


def _steps_of_copy(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the contiguous copy of q that `kv_append` rotates; 0 along a dimension of one entry."""
    tokens, heads, head_dim = sizes["seqlen_q"], sizes["heads_q"], sizes["head_dim"]
    steps = {"b": (sizes["batch"], tokens * heads * head_dim), "s": (tokens, heads * head_dim), "h": (heads, head_dim)}
    return {axis: step if n > 1 else 0 for axis, (n, step) in steps.items()}


# -- chain ------------------------------------------------------------------------------------------------------------


def appending(call: Call, maker: Maker) -> Appending:
    """The launch of `kv_append`, if there is something to append or rotate."""
    found, sizes = call.numbers, call.sizes
    rotates, appends = bool(found["rotary_dim"]), bool(found["seqlen_new"])
    # Rows that it writes: of K, of V, of a rotated q.
    rows = 2 * sizes["batch"] * int(found["seqlen_new"]) * sizes["heads_kv"]
    rows += sizes["batch"] * int(found["seqlen_rotated"]) * sizes["heads_q"]
    launches: tuple[Launch, ...] = ()
    if rows:
        facts = {name: call.facts[name] for name in ("dtype", "kv_dtype", "head_dim", "head_dim_v")} | {"rows": rows}
        copy = _steps_of_copy(sizes) if rotates else dict.fromkeys("bsh", 0)
        settled = Settled(found | {f"q_out_stride_{axis}": step for axis, step in copy.items()})
        names = {} if rotates else {"q": "", "q_out": ""}  # without rotation q is not read
        launches = (maker.prepared("kv_append", facts, lambda _: settled, names),)
    written = ("k", "v") if rows and appends else ()
    if not rotates:
        return Appending(launches, written=written)
    nbytes = 2 * sizes["batch"] * sizes["seqlen_q"] * sizes["heads_q"] * sizes["head_dim"]
    return Appending(launches, (Workspace("q_out", nbytes),), written, {"q": "q_out"})
