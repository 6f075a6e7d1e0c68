"""Grids cover every row once; division by multiplication is exact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.contract import ContractError, Grid, fast_divmod


@given(st.integers(0, 10**6), st.integers(1, 256), st.integers(1, 64), st.integers(1, 9), st.integers(0, 64))
def test_grid_covers_every_query_row_once(seqlen_q, tile_m, heads_kv, group, batch):
    facts = {"seqlen_q": seqlen_q, "heads_q": heads_kv * group, "batch": batch}
    for pack in (1, group):
        blocks = Grid("tiles_heads_batch", tile_m).blocks(facts, pack)
        tiles, rest = divmod(blocks, heads_kv * group // pack * batch) if batch else (0, 0)
        assert rest == 0
        assert batch == 0 or (tiles - 1) * tile_m < seqlen_q * pack <= tiles * tile_m


@given(st.lists(st.integers(0, 700), min_size=1, max_size=20), st.sampled_from([16, 64, 128]), st.integers(1, 9))
def test_grid_has_tiles_of_its_own_for_each_packed_entry(lengths, tile_m, pack):
    """Entry b, from token c on, owns the tiles from c·pack // tile_m + b on; the grid's order says nothing else."""
    facts = {"varlen": 1, "total_q": sum(lengths), "seqlen_q": 1, "heads_q": 3 * pack, "batch": len(lengths)}
    tiles, rest = divmod(Grid("tiles_heads_batch", tile_m).blocks(facts, pack), 3)
    assert rest == 0
    free = start = 0
    for b, length in enumerate(lengths):
        first = start * pack // tile_m + b
        assert first >= free
        free = first + -(-length * pack // tile_m)
        start += length
    assert free <= tiles or start == tiles == 0


@pytest.mark.parametrize(("batch", "total_q"), [(0, 0), (0, 500), (3, 0)])
def test_a_packed_array_without_entries_or_tokens_needs_no_blocks(batch, total_q):
    facts = {"varlen": 1, "total_q": total_q, "seqlen_q": 1, "heads_q": 4, "batch": batch}
    assert Grid("tiles_heads_batch", 64).blocks(facts, 2) == 0


def test_grids_of_another_time_are_refused():
    with pytest.raises(ContractError, match="update"):
        Grid("persistent", 128)
    with pytest.raises(ContractError, match="tile_m"):
        Grid("tiles_heads_batch", 0)


@given(st.integers(1, 4096), st.integers(0, 2**31 - 1))
def test_division_by_multiplication(divisor, n):
    magic, shift = fast_divmod(divisor)
    for dividend in (n, n - n % divisor, max(n - n % divisor - 1, 0), 2**31 - 1):
        assert dividend * magic >> shift == dividend // divisor and dividend * magic < 2**63
    assert fast_divmod(1) == (2**31, 31)
