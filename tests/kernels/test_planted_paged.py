"""As test_planted_faults, for the paged forward: would its checks notice?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from registry.contract import Variant, fast_divmod
from tests.kernels import faults
from tests.kernels.cases import of
from tests.kernels.faults import Fault
from tests.kernels.launch import Compiled, caught, kv_dtype, run
from tests.kernels.paged_cases import paged
from tests.support.abis import FWD_PAGED
from tests.support.call import Append, Call, packed
from tests.support.skeletons import SKELETONS

# For what is not about stages.
SMALLEST = list({v.features: v for v in sorted(SKELETONS, key=lambda v: (-v.size("m"), -v.head_dim))}.values())


def probes(variant: Variant) -> list[Call]:
    """Small calls that between them bring every thread to the edge of its rows, keys, pages, columns and entries."""
    m, n = variant.size("m"), variant.size("n")
    one = paged(1, 6 * n, 1, 1)
    unit = 16 if kv_dtype(variant) == "e4m3" else 8
    # A key's row among those that a thread copies, at both ends of a window that begins in the last block or before it.
    lengths = tuple(range(2 * n, 3 * n))
    ends = [
        one.but(batch=n, seqused_k=lengths, window=(left, 0), order="shared", page_size=size or None)
        for left, size in ((n - 1, 0), (3, 0), (3, 24))
    ]
    ragged = [
        one.but(seqlen_q=16 * j + 5, batch=4, page_size=size or None, seqused_k=used, window=window, head_dim=16)
        for j in range(m // 16)
        for size, used, window in (
            (1, (2 * n + 3, n, n + 1, 1), (None, None)),
            (0, (3 * n - 3, n - 1, 0, 2 * n), (None, 0)),
            (16, (3 * n + 9, n + 8, 2 * n + 7, 5), (n // 2 + 3, 9)),
        )
    ]
    # Pages that no group of keys fits into: the other way to find a row's place.
    ungrouped = [
        one.but(seqlen_q=5, batch=3, page_size=24, seqused_k=(3 * n + 3, n - 1, n + 1), window=window,
                head_dim=unit, head_dim_v=unit)
        for window in ((None, None), (None, 0), (n + 3, 0))
    ]  # fmt: skip
    shifts = [start + by for start in range(0, n, m) for by in (0, 8)]
    edges = [one.but(seqlen_q=m, seqused_k=(m + 2 * n,), window=(n + 1 + by, 5 + by - n)) for by in shifts]
    # Two blocks at the right edge, and at the left one, with others between them; pages that blocks do not divide.
    between = [
        one.but(seqlen_q=max(m, n), seqused_k=(5 * n + 8,), window=window, page_size=48)
        for window in ((None, 0), (2 * n + 8, 5))
    ]
    splits = [
        one.but(seqlen_q=q, heads_q=2, batch=3, pack=True, num_splits=splits, seqused_k=(6 * n, n + 1, 0), page_size=n,
                sink="fp32", window=(None, right))
        for splits, q, right in ((3, m + 1, None), (7, 2, 0))
    ]  # fmt: skip
    most = max(variant.head_dim, variant.head_dim_v)
    columns = [
        one.but(seqlen_q=m, seqused_k=(2 * n + 9,), num_splits=splits,
                head_dim=min(dim, variant.head_dim), head_dim_v=min(dim, variant.head_dim_v))
        for splits, step in ((1, 32), (2, unit))  # one in each panel, and every end of a partial output
        for dim in range(unit, most, step)
    ]  # fmt: skip
    entries = [packed_queries((m, 0, 9), (n + 9, 5, 3)), packed_queries((1, 0, 2, 5) * 10, (3, 9, 0, 8) * 10)]
    behind = packed_queries((m + 9, 0), (60, 0)).but(cu_seqlens_q=(0, m + 9, 0))  # a tile behind an entry's last
    no_keys = one.but(seqlen_q=5, seqused_k=(0,))
    # Padding up to every row of a thread, to the end of a block, of the keys, and of what some rows of a tile see.
    padded = [
        one.but(batch=n, seqused_k=(3 * n + 5,) * n, leftpad_k=tuple(range(n, 2 * n)), page_size=size or None)
        for size in (0, 16, 24)
    ]
    padded += [
        one.but(seqlen_q=q, batch=4, seqused_k=(n + 9, 2 * n, 2 * n + 5, 7), window=(None, 0), num_splits=splits,
                leftpad_k=(n, 2 * n - 1, 2 * n + 5, 3))
        for q, splits in ((1, 1), (m, 1), (m, 2))
    ]  # fmt: skip
    return [*padded, *ends, *ungrouped, *ragged, *edges, *between, *splits, *columns, *entries, behind, no_keys]


def packed_queries(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> Call:
    seqlen_q, cu_seqlens_q = packed(lengths_q)
    return paged(seqlen_q, 64, 1, 1, batch=len(lengths_q), cu_seqlens_q=cu_seqlens_q, seqused_k=lengths_k)


def survivors(compiled: Compiled, found: list[Fault]) -> list[Fault]:
    """The faults that nothing caught."""
    cases = probes(compiled.variant)
    return faults.survivors(found, lambda kernel: caught(compiled, cases, kernel))


@of(SKELETONS)
def test_the_sound_kernel_passes(variant: Variant, variant_of: Callable[[str], Compiled]):
    assert caught(variant_of(variant.key), probes(variant)) == ""


@of(SKELETONS)
def test_dropped_barriers(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Of blocks of one warp too, in which they order the warp's own threads."""
    compiled = variant_of(variant.key)
    found = faults.dropped_barriers(compiled.ptx)
    assert len(found) >= 2
    assert survivors(compiled, found) == []


@of(SKELETONS)
def test_weakened_waits(variant: Variant, variant_of: Callable[[str], Compiled]):
    compiled = variant_of(variant.key)
    found = faults.weakened_waits(compiled.ptx)
    assert len(found) >= 2
    assert survivors(compiled, found) == []


@of(SMALLEST)
def test_unbounded_copies(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Nothing of a page behind an entry's last key is read, and no column past head_dim, by any thread."""
    compiled = variant_of(variant.key)
    kernel = faults.Switchable(compiled.ptx, faults.unbounded)
    assert len(kernel.places) >= 10
    every = dict.fromkeys(probes(variant), range(len(kernel.places)))
    left = kernel.survivors(every, lambda case: caught(compiled, [case], kernel))
    assert [kernel.text(number) for number in left] == []


@of(SMALLEST[:1])  # half a minute each
def test_shifted_bounds(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Whatever can make a difference in these calls, because its two sides are equal at times, is caught."""
    compiled, kernel = variant_of(variant.key), faults.Switchable(variant_of(variant.key).ptx, faults.shifted)
    steps, equal = {}, {}
    for case in probes(variant):
        steps[case], equal[case] = run(compiled, case, kernel).steps, set(kernel.equal)
    slow, wrong = [], []
    for number in kernel.survivors(equal, lambda case: caught(compiled, [case], kernel)):
        kernel.on = number
        wasteful = any(run(compiled, case, kernel).steps > steps[case] for case in steps if number in equal[case])
        (slow if wasteful else wrong).append(kernel.text(number))
    assert wrong == []
    assert len(slow) <= 2, "bounds that only save work"
    # Never equal: odd columns and head dims, and either end of the keys with rows of a block that has whole ones only.
    reached = set().union(*equal.values())
    assert len(reached) > 0.5 * len(kernel.places), "bounds that nothing reaches: remove them, or probe them"


@of(SMALLEST[:1])
def test_dropped_bounds(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Where the keys of a row begin, by its window or behind the padding: in the range of blocks and in the mask."""
    compiled = variant_of(variant.key)
    found = faults.dropped_bounds(compiled.ptx)
    assert len(found) >= 8
    left = survivors(compiled, found)
    assert len(left) <= 2, "the ends of ranges, of which the split's share takes care again"


CALL = paged(3, 80, 4, 2, batch=2, seqused_k=(75, 37), window=(None, 0))
FALSE_PARAMETERS: list[tuple[str, Call, dict[str, int]]] = [
    ("table", CALL, {"page_table": 0}),
    ("table-stride", CALL, {"page_table_stride": 0}),
    ("page-size", CALL, {"page_size": 15}),
    ("page-division", CALL, {"page_magic": fast_divmod(11)[0]}),
    ("page-shift", CALL, {"page_shift": fast_divmod(16)[1] + 1}),
    ("used", CALL, {"seqused_k": 0}),
    ("new-missing", CALL.but(append=Append(2)), {"seqlen_k_new": 1}),
    ("new-beyond", CALL, {"seqlen_k_new": 1}),
    ("left-padding", CALL.but(leftpad_k=(9, 3)), {"leftpad_k": 0}),
    ("left-padding-of-splits", CALL.but(num_splits=3, leftpad_k=(40, 3)), {"leftpad_k": 0}),
    ("room-missing", CALL.but(seqused_k=None), {"seqlen_k": 79}),
    ("room-beyond", CALL.but(seqused_k=None), {"seqlen_k": 81}),
    ("fewer-splits", CALL.but(num_splits=3), {"num_splits": 2}),
    ("more-splits", CALL.but(num_splits=2), {"num_splits": 3}),
    ("group", CALL, {"heads_kv": 1}),
    ("column-beyond", CALL.but(head_dim=32), {"head_dim": 48}),
    ("column-missing", CALL.but(head_dim=32), {"head_dim": 16}),
    ("column-beyond-of-v", CALL.but(head_dim_v=32), {"head_dim_v": 48}),
    ("column-missing-of-v", CALL.but(head_dim_v=32), {"head_dim_v": 16}),
    ("window", CALL, {"window_right": 1}),
    ("packed-group", CALL.but(pack=True), {"pack": 1}),
    ("softcap", CALL.but(softcap=5.0), {"softcap_scale": 0}),
    ("sink", CALL.but(sink="fp32"), {"sink": 0}),
    ("sink-of-splits", CALL.but(sink="fp32", num_splits=3), {"sink": 0}),
    ("alibi", CALL.but(alibi="heads"), {"alibi_slopes": 0}),
    ("alibi-of-each-entry", CALL.but(alibi="batch"), {"alibi_stride_b": 0}),
    ("k-descale", CALL.but(descale="heads"), {"k_descale": 0}),
    ("v-descale", CALL.but(descale="heads"), {"v_descale": 0}),
    ("k-descale-of-each-entry", CALL.but(descale="batch"), {"k_descale_stride_b": 0}),
    ("v-descale-of-each-entry", CALL.but(descale="batch"), {"v_descale_stride_b": 0}),
    *[(name, CALL, {name: 16}) for name in (p.name for p in FWD_PAGED.params)
      if "_stride_" in name and "descale" not in name and "alibi" not in name and "split" not in name],
    *[(name, CALL.but(num_splits=3), {name: 16}) for name in ("o_stride_split", "lse_stride_split")],
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "changed"), [row[1:] for row in FALSE_PARAMETERS], ids=[r[0] for r in FALSE_PARAMETERS]
)
@pytest.mark.variants(next(v for v in SKELETONS if kv_dtype(v) == "e4m3"))
def test_false_parameters(case: Call, changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    """On an e4m3 cache, which has every parameter."""
    compiled = variant_of(next(v for v in SKELETONS if kv_dtype(v) == "e4m3").key)
    assert caught(compiled, [case]) == ""
    assert caught(compiled, [case], changed=changed) != ""
