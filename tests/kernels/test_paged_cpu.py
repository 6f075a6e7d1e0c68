"""The PTX of every paged forward against fp64: no byte of a page or table row that is not an entry's may be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.contract import Variant
from tests.kernels.cache import ends, page_table
from tests.kernels.cases import of
from tests.kernels.launch import Compiled, check, expected, inputs, kv_dtype, run, sink, softmax_scale
from tests.kernels.paged_cases import FACTORS, case, paged, rows, share
from tests.ptx.formats import E4M3
from tests.reference import LSE_TOLERANCE, Array, Scores, attention, decode, gather
from tests.support.abis import FWD_PAGED
from tests.support.call import Append, Call
from tests.support.skeletons import SKELETONS, VARIANTS

RMS_ROWS = 256  # as in test_forward_cpu


def gathered(case: Call, pages: Array) -> Array:
    """All tokens of the first entry."""
    return gather(pages, page_table(case)[0], ends(case)[0], case.keys.paddings[0])


def all_cases() -> list:
    return [
        pytest.param(variant, row, id=f"{variant.key}-{j}", marks=pytest.mark.xdist_group(variant.key))
        for variant in VARIANTS
        for j, row in enumerate(share(variant, VARIANTS))
    ]


@pytest.mark.parametrize(("variant", "row"), all_cases())
def test_paged(variant: Variant, row: dict[str, Any], variant_of: Callable[[str], Compiled]):
    check(variant_of(variant.key), case(row, variant))


@of(SKELETONS)
@pytest.mark.parametrize("page_size", [0, 1, 3, 16, 64])
@pytest.mark.parametrize("splits", [1, 4])
def test_lengths_beside_every_edge(splits, page_size, variant, variant_of):
    n, size = variant.size("n"), page_size or 16
    edges = sorted({0, 1, n - 1, n, n + 1, 2 * n, 2 * n + 1, size - 1, size, size + 1, 2 * size})
    room = -(-(2 * n + 1) // size) * size + size
    check(
        variant_of(variant.key),
        paged(2, room, 4, 2, batch=len(edges), page_size=page_size or None, seqused_k=tuple(edges), num_splits=splits,
                  pack=True, window=(None, 0)),
    )  # fmt: skip


@of(SKELETONS)
@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("each", [1, 3])
def test_every_split_has_its_part_of_the_keys(each, splits, variant, variant_of):
    """The i-th has the i-th `each` blocks, and the sink is in the first alone."""
    compiled, part = variant_of(variant.key), each * variant.size("n")
    whole = paged(3, splits * part, 2, 1, seqused_k=(splits * part,), num_splits=splits, sink="fp32")
    outcome = check(compiled, whole)
    kinds = (variant.dtype, kv_dtype(variant), kv_dtype(variant))
    q, k, v = (decode(x, kind) for x, kind in zip(inputs(whole, variant), kinds, strict=True))
    tokens = gathered(whole, k), gathered(whole, v)
    for j in range(splits):
        keys, values = (x[None, j * part : (j + 1) * part] for x in tokens)
        sinks = sink(whole, variant) if j == 0 else None
        out, lse = attention(q, keys, values, Scores(softmax_scale(whole, variant), sink=sinks))
        np.testing.assert_allclose(outcome.lse[j], lse[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(outcome.out[j], out[0], atol=0.02)


@of(SKELETONS)
def test_splits_without_keys(variant, variant_of):
    compiled, n = variant_of(variant.key), variant.size("n")
    few = paged(2, 2 * n, 4, 2, batch=3, seqused_k=(n + 1, 0, 1), num_splits=5, page_size=n, pack=True)
    outcome = check(compiled, few)
    assert np.isneginf(outcome.lse[2:]).all() and np.isneginf(outcome.lse[1:, :, 2:]).all()
    assert np.isfinite(outcome.lse[0, :, :2]).all() and np.isfinite(outcome.lse[1, :, :2]).all()


@of(SKELETONS)
def test_splits_share_the_work(variant, variant_of):
    """Ten blocks in five splits take hardly longer than in one: a block's steps count, not those of all."""
    compiled, n = variant_of(variant.key), variant.size("n")
    one, five, none = (
        check(compiled, paged(1, 10 * n, 2, 2, seqused_k=(length,), num_splits=splits)).steps
        for splits, length in ((1, 10 * n), (5, 10 * n), (5, 0))
    )
    assert five - none < 1.2 * one


@of(SKELETONS)
def test_keys_left_of_the_window_cost_nothing(variant, variant_of):
    compiled, n = variant_of(variant.key), variant.size("n")
    near, distant = (
        check(compiled, paged(1, 12 * n, 2, 1, seqused_k=(k * n,), window=(n, 0), pack=True)).steps for k in (3, 12)
    )
    assert near == distant


@of(SKELETONS)
@pytest.mark.parametrize("splits", [1, 3])
def test_left_padding_is_not_read_and_costs_nothing(splits, variant, variant_of):
    """Not the pages, not the table's places before it; splits share the blocks behind it."""
    compiled, n = variant_of(variant.key), variant.size("n")
    for page_size, padding in ((16, 8 * n), (16, 8 * n - 5), (24, 8 * n + 2), (None, 8 * n + 3)):
        exact = paged(2, 12 * n, 2, 1, window=(None, 0), page_size=page_size, num_splits=splits, alibi="heads")
        near, padded = exact.but(seqused_k=(3 * n,)), exact.but(seqused_k=(11 * n,), leftpad_k=(padding,))
        steps, steps_padded = (check(compiled, case).steps for case in (near, padded))
        # A block of keys that padding cuts is masked, and may be one more.
        assert steps_padded < 1.8 * steps
        if splits == 1:
            twice = padded.but(seqused_k=(11 * n - 4 * n,), leftpad_k=(padding - 4 * n,))
            assert abs(check(compiled, twice).steps - steps_padded) < 0.1 * steps


@of(SKELETONS)
@pytest.mark.parametrize("splits", [2, 5])
def test_splits_share_what_is_behind_the_padding(splits, variant, variant_of):
    """None is left without keys while there are blocks; where all is padding, each writes zeros and −inf."""
    n = variant.size("n")
    case = paged(1, 16 * n, 2, 1, batch=3, seqused_k=(16 * n, 16 * n - 3, 9), num_splits=splits, page_size=16,
                     leftpad_k=(11 * n, 16 * n - 3, 2**31 - 1), pack=True)  # fmt: skip
    outcome = check(variant_of(variant.key), case)
    assert np.isfinite(outcome.lse[:, :, 0]).all()
    assert np.isneginf(outcome.lse[:, :, 1:]).all()


@of(SKELETONS)
@pytest.mark.parametrize("page_size", [16, 24])
def test_pages_below_0_are_read_as_page_0(page_size, variant, variant_of):
    """As graphs are padded: an entry with a key or more and no page of its own."""
    n = variant.size("n")
    room = -(-3 * n // page_size) * page_size
    case = paged(1, room, 2, 1, batch=2, seqused_k=(1, room), page_size=page_size, order="first")
    check(variant_of(variant.key), case)


@of(SKELETONS)
@pytest.mark.parametrize("lengths", [(10**9, -7), (-(2**31), 2**31 - 1), (-(2**31) + 2, 41)], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_bad_lengths_stay_inside(splits, lengths, variant, variant_of):
    """Clamped to a table row's room."""
    case = paged(5, 48, 2, 1, batch=2, seqused_k=lengths, num_splits=splits, window=(None, 0))
    check(variant_of(variant.key), case)
    check(variant_of(variant.key), case.but(page_size=None))
    check(variant_of(variant.key), case.but(append=Append(3)))
    check(variant_of(variant.key), case.but(leftpad_k=lengths[::-1]))


@of([variant for variant in VARIANTS if kv_dtype(variant) == "e4m3"])
def test_every_e4m3_code_is_converted_exactly(variant, variant_of):
    """One key is all that there is, so the output is its value, NaN included; k shows in the LSE."""
    one = paged(1, 1, 4, 4, seqused_k=(1,), page_size=1, family="codes")
    outcome, (_, _, v) = run(variant_of(variant.key), one), inputs(one, variant)
    codes = gathered(one, v)[0]
    assert set(codes.reshape(-1)) == set(range(256))
    np.testing.assert_array_equal(outcome.out[0, 0], E4M3[codes])
    right = expected(one, variant)
    assert (np.abs(outcome.lse[0] - right.lse) <= LSE_TOLERANCE * right.lse_size).all()


@of(SKELETONS)
def test_queries_that_are_no_fp16(variant, variant_of):
    """bf16 queries beyond fp16's range, keys near 0: products with an e4m3 cache are fp16's."""
    check(variant_of(variant.key), paged(3, 64, 4, 2, seqused_k=(41,), family="huge"))


@st.composite
def any_case(draw: st.DrawFn, variant: Variant) -> Call:
    """A row of any values of the factors, with any lengths."""
    row = {name: draw(st.sampled_from(values)) for name, values in FACTORS.items()}
    made, n = case(row, variant), variant.size("n")
    size = made.cache.page_size or 0
    room = max(made.seqlen_k, size * -(-2 * n // max(size, 1)))
    lengths = draw(st.lists(st.integers(-1, room), min_size=made.batch, max_size=made.batch))
    splits = 1 if made.seqused_q else draw(st.integers(1, 9))
    return made.but(seqlen_k=room, seqused_k=tuple(lengths), num_splits=splits)


@of(SKELETONS)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_case(data: st.DataObject, variant: Variant, variant_of: Callable[[str], Compiled]):
    check(variant_of(variant.key), data.draw(any_case(variant)), RMS_ROWS)


@of(VARIANTS)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    program = variant_of(variant.key).kernel.program
    assert tuple(program.params.values()) == FWD_PAGED.layout


def test_the_variants_share_out_every_row():
    for variant in VARIANTS:
        alike = [v for v in VARIANTS if v.features == variant.features]
        done = [row for v in alike for row in share(v, VARIANTS)]
        assert all(row in done for row in rows())
    assert {kv_dtype(v) for v in SKELETONS} == {"bf16", "e4m3"}
