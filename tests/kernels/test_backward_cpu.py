"""The PTX of every backward variant, with its two companions, against fp64; every check of the interpreter on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.contract import Variant
from registry.ops.workspaces import ROWS
from tests.kernels.backward import (
    Outcome,
    Trio,
    existing_rows,
    expected,
    first_rows,
    key_tiles,
    matrix,
    problems,
    run,
)
from tests.kernels.backward_cases import VARIANTS, cases, dense, loops, skeletons, varlen
from tests.kernels.cases import of
from tests.kernels.launch import Compiled, softmax_scale
from tests.ptx.interpreter import PtxError
from tests.support.abis import BWD
from tests.support.call import Call, packed

SKELETONS = skeletons()
SMALLEST = min(SKELETONS, key=lambda v: (v.head_dim, v.size("m")))  # for what is not about a tile
RMS_ROWS = 256  # of a random case's gradients: with few, a rounding exceeds twice the model's RMS by chance


def all_cases() -> list:
    return [
        pytest.param(variant, case, id=f"{variant.key}-{name}", marks=pytest.mark.xdist_group(variant.key))
        for variant in VARIANTS
        for name, case in cases(variant).items()
    ]


def check(trio: Trio, case: Call) -> Outcome:
    """The case's outcome, which has nothing wrong."""
    outcome = run(trio, case)
    assert problems(outcome, case, trio.main.variant) == []
    return outcome


@pytest.mark.parametrize(("variant", "case"), all_cases())
def test_backward(variant: Variant, case: Call, variant_of: Callable[[str], Compiled]):
    check(Trio.of(variant, variant_of), case)


# ---- what other implementations fell into ----------------------------------------------------------------------------
@of(SKELETONS)
def test_dq_accum_is_laid_out_as_documented(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Writer and reader could both be wrong: decoded by the text of registry/ops it is dQ, and 0 in other rows."""
    m, n = variant.size("m"), variant.size("n")
    for case in (
        dense(2 * m + 5, n + 9, 2, 1, batch=2),
        varlen((m + 9, 0, 3), (n + 9, 7, 40), spare=5, heads_q=2, window=(None, 0)),
    ):
        outcome = check(Trio.of(variant, variant_of), case)
        accum, exists = matrix(outcome.dq_accum, variant.head_dim), existing_rows(case)
        assert not accum[:, ~exists].any()
        dq = expected(case, variant).dq.out.swapaxes(0, 1)
        found = accum[:, exists] * softmax_scale(case, variant)
        assert np.abs(found - dq).max() < 2.0**-6 * np.abs(dq).max()


@of(SKELETONS)
@pytest.mark.parametrize("splits", [1, 2])
def test_grouped_heads_of_packed_entries(splits, variant, variant_of):
    """Offsets of heads, tokens and padded rows meet here: each is another number."""
    m, n = variant.size("m"), variant.size("n")
    lengths_q, lengths_k = (m + 1, ROWS + 1, 3), (5, n + 1, n)
    case = varlen(lengths_q, lengths_k, spare=9, heads_q=4, heads_kv=2, splits=splits, window=(None, 3))
    assert len({*first_rows(case), *case.cu_seqlens_q[1:], *case.cu_seqlens_k[1:]}) == 10
    assert len(set(key_tiles(case, n))) == 4
    check(Trio.of(variant, variant_of), case)


@of(SKELETONS)
def test_masks_along_every_diagonal(variant, variant_of):
    """Warps side by side hold columns that interleave: each of them meets both edges of the mask."""
    trio, m = Trio.of(variant, variant_of), variant.size("m")
    for by in range(0, min(m, 32), 8):
        check(trio, dense(m, m + 5, 1, 1, window=(by + 3, 2 - by), head_dim=8, head_dim_v=8))


@of(SKELETONS)
def test_overlaunched_tiles_read_nothing_past_cu_seqlens(variant, variant_of):
    """Whole tiles, empty entries: the grids, which know totals alone, have a tile too many for every entry."""
    trio, n = Trio.of(variant, variant_of), variant.size("n")
    case = varlen((ROWS, 0, ROWS, 0, 0), (n, 0, 2 * n, 5, 0), head_dim=8, head_dim_v=8)
    assert key_tiles(case, n)[-1] > 3 + 1
    check(trio, case)
    check(trio, varlen((0, 0, 1), (0, 5, 0), head_dim=8, head_dim_v=8))


@of(SKELETONS)
def test_seqused_is_not_taken_for_dense(variant, variant_of):
    """Unused tokens are no memory that can be read (`Tensor`), their rows stay as they were, and they cost nothing."""
    trio, m, n = Trio.of(variant, variant_of), variant.size("m"), variant.size("n")
    exact = dense(9, n + 3, 1, 1, window=(n, 0))
    used = dense(9 + 3 * m, 5 * n, 1, 1, window=(n, 0), seqused_q=(9,), seqused_k=(n + 3,))
    steps, steps_used = (check(trio, case).steps for case in (exact, used))
    assert steps_used < 1.5 * steps


BAD_CU_SEQLENS = [(0, 90, 40), (0, 40, 10**9), (-50, 40, 90), (2**31 - 1, -(2**31), 5), (-(2**31), -(2**31), -1)]


@of([SMALLEST])
@pytest.mark.parametrize("cu_seqlens", BAD_CU_SEQLENS, ids=str)
def test_bad_cu_seqlens_stay_inside(cu_seqlens, variant, variant_of):
    """What lies outside the array is clamped to it (`Tokens.of`); tiles of nonsensical entries may be left out."""
    trio = Trio.of(variant, variant_of)
    case = varlen((40, 50), (40, 50), heads_q=2, window=(None, 0), head_dim=8, head_dim_v=8)
    for side in "qk":
        assert run(trio, case.but(**{f"cu_seqlens_{side}": cu_seqlens})).stray == 0


@of([SMALLEST])
@pytest.mark.parametrize("cu_seqlens", [(300, 0, 400), (300, 390, 20), (399, 300, 200), (200, 400, 130)], ids=str)
def test_entries_whose_first_tile_is_behind_others(cu_seqlens, variant, variant_of):
    """A block before an entry's first tile must not take that for negative rows: nothing lies in front of the array."""
    trio = Trio.of(variant, variant_of)
    case = varlen((140, 260), (140, 260), heads_q=2, window=(None, 0), head_dim=8, head_dim_v=8)
    for side in "qk":
        assert run(trio, case.but(**{f"cu_seqlens_{side}": cu_seqlens})).stray == 0


@of([SMALLEST])
@pytest.mark.parametrize("seqused", [(10**9, -7), (-(2**31), 2**31 - 1), (41, 0)], ids=str)
def test_bad_seqused_stays_inside(seqused, variant, variant_of):
    case = varlen((40, 50), (40, 50), window=(None, 0), head_dim=8, head_dim_v=8)
    plain = dense(40, 50, 1, 1, batch=2, window=(None, 0), head_dim=8, head_dim_v=8)
    for side in "qk":
        for each in (case, plain):
            check(Trio.of(variant, variant_of), each.but(**{f"seqused_{side}": seqused}))


@of([SMALLEST])
@pytest.mark.parametrize("leftpad", [(10**9, -7), (-(2**31), 2**31 - 1), (41, 0), (39, 50)], ids=str)
def test_bad_left_padding_stays_inside(leftpad, variant, variant_of):
    """What is said is clamped to the entry, whose end it does not move."""
    case = varlen((40, 50), (40, 50), window=(None, 0), head_dim=8, head_dim_v=8, leftpad_k=leftpad)
    plain = dense(40, 50, 1, 1, batch=2, head_dim=8, head_dim_v=8, leftpad_k=leftpad)
    for each in (case, plain, case.but(seqused_k=(17, 48)), plain.but(splits=2, heads_q=2)):
        check(Trio.of(variant, variant_of), each)


@of(SKELETONS)
def test_left_padding_costs_nothing(variant, variant_of):
    """Tiles of keys behind padding are counted from its end, and those that are left have nothing to do."""
    trio, n = Trio.of(variant, variant_of), variant.size("n")
    exact = dense(9, n + 3, 1, 1, window=(None, 0))
    padded = dense(9, 5 * n, 1, 1, window=(None, 0), leftpad_k=(4 * n - 3,))
    steps, steps_padded = (check(trio, case).steps for case in (exact, padded))
    assert steps_padded < 1.5 * steps


# ---- deterministic ---------------------------------------------------------------------------------------------------
@of(SKELETONS)
@pytest.mark.parametrize("window", [(None, None), (None, 0)], ids=["full", "causal"])
def test_each_tile_of_keys_waits_its_turn(window, variant, variant_of):
    """From the last one on: in another order a tile waits for ever for those that were to come before it."""
    trio, m, n = Trio.of(variant, variant_of), variant.size("m"), variant.size("n")
    case = dense(m + 3 * n, 3 * n, 1, 1, deterministic=True, window=window, head_dim=8, head_dim_v=8)
    check(trio, case)
    for order in ((1, 0, 2), (0, 2, 1), (2,)):
        with pytest.raises(PtxError, match="waits for ever"):
            run(trio, case, order=order)


# ---- any call --------------------------------------------------------------------------------------------------------
@st.composite
def any_case(draw: st.DrawFn, variant: Variant) -> Call:
    """Any combination of the options, lengths up to a little more than a tile."""
    m, n = variant.size("m"), variant.size("n")
    batch, heads_kv, splits = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    sides: dict[str, Any] = {}
    for side, most in (("q", m + 20), ("k", n + 20)):
        length = st.integers(0, most)
        if draw(st.booleans()):
            lengths = draw(st.lists(length, min_size=batch, max_size=batch))
            sides[f"seqlen_{side}"], sides[f"cu_seqlens_{side}"] = packed(lengths, draw(st.integers(0, 9)))
        else:
            sides[f"seqlen_{side}"] = draw(length)
        for name in ("seqused_q",) if side == "q" else ("seqused_k", "leftpad_k"):
            if draw(st.booleans()):
                sides[name] = tuple(draw(st.lists(length, min_size=batch, max_size=batch)))
    bound = st.none() | st.integers(0, 2 * n)
    alibi = draw(st.sampled_from(["", "heads", "batch"]))
    return dense(
        **sides,
        heads_q=splits * draw(st.integers(1, 3 // splits)) * heads_kv,
        heads_kv=heads_kv,
        batch=batch,
        splits=splits,
        window=(draw(bound), draw(st.none() | st.just(0) | st.integers(-n, n))),
        family=draw(st.sampled_from(["normal", "times4", "far_below"])),
        heads_first=draw(st.booleans()),
        head_dim=8 * draw(st.integers(1, variant.head_dim // 8)),
        head_dim_v=8 * draw(st.integers(1, variant.head_dim_v // 8)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0, 30.0])),
        sink=draw(st.sampled_from(["", "", "fp32", "low"])),
        alibi=alibi,
        dalibi=alibi != "" and draw(st.booleans()),
        dlse=draw(st.booleans()),
        deterministic=draw(st.integers(0, 3)) == 0,
    )


@of(SKELETONS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_case(data: st.DataObject, variant: Variant, variant_of: Callable[[str], Compiled]):
    case, trio = data.draw(any_case(variant)), Trio.of(variant, variant_of)
    assert problems(run(trio, case), case, variant, RMS_ROWS) == []


# ---- the table -------------------------------------------------------------------------------------------------------
@of(VARIANTS)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    program = variant_of(variant.key).kernel.program
    assert tuple(program.params.values()) == BWD.layout
    assert program.param_bytes == BWD.nbytes and program.target == 90


def test_the_table_has_backward_variants():
    dims = {(v.head_dim, v.head_dim_v) for v in VARIANTS}
    assert dims >= {(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)}
    assert {v.dtype for v in VARIANTS} == {"bf16", "fp16"}
    assert {loops(v) for v in SKELETONS} == {loops(v) for v in VARIANTS}
