"""The choice of splits: what any sensible one has, that it is cheap, and where the measurements put it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.contract import WINDOW_OPEN, Variant
from runtime.call import splits
from runtime.call.splits import is_heavy, num_splits, visible_keys


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 200), st.integers(0, 9), st.booleans())
def test_bounds(units, key_blocks, multiprocessors, each, heavy):
    found = num_splits(units, key_blocks, multiprocessors, each, heavy)
    assert 1 <= found <= max(1, min(key_blocks, splits.MAX_SPLITS))
    if min(units, multiprocessors, each) == 0:
        assert found == 1


@pytest.mark.parametrize(("units", "key_blocks"), [(1, 4096), (8, 4096), (8, 256), (32, 1024), (64, 2048), (200, 512)])
@pytest.mark.parametrize("each", [1, 3, 6])
def test_long_keys_of_few_units_fill_the_device(units, key_blocks, each):
    found = num_splits(units, key_blocks, 132, each)
    busy = units * found / 132
    assert busy >= 0.9 or found >= key_blocks // 16


# Batch 32 and 256 × 8 key/value heads, and one sequence of 131072, on an H200 with 132 multiprocessors, as it is and
# with SM120's occupancy: share of the best measured among the numbers of splits that docs/tuning.md lists.
@pytest.mark.parametrize(("units", "key_blocks", "each", "heavy", "good"), [
    (256, 256, 6, False, {2, 3, 6}), (256, 256, 3, False, {3, 6}), (2048, 128, 6, False, {1, 2, 3}),
    (1024, 128, 6, False, {2, 3}), (1024, 128, 3, False, {1, 3}), (8, 4096, 3, False, set(range(45, 50))),
    (8, 4096, 6, False, {*range(45, 50), *range(60, 99)}), (256, 256, 9, True, {4, 8}), (256, 256, 5, True, {2}),
    (2048, 128, 9, True, {1}),
])  # fmt: skip
def test_measured_cases(units, key_blocks, each, heavy, good):
    assert num_splits(units, key_blocks, 132, each, heavy) in good


@pytest.mark.parametrize("key_blocks", [0, 1, 2, 3])
def test_short_keys_are_not_split(key_blocks):
    assert num_splits(1, key_blocks, 132, 1) == 1


def test_what_is_heavy():
    heavy = {"d64-dv64": True, "d128-dv128": False, "d128-dv128-e4m3kv": True, "d256-dv256-e4m3kv": True}
    for text, expected in heavy.items():
        dims, _, _ = text.partition("-e4m3kv")
        key = f"fwd_paged-bf16-{dims}-m16-n32-w1-s2" + ("-e4m3kv" if text.endswith("kv") else "")
        assert is_heavy(Variant.parse(key)) == expected


def test_it_costs_little():
    num_splits.cache_clear()
    start = time.perf_counter()
    for units in range(1, 101):
        num_splits(units, 4096, 132, 4)
    assert time.perf_counter() - start < 2  # 100 choices, each some 0.2 ms


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "window", "keys"), [
    (1, 100, (WINDOW_OPEN, WINDOW_OPEN), 100), (1, 100, (WINDOW_OPEN, 0), 100), (1, 100, (16, 0), 17),
    (4, 100, (16, 0), 20), (1, 100, (16, WINDOW_OPEN), 100), (1, 10, (16, 0), 10), (1, 100, (0, 5), 6),
])  # fmt: skip
def test_a_window_bounds_the_keys(seqlen_q, seqlen_k, window, keys):
    assert visible_keys(seqlen_q, seqlen_k, window) == keys
