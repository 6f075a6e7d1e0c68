"""Would the checks notice? Faults are planted in real kernels, one at a time, and each must be caught.

Dropped barriers, weakened waits, copies without their bound, comparisons of two registers that hold one step too long,
and falsified parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from registry.contract import Variant, fast_divmod
from tests.kernels import faults
from tests.kernels.cases import of, skeletons, varlen
from tests.kernels.faults import Fault
from tests.kernels.launch import Compiled, caught, run
from tests.ptx.interpreter import Kernel
from tests.support.call import Call

SKELETONS = skeletons()


def probes(variant: Variant) -> list[Call]:
    """Small calls that between them bring every thread to the edge of its rows, keys, columns and entries."""
    m, n = variant.size("m"), variant.size("n")
    rows = [16 * j + 5 for j in range(m // 16)]
    keys = [2 * n + 16 * (j % (n // 16)) + 3 for j in range(m // 16)]
    windows = ((None, None), (None, 0), (n // 2 + 3, 9))
    ragged = [Call(q, k, 1, 1, window=windows[j % 3]) for j, (q, k) in enumerate(zip(rows, keys, strict=True))]
    # A thread's rows lie 8 apart, so two diagonals that lie 8 apart bring m of its columns to both edges. The right one
    # lies a block to the left, else the last key would come before it.
    shifts = [start + by for start in range(0, n, m) for by in (0, 8)]
    edges = [Call(m, m + 2 * n, 1, 1, window=(n + 1 + by, 5 + by - n)) for by in shifts]
    empty_rows = Call(m + n + 9, n + 7, 2, 1, window=(None, 0), family="far_below")
    most = max(variant.head_dim, variant.head_dim_v)
    columns = [
        Call(m, 2 * n + 9, 1, 1, head_dim=min(dim, variant.head_dim), head_dim_v=min(dim, variant.head_dim_v))
        for dim in range(8, most, 32)  # one in each panel
    ]
    entries = [
        varlen((m, 0, 9), (n + 9, 5, 3)),
        varlen((1, 0, 2, 5) * 10, (3, 9, 0, 8) * 10),
        varlen((m + 9, 0), (90, 0)).but(cu_seqlens_q=(0, m + 9, 0)),  # a tile behind its entry's last
    ]
    return [*edges, *ragged[::-1], empty_rows, *columns, *entries, Call(5, 0, 1, 1)]


def survivors(compiled: Compiled, found: list[Fault]) -> list[Fault]:
    """The faults that nothing caught."""
    cases = probes(compiled.variant)
    return faults.survivors(found, lambda kernel: caught(compiled, cases, kernel))


@of(SKELETONS)
def test_the_sound_kernel_passes(variant: Variant, variant_of: Callable[[str], Compiled]):
    compiled = variant_of(variant.key)
    assert caught(compiled, probes(variant)) == ""


@of(SKELETONS)
def test_dropped_barriers(variant: Variant, variant_of: Callable[[str], Compiled]):
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


@of(SKELETONS)
def test_unbounded_copies(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Rows past a sequence's end and columns past head_dim are never read, by any thread."""
    compiled = variant_of(variant.key)
    found = faults.unbounded_copies(compiled.ptx)
    assert len(found) >= 10
    assert survivors(compiled, found) == []


def wasteful(compiled: Compiled, found: list[Fault]) -> list[Fault]:
    """The faults that only cost time: somewhere they execute more than the sound kernel."""
    cases = probes(compiled.variant)
    sound = [run(compiled, case).steps for case in cases]
    kernels = [(fault, Kernel(fault.ptx)) for fault in found]
    return [
        fault
        for fault, kernel in kernels
        if any(run(compiled, case, kernel).steps > steps for case, steps in zip(cases, sound, strict=True))
    ]


@of(SKELETONS)
def test_shifted_bounds(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Every fault that makes a difference is caught, and hardly any makes none: its two sides are never equal."""
    compiled = variant_of(variant.key)
    found = faults.shifted_bounds(compiled.ptx)
    assert len(found) >= 40
    left = survivors(compiled, found)
    traps = {trap.line: trap for trap in faults.trapped_bounds(compiled.ptx)}
    inert = [fault for fault in left if survivors(compiled, [traps[fault.line]])]
    slow = wasteful(compiled, [fault for fault in left if fault not in inert])
    assert [fault for fault in left if fault not in inert and fault not in slow] == []
    assert len(inert) <= len(found) // 10, "bounds that nothing reaches: remove them, or probe them"
    assert len(slow) <= 2, "bounds that only save work: a block without rows, a key block without keys"


FALSE_PARAMETERS: list[tuple[str, Call, dict[str, int]]] = [
    ("key-beyond", Call(37, 75, 2, 1), {"seqlen_k": 76}),
    ("key-missing", Call(37, 75, 2, 1), {"seqlen_k": 74}),
    ("row-beyond", Call(37, 75, 1, 1), {"seqlen_q": 38}),
    ("row-missing", Call(37, 75, 1, 1), {"seqlen_q": 36}),
    ("right-bound", Call(37, 75, 1, 1, window=(None, 0)), {"window_right": 1}),
    ("left-bound", Call(37, 75, 1, 1, window=(20, None)), {"window_left": 19}),
    ("key-used", Call(37, 75, 1, 1, seqused_k=(70,)), {"seqused_k": 0}),
    ("row-used", Call(37, 75, 1, 1, seqused_q=(30,)), {"seqused_q": 0}),
    ("left-padding", Call(37, 75, 1, 1, leftpad_k=(9,)), {"leftpad_k": 0}),
    ("entries-of-keys", varlen((20, 17), (40, 35)), {"cu_seqlens_k": 0}),
    ("column-beyond", Call(37, 75, 1, 1, head_dim=40), {"head_dim": 48}),
    ("column-missing", Call(37, 75, 1, 1, head_dim=40), {"head_dim": 32}),
    ("column-beyond-of-v", Call(37, 75, 1, 1, head_dim_v=40), {"head_dim_v": 48}),
    ("column-missing-of-v", Call(37, 75, 1, 1, head_dim_v=40), {"head_dim_v": 32}),
    ("group", Call(37, 75, 4, 2), {"heads_kv": 1}),
    ("packed-group", Call(37, 75, 6, 2, pack=True), {"pack": 2}),
    ("packed-division", Call(37, 75, 3, 1, pack=True), {"pack_magic": fast_divmod(4)[0]}),
    ("softcap", Call(37, 75, 1, 1, softcap=5.0), {"softcap_scale": 0}),
    ("sink", Call(37, 75, 2, 1, sink="fp32"), {"sink": 0}),
    ("sink-dtype", Call(37, 75, 2, 1, sink="fp32"), {"sink_low": 1}),
    ("alibi", Call(37, 75, 2, 1, alibi="heads"), {"alibi_slopes": 0}),
    ("alibi-of-each-entry", Call(37, 75, 2, 1, batch=2, alibi="batch"), {"alibi_stride_b": 0}),
    ("stride", Call(37, 75, 2, 2), {"k_stride_s": 8}),
]


@pytest.mark.parametrize(
    ("case", "changed"), [row[1:] for row in FALSE_PARAMETERS], ids=[r[0] for r in FALSE_PARAMETERS]
)
@pytest.mark.variants(SKELETONS[0])
def test_false_parameters(case: Call, changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    compiled = variant_of(SKELETONS[0].key)
    assert caught(compiled, [case]) == ""
    assert caught(compiled, [case], changed=changed) != ""
