"""Calls of the paged forward: every pair of options occurs in the cases that the variants share among themselves."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from registry.contract import Variant
from tests.kernels.launch import kv_dtype
from tests.support.call import Append, Cache, Call, packed
from tests.support.covering import covering

PER_VARIANT = {"bf16": 8, "fp16": 4}  # fp16 changes conversions alone

# What a case has of each; `case` says what the names mean for a variant's tile.
FACTORS: dict[str, tuple[Any, ...]] = {
    "page_size": (0, 1, 3, 16, 48, 64, 128, 256),
    "scores": ("", "softcap", "alibi", "entries", "sink", "low-sink", "all"),
    "queries": ("one", "few", "tile", "varlen", "used"),
    "heads": ((2, 2, False), (8, 2, True), (7, 1, True), (6, 2, False), (24, 1, True)),
    "window": ("", "causal", "both", "left", "right"),
    "lengths": ("edges", "pages", "long", "room"),
    "splits": (1, 2, 3, 5),
    "layout": ("apart", "halves", "heads-first", "far"),
    "dims": ("whole", "less", "k-tiny", "v-tiny"),
    "pages": ("permuted", "shared"),
    "family": ("normal", "times4", "far_below"),
    "descale": ("", "heads", "batch"),
    "new": (0, 3),
    "leftpad": ("", "part", "whole"),
    "heads_first": (False, True),
    "lse": (True, False),
}


LAYOUTS: dict[str, dict[str, bool]] = {
    "apart": {}, "halves": {"halves": True}, "heads-first": {"heads_first": True}, "far": {"far": True}
}  # fmt: skip


def paged(seqlen_q: int, seqlen_k: int, heads_q: int = 2, heads_kv: int = 2, **more: Any) -> Call:
    """A call over a cache. more: other fields of it and of its `Cache`."""
    return Call(seqlen_q, seqlen_k, heads_q, heads_kv, cache=Cache()).but(**more)


@lru_cache
def rows() -> list[dict[str, Any]]:
    """Values of the factors, every pair of two factors at least once."""
    return covering(FACTORS)


def share(variant: Variant, variants: list[Variant]) -> list[dict[str, Any]]:
    """The rows that a variant runs: those with its features have all rows between them."""
    alike = [v for v in variants if v.features == variant.features]
    times = -(-len(rows()) // sum(PER_VARIANT[v.dtype] for v in alike))
    first = times * sum(PER_VARIANT[v.dtype] for v in alike[: alike.index(variant)])
    return [rows()[j % len(rows())] for j in range(first, first + times * PER_VARIANT[variant.dtype])]


def case(row: dict[str, Any], variant: Variant) -> Call:
    """The call that a row describes, with lengths beside the edges of the variant's tile and of pages."""
    n, size = variant.size("n"), row["page_size"]
    lengths = {
        "edges": (n + 1, 0, 1),
        "pages": ((size or n) - 1, (size or n) + 1, size or n),
        "long": (3, 3 * n + 5, 2 * n),
        "room": (),
    }[row["lengths"]]
    room = max(*lengths, 1) + 4 if lengths else 2 * n - 5
    heads_q, heads_kv, pack = row["heads"]
    descale = row["descale"] if kv_dtype(variant) == "e4m3" else ""
    return Call(
        seqlen_k=-(-room // size) * size if size else room,
        heads_q=heads_q,
        heads_kv=heads_kv,
        pack=pack,
        batch=3,
        seqused_k=tuple(length - row["new"] for length in lengths) or None,
        leftpad_k={"": None, "part": (n // 2 + 3, n + 2, 1), "whole": (room - 3, 2**31 - 1, -5)}[row["leftpad"]],
        window={
            "": (None, None), "causal": (None, 0), "both": (n // 2 + 3, 9), "left": (n + 1, None), "right": (None, -5)
        }[row["window"]],
        **{name: row[name] for name in ("family", "heads_first", "lse")},
        num_splits=row["splits"],
        cache=Cache(size or None, row["pages"], **LAYOUTS[row["layout"]], descale=descale),
        append=Append(row["new"]) if row["new"] else None,
        **queries(row, variant),
        **scores(row["scores"]),
        **dims(row["dims"], variant),
    )  # fmt: skip


def queries(row: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """How many queries each of three entries has."""
    if row["queries"] == "varlen":
        seqlen, cu_seqlens = packed((variant.size("m") + 3, 0, 2), spare=3)
        return {"seqlen_q": seqlen, "cu_seqlens_q": cu_seqlens}
    if row["queries"] == "used":  # not offered together with splits: some partial outputs would never be written
        return {"seqlen_q": 7, "seqused_q": (5, 7, 0) if row["splits"] == 1 else None}
    return {"seqlen_q": {"one": 1, "few": 3, "tile": variant.size("m") + 5}[row["queries"]]}


def scores(name: str) -> dict[str, Any]:
    """What happens to scores besides the scale."""
    return {
        "": {},
        "softcap": {"softcap": 9.0},
        "alibi": {"alibi": "heads"},
        "entries": {"alibi": "batch"},
        "sink": {"sink": "fp32"},
        "low-sink": {"sink": "low"},
        "all": {"softcap": 20.0, "alibi": "batch", "sink": "low"},
    }[name]


def dims(name: str, variant: Variant) -> dict[str, int]:
    """Head dims of the call, at most the variant's."""
    unit = 16 if kv_dtype(variant) == "e4m3" else 8
    return {
        "whole": {},
        "less": {"head_dim": variant.head_dim - unit, "head_dim_v": variant.head_dim_v - unit},
        "k-tiny": {"head_dim": unit},
        "v-tiny": {"head_dim_v": unit},
    }[name]
