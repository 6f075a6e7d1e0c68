"""The largest legal sizes of every op: numbers of heads, entries, tokens, tiles, pages, rows and strides.

A launch has fewer than 2**31 blocks, seqlen_q + seqlen_k is below 2**30 and seqlen_q · pack at most
2**31 − 2**10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.kernels.cases import of, skeletons
from tests.kernels.large import Large, LargeRun
from tests.kernels.launch import Compiled, kv_dtype
from tests.support.skeletons import SKELETONS as PAGED_SKELETONS

MOST = 2**31 - 1  # blocks of a launch, heads, entries
TOKENS = 2**30 - 1  # of q and k together
SMALL = min(skeletons(), key=lambda v: v.size("m") * v.head_dim * v.head_dim_v)
PAGED = [v for v in PAGED_SKELETONS if v.size("m") == 16 and v.head_dim == 64]


def last_tile(rows: int, tile_m: int) -> int:
    return (rows - 1) // tile_m


def cases(m: int) -> dict[str, Large]:
    """Of either forward, with tiles of m rows."""
    entries = 2**20
    rows = 2**31 - 2**10
    packed = {0: TOKENS // 2 - 50, 3: 37}  # nearly all tokens belong to the first entry
    return {
        "heads-of-issue-12": Large(heads_q=65_535, heads_kv=65_535, seqlen_q=20, seqlen_k=20, head=65_534, sink=True),
        "heads-beyond-46341": Large(heads_q=65_535, heads_kv=65_535, seqlen_q=20, seqlen_k=20, head=46_341),
        "most-heads": Large(
            heads_q=MOST, heads_kv=MOST, seqlen_k=9, head=MOST - 1, sink=True, alibi_stride_b=0, page=1
        ),
        "most-heads-mqa": Large(heads_q=MOST, heads_kv=1, seqlen_k=9, head=MOST - 64, sink=True),
        "most-heads-gqa": Large(heads_q=MOST - 1, heads_kv=(MOST - 1) // 2, seqlen_k=9, head=MOST - 2),
        "most-entries": Large(
            batch=MOST, seqlen_k=40, entry=MOST - 1, used_k={MOST - 1: 33}, leftpad_k={MOST - 1: 5}
        ),
        "slopes-of-most-entries": Large(
            batch=entries, heads_q=2**11 - 1, heads_kv=1, seqlen_k=9, entry=entries - 1, head=2**11 - 2,
            alibi_stride_b=2**11 - 1, sink=True,
        ),
        "most-keys": Large(seqlen_k=TOKENS - 1, left=40),
        "most-padding": Large(seqlen_k=TOKENS - 1, leftpad_k={0: TOKENS - 40}, alibi_stride_b=0),
        "most-queries": Large(seqlen_q=TOKENS - 30, seqlen_k=30, tile=last_tile(TOKENS - 30, m)),
        "most-of-both": Large(
            seqlen_q=TOKENS // 2, seqlen_k=TOKENS // 2, tile=last_tile(TOKENS // 2, m), left=9, alibi_stride_b=0
        ),
        "first-of-most-of-both": Large(seqlen_q=TOKENS // 2, seqlen_k=TOKENS // 2, alibi_stride_b=0),
        "most-rows": Large(
            heads_q=2, pack=2, seqlen_q=rows // 2, seqlen_k=9, tile=last_tile(rows, m), sink=True
        ),
        "most-rows-pack7": Large(
            heads_q=7, pack=7, seqlen_q=rows // 7, seqlen_k=9, tile=last_tile(rows // 7 * 7, m), sink=True
        ),
        "most-entries-packed": Large(
            batch=MOST - 2, seqlen_q=12, seqlen_k=30, entry=MOST - 3, lengths_q={MOST - 4: 7, MOST - 3: 5}, left=3
        ),
        "tiles-by-section": Large(
            batch=2**28, heads_q=7, heads_kv=7, seqlen_q=12, seqlen_k=30, entry=2**28 - 1, head=6,
            lengths_q={5: 7, 2**28 - 1: 5},
        ),
        "most-tokens-packed": Large(
            batch=5, seqlen_q=TOKENS // 2, seqlen_k=TOKENS // 2, entry=3, heads_q=3, pack=3, left=9,
            lengths_q=packed,
        ),
    }  # fmt: skip


def dense(m: int) -> dict[str, Large]:
    """Keys of a packed array as well."""
    made = cases(m)
    for name in ("most-entries-packed", "tiles-by-section", "most-tokens-packed"):
        made[name].lengths_k = dict(made[name].lengths_q)
        made[name].seqlen_k = made[name].seqlen_q
    return made


@pytest.mark.parametrize("name", cases(64))
@of([SMALL])
def test_forward(name: str, variant, variant_of: Callable[[str], Compiled]):
    assert LargeRun(variant_of(variant.key), dense(variant.size("m"))[name]).problems() == ""


def paged(m: int) -> dict[str, Large]:
    entries, few = 2**20, Large(seqlen_k=2**16, seqlen_q=1, left=40)
    return {
        "last-page": replace(few, page=MOST, heads_kv=2, heads_q=2, head=1),
        "last-row-of-the-table": replace(
            few, batch=entries, entry=entries - 1, table_stride=MOST, leftpad_k={entries - 1: 2**16 - 7}
        ),
        "long-pages": replace(few, seqlen_k=TOKENS - 2, page_size=(TOKENS - 2) // 3, page=8),
        "far-rows": replace(few, row_stride=MOST // 16 * 16),
        "far-rows-without-groups": replace(few, row_stride=MOST // 16 * 16, page_size=24, seqlen_k=24 * 99),
        "most-splits": replace(few, heads_q=MOST // 256, heads_kv=MOST // 256, head=MOST // 256 - 1, splits=256),
        "last-split": replace(few, heads_q=MOST // 256, heads_kv=1, head=MOST // 256 - 1, splits=256, split=255),
        "descales": replace(few, batch=entries, entry=entries - 1, heads_kv=2, heads_q=2, head=1, descale_stride=MOST),
    }  # fmt: skip


@pytest.mark.parametrize("name", [*cases(16), *paged(16)])
@of(PAGED)
def test_paged(name: str, variant, variant_of: Callable[[str], Compiled]):
    m = variant.size("m")
    case = (cases(m) | paged(m))[name]
    if kv_dtype(variant) != "e4m3":
        case.descale_stride = None
    assert LargeRun(variant_of(variant.key), case).problems() == ""
