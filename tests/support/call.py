"""A call of attention as data, whoever runs it: the PTX interpreter (tests/kernels), a GPU (tests/gpu).

A `Call` says what is asked for: sizes, lengths, scores. What else it may have is a part of it: a `Cache` that its keys
lie in, new keys to `Append` to that, a `Grad` if gradients are wanted. A further feature is a field here, a line where
inputs are made, and one where the reference is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

Window = tuple[int | None, int | None]  # keys to the left and right of the diagonal; None: no bound
OPEN: Window = (None, None)
CAUSAL: Window = (None, 0)
FAMILIES = ("normal", "times4", "far_below")
Dims = tuple[int, int]  # head_dim, head_dim_v
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of the batch entries lie: (array, tokens) of each. A packed array holds all entries.

    paddings: how many tokens in front of each entry do not count.
    """

    seqlen: int
    arrays: int
    is_packed: bool
    entries: tuple[tuple[int, slice], ...]
    paddings: Numbers

    @classmethod
    def of(
        cls, seqlen: int, batch: int, cu_seqlens: Sequence[int] | None = None, seqused: Sequence[int] | None = None,
        leftpad: Sequence[int] | None = None,
    ) -> Tokens:  # fmt: skip
        """Bad lengths are clamped to the array, as the device does."""
        packed, entries, paddings = cu_seqlens is not None, [], []
        for b in range(batch):
            stop = min(max(cu_seqlens[b + 1], 0), seqlen) if cu_seqlens is not None else seqlen
            start = min(max(cu_seqlens[b], 0), stop) if cu_seqlens is not None else 0
            length = stop - start if seqused is None else min(max(seqused[b], 0), stop - start)
            padding = 0 if leftpad is None else min(max(leftpad[b], 0), length)
            entries.append((0 if packed else b, slice(start + padding, start + length)))
            paddings.append(padding)
        return cls(seqlen, 1 if packed else batch, packed, tuple(entries), tuple(paddings))


@dataclass(frozen=True)
class Cache:
    """How the keys and values of a call are kept.

    page_size: None for a contiguous cache, one page of `seqlen_k` tokens for each entry. order: of the pages in memory
    (of the entries, if contiguous): 'in order', 'permuted', 'shared', where entries have pages in common, or 'first',
    all of them page 0, by numbers below 0. halves: K and V are halves of one array. heads_first: in a page, heads lie
    outside of tokens. far: pages lie more than 2**32 elements apart. kv_dtype: 'e4m3', or '' for the call's. descale:
    of e4m3, '' for none, 'heads' or 'batch'. spare: columns of the table (rows of a contiguous cache) that no entry
    needs. lost: (entry, column) of pages that are negative. door: the function that serves the call, 'kvcache' or
    'varlen'.
    """

    page_size: int | None = 16
    order: str = "permuted"
    halves: bool = False
    heads_first: bool = False
    far: bool = False
    kv_dtype: str = ""
    descale: str = ""
    spare: int = 2
    lost: tuple[tuple[int, int], ...] = ()
    door: str = "kvcache"


@dataclass(frozen=True)
class Append:
    """tokens: new ones of every entry, behind its seqused_k. rotary: '', 'halves' or 'interleaved'; rotary_dim: even,
    at most head_dim. rotary_rows: of the cos and sin tables; None: enough."""

    tokens: int
    rotary: str = ""
    rotary_dim: int = 0
    rotary_rows: int | None = None


@dataclass(frozen=True)
class Grad:
    """dlse: the LSE has a gradient; dalibi: the slopes have one. deterministic: sums in the same order each time.
    splits: blocks that share the query heads of a key/value head."""

    dlse: bool = False
    deterministic: bool = False
    dalibi: bool = False
    splits: int = 1


PARTS = {"cache": Cache, "append": Append, "grad": Grad}


@dataclass(frozen=True, repr=False)
class Call:
    """One call.

    seqlen_q, seqlen_k: tokens of an entry, or of the whole array where cu_seqlens places its entries. head_dim,
    head_dim_v, dtype: 0 and '' for the variant's. seqused_k: with `append`, before it; seqlen_k is then where new keys
    find no more room. leftpad_k: as the call says it; the device cuts it to the entry. max_seqlen: whether the call
    states the longest lengths of packed arrays.

    softmax_scale: None for the default. sink: '', 'fp32' or 'low' (q's dtype). alibi: '', 'heads' or 'batch', which
    says that the slopes are each entry's own. num_splits: of the keys, 0 for as many as the runtime likes. pack: the
    query heads of a key/value head share tiles. family, seed: which numbers the inputs are. heads_first: arrays are
    (heads, seqlen, dim) in memory. far: entries lie 2**32 elements apart, packed keys as far into their array.
    """

    seqlen_q: int
    seqlen_k: int
    heads_q: int = 2
    heads_kv: int = 2
    batch: int = 1
    head_dim: int = 0
    head_dim_v: int = 0
    dtype: str = ""
    cu_seqlens_q: Numbers | None = None
    cu_seqlens_k: Numbers | None = None
    seqused_q: Numbers | None = None
    seqused_k: Numbers | None = None
    leftpad_k: Numbers | None = None
    max_seqlen: bool = True
    window: Window = OPEN
    softmax_scale: float | None = None
    softcap: float = 0.0
    sink: str = ""
    alibi: str = ""
    num_splits: int = 0
    pack: bool = False
    lse: bool = True
    family: str = "normal"
    seed: int = 0
    heads_first: bool = False
    far: bool = False
    cache: Cache | None = None
    append: Append | None = None
    grad: Grad | None = None

    def __repr__(self) -> str:
        """What is not by default."""
        told = (f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default)
        return f"{type(self).__name__}({', '.join(told)})"

    def but(self, **changes: Any) -> Call:
        """The same call but for these fields, its own or its parts'."""
        own = {f.name for f in fields(self)}
        for name, kind in PARTS.items():
            of_part = {f.name for f in fields(kind)} - own
            if part := {field: changes.pop(field) for field in of_part & set(changes)}:
                changes[name] = replace(changes.get(name, getattr(self, name)), **part)
        return replace(self, **changes)

    @property
    def queries(self) -> Tokens:
        return Tokens.of(self.seqlen_q, self.batch, self.cu_seqlens_q, self.seqused_q)

    @property
    def keys(self) -> Tokens:
        """With those that the call appends."""
        new = 0 if self.append is None else self.append.tokens
        used = None if self.seqused_k is None else [n + new for n in self.seqused_k]
        return Tokens.of(self.seqlen_k, self.batch, self.cu_seqlens_k, used, self.leftpad_k)

    @property
    def is_varlen(self) -> bool:
        """Whether anything is said of lengths besides the arrays' own."""
        said = (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k, self.leftpad_k)
        return any(numbers is not None for numbers in said)

    @property
    def longest(self) -> tuple[int, int]:
        """Rows of q and of k that the arrays have for the longest entry."""
        return _longest(self.seqlen_q, self.cu_seqlens_q), _longest(self.seqlen_k, self.cu_seqlens_k)

    @property
    def sizes(self) -> dict[str, tuple[int, int, int, int]]:
        """The shapes of q, k, v and o where each entry has an array of its own, as long as the longest."""
        seqlen_q, seqlen_k = self.longest
        query, key = (self.batch, seqlen_q, self.heads_q), (self.batch, seqlen_k, self.heads_kv)
        d, dv = self.head_dim, self.head_dim_v
        return {"q": (*query, d), "k": (*key, d), "v": (*key, dv), "o": (*query, dv)}


def _longest(seqlen: int, cu_seqlens: Numbers | None) -> int:
    return seqlen if cu_seqlens is None else max((b - a for a, b in pairwise(cu_seqlens)), default=0)


def packed(lengths: Sequence[int], spare: int = 0) -> tuple[int, Numbers]:
    """(tokens of the array, cu_seqlens) of entries of these lengths with `spare` tokens behind the last."""
    cu_seqlens = tuple(accumulate(lengths, initial=0))
    return cu_seqlens[-1] + spare, cu_seqlens


def lengths(
    q: Numbers, k: Numbers, used_q: Numbers | None = None, used_k: Numbers | None = None, packed_q: bool = True,
    packed_k: bool = True, spare: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a call whose entries have arrays of q and k rows, all the same if they are not packed.

    spare: rows of a packed array behind its last entry. more: other fields.
    """
    made = {"batch": len(q), "seqused_q": used_q, "seqused_k": used_k, **more}
    for side, rows, is_packed in (("q", q, packed_q), ("k", k, packed_k)):
        seqlen, cu_seqlens = packed(rows, spare) if is_packed else (max(rows, default=0), None)
        made |= {f"seqlen_{side}": seqlen, f"cu_seqlens_{side}": cu_seqlens}
    return made
