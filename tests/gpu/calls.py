"""Calls as data (`tests.support.call`) of a variant: dense, with lengths, over a cache, and such as append to one.

Those of an op of the backward have gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from registry.contract import Variant
from tests.gpu.paged_inputs import is_low
from tests.gpu.yardstick import MIN_ROWS
from tests.support.call import Append, Cache, Call, Dims, Grad, Numbers, lengths

# What ops that serve all are checked with: the pairs that the table of `bwd` has.
ALL_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
OF_ALL_DIMS = ("bwd_preprocess", "bwd_sum", "bwd_postprocess")
MODIFIERS: dict[str, dict[str, Any]] = {
    "none": {},
    "softcap": {"softcap": 15.0},
    "sink": {"sink": "fp32"},
    "low sink": {"sink": "low"},
    "slopes": {"alibi": "heads"},
    "slopes by entry": {"alibi": "batch"},
    "all": {"softcap": 50.0, "sink": "fp32", "alibi": "batch"},
}


def has_gradients(key: str) -> bool:
    return Variant.parse(key).op.startswith("bwd")


def dims_of(key: str, turn: int = 0) -> Dims:
    """The head dims of call number `turn`: a variant's own; of ops that serve all, those of the table in turn."""
    variant = Variant.parse(key)
    if variant.op in OF_ALL_DIMS:
        return ALL_DIMS[turn % len(ALL_DIMS)]
    return variant.head_dim, variant.head_dim_v


def modified(turn: int) -> dict[str, Any]:
    """A modifier of the scores, in turn."""
    return tuple(MODIFIERS.values())[turn % len(MODIFIERS)]


def in_turn(key: str, seed: int) -> dict[str, Any]:
    """What goes round from call to call."""
    gradients = {"deterministic": seed % 4 == 3, "dlse": seed % 3 == 2}
    return {"seed": seed} | (gradients if has_gradients(key) else {})


def dense(
    key: str, batch: int | None, heads: tuple[int, int], seqlens: tuple[int, int], dims: Dims | None = None, **more: Any
) -> Call:
    """heads: (heads_q, heads_kv); seqlens: (seqlen_q, seqlen_k). batch None: one large enough for the RMS of few
    queries to mean something. dims: by default the variant's. more: other fields of the call or its parts."""
    seqlen_q, seqlen_k = seqlens
    if batch is None:
        batch = max(1 if seqlen_q * seqlen_k > 2**21 else 2, -(-MIN_ROWS // (heads[0] * max(seqlen_q, 1))))
    return _call(key, heads, dims, {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, **more})


def varlen(key: str, heads: tuple[int, int], entries: dict[str, Any], dims: Dims | None = None, **more: Any) -> Call:
    """entries: what `lengths` makes."""
    return _call(key, heads, dims, entries | more)


def _call(key: str, heads: tuple[int, int], dims: Dims | None, fields: dict[str, Any]) -> Call:
    heads_q, heads_kv = heads
    head_dim, head_dim_v = dims or dims_of(key)
    sizes = {"heads_q": heads_q, "heads_kv": heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
    grad = Grad() if has_gradients(key) else None
    return Call(0, 0, **sizes, dtype=Variant.parse(key).dtype, grad=grad).but(**fields)


def paged(
    key: str,
    heads: tuple[int, int],
    q: int | Sequence[int],
    k: Sequence[int],
    cache: Cache,
    *,
    dims: Dims | None = None,
    used_q: Sequence[int] | None = None,
    spare: int = 0,
    leftpad: Sequence[int] | None = None,
    **more: Any,
) -> Call:
    """q: tokens of every entry, or of each one of a packed array. k: keys of each entry. leftpad: of entries that share
    no pages. A contiguous cache has `kvcache` alone, packed queries and seqused_q have `varlen` alone."""
    if leftpad is not None and cache.order == "shared":
        raise ValueError("leftpad: entries that share pages have none")
    packed, used = not isinstance(q, int), None if used_q is None else tuple(used_q)
    rows = (q,) * len(k) if isinstance(q, int) else tuple(q)
    padding = None if leftpad is None else tuple(leftpad)
    room = (max(k, default=0),) * len(k)
    entries = lengths(rows, room, used, tuple(k), packed, False, spare, leftpad_k=padding)
    door = more.pop("door", cache.door)
    door = "varlen" if packed or used_q is not None else "kvcache" if cache.page_size is None else door
    cache = replace(cache, door=door, kv_dtype="e4m3" if is_low(key) else "")
    return varlen(key, heads, entries, dims, cache=cache, **more)


def enough(k: Sequence[int], heads_q: int, seqlen_q: int) -> Numbers:
    """The lengths, repeated until an RMS over the queries of the call means something."""
    return tuple(k) * max(1, -(-MIN_ROWS // max(heads_q * seqlen_q * len(k), 1)))


def append(
    key: str,
    heads: tuple[int, int],
    seqlen_q: int,
    before: Sequence[int],
    new: Append,
    cache: Cache,
    *,
    capacity: int | None = None,
    **more: Any,
) -> Call:
    """before: tokens that the cache has of each entry. capacity: of the cache, if some of the new tokens shall find no
    room; a multiple of the page size. more: keywords of `paged`."""
    if capacity:
        before = [*before[:-1], capacity - new.tokens // 2]
        cache = replace(cache, spare=0)
    after = [min(n + new.tokens, capacity or 2**30) for n in before]
    return paged(key, heads, seqlen_q, after, cache, **more).but(seqused_k=tuple(before), append=new)


def of_one_size(q: Numbers, k: Numbers) -> list[dict[str, Any]]:
    """Lengths that fit one pair of arrays: rearranged, fewer rows than there is room for, other rows used."""
    fewer = tuple(n // 2 for n in q)
    spare = sum(q) - sum(fewer)

    def longer(k: Numbers) -> Numbers:
        return (*k[:-1], k[-1] + spare)

    turned = k[1:] + k[:1]
    return [
        lengths(q, longer(k), used_k=k, max_seqlen=False),
        lengths(q[::-1], longer(turned), used_k=tuple(n // 3 for n in turned), max_seqlen=False),
        lengths(fewer, k, used_k=tuple(max(n - 1, 0) for n in k), spare=spare, max_seqlen=False),
    ]
