"""The PTX of every forward variant against fp64, with every check of the interpreter on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.contract import Variant
from tests.kernels.cases import VARIANTS, cases, loops, of, options, skeletons, varlen
from tests.kernels.launch import Compiled, blocks, check, run
from tests.support.abis import FWD
from tests.support.call import Call, packed

SKELETONS = skeletons()
RMS_ROWS = 256  # of a random case's softmax: with few, P's rounding exceeds twice the model's RMS by chance


def all_cases() -> list:
    return [
        pytest.param(variant, case, id=f"{variant.key}-{name}", marks=pytest.mark.xdist_group(variant.key))
        for variant in VARIANTS
        for name, case in cases(variant).items()
    ]


@pytest.mark.parametrize(("variant", "case"), all_cases())
def test_forward(variant: Variant, case: Call, variant_of: Callable[[str], Compiled]):
    check(variant_of(variant.key), case)


@of(SKELETONS)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (40, 9)], ids=["full", "causal", "window"])
@pytest.mark.parametrize("group", [3, 7, 71])
def test_packed_heads_that_do_not_divide_the_tile(group, window, variant, variant_of):
    """A token's heads then lie in two tiles or, with 71 heads and 64 rows, fill more than one."""
    rows = 2 * variant.size("m") + 9
    check(variant_of(variant.key), Call(rows // group, variant.size("n") + 9, group, 1, window=window, pack=True))


@of(SKELETONS)
@pytest.mark.parametrize("pack", [False, True], ids=["heads-apart", "packed"])
def test_overlaunched_tiles_read_nothing_past_cu_seqlens(pack, variant, variant_of):
    """Whole tiles, empty entries: the grid, which knows the total alone, has a tile too many for every entry."""
    compiled, m = variant_of(variant.key), variant.size("m")
    lengths = (m // 4, 0, m // 4, 0, 0, m // 2, 0) if pack else (m, 0, m, 0, 0)
    case = varlen(lengths, (9,) * len(lengths), heads_q=4, pack=pack)
    assert blocks(compiled, case) > sum(-(-4 * length // m) for length in lengths)
    check(compiled, case)
    check(compiled, varlen((0, 0, 1), (0, 5, 0), heads_q=4, pack=pack))


@of(SKELETONS)
def test_more_entries_than_two_loads_find(variant, variant_of):
    """The search for a tile's entry takes 32 at a time: 1,100 need three steps."""
    check(variant_of(variant.key), varlen((1, 0, 1, 0) * 275, (3, 9, 0, 8) * 275, head_dim=8, head_dim_v=8))


@of(SKELETONS)
def test_seqused_is_not_taken_for_dense(variant, variant_of):
    """Unused tokens are no memory that can be read (`Tensor`), their rows stay as they were, and they cost nothing."""
    compiled, m, n = variant_of(variant.key), variant.size("m"), variant.size("n")
    exact = Call(9, n + 3, 1, 1, window=(n, 0))
    used = Call(9 + 3 * m, 12 * n, 1, 1, window=(n, 0), seqused_q=(9,), seqused_k=(n + 3,))
    steps, steps_used = (check(compiled, case).steps for case in (exact, used))
    assert steps_used < 1.5 * steps


@of(SKELETONS)
def test_key_blocks_outside_the_window_cost_nothing(variant, variant_of):
    compiled, n = variant_of(variant.key), variant.size("n")
    near, distant = (check(compiled, Call(9, k * n, 1, 1, window=(n, 0))).steps for k in (3, 12))
    assert near == distant


@of(SKELETONS)
@pytest.mark.parametrize("dims", [(0, 8), (8, 0), (40, 24), (24, 40)], ids=str)
def test_unequal_head_dims(dims, variant, variant_of):
    """In either direction; 0 is the variant's own, which may be unequal as well."""
    m, n = variant.size("m"), variant.size("n")
    check(variant_of(variant.key), Call(m + 3, n + 9, 2, 1, head_dim=dims[0], head_dim_v=dims[1], window=(None, 0)))


@of(SKELETONS)
@pytest.mark.parametrize("sink", ["", "fp32", "low"])
@pytest.mark.parametrize("window", [(None, -200), (0, -1), (-200, None)], ids=str)
def test_fully_masked_rows(window, sink, variant, variant_of):
    """0, and −inf or the sink; beside rows that see something, and in whole tiles without any."""
    compiled, m = variant_of(variant.key), variant.size("m")
    for case in (
        Call(m + 9, 150, 2, 1, window=window, sink=sink, alibi="heads"),
        Call(9, 230, 3, 1, window=window, sink=sink, pack=True, softcap=20.0),
    ):
        check(compiled, case)


@of(SKELETONS)
def test_left_padding_is_not_read_and_costs_nothing(variant, variant_of):
    """The keys behind it give what they give by themselves, ALiBi's distances included, in as many steps."""
    compiled, n = variant_of(variant.key), variant.size("n")
    for window in ((None, 0), (n + 9, 0), (None, None)):
        exact = Call(9, n + 3, 2, 1, window=window, alibi="heads")
        padded = replace(exact, seqlen_k=9 * n + 5, leftpad_k=(8 * n + 2,))
        steps, steps_padded = (check(compiled, case).steps for case in (exact, padded))
        assert steps <= steps_padded < steps + 40


@of(SKELETONS)
@pytest.mark.parametrize("sink", ["", "fp32"])
@pytest.mark.parametrize("leftpad", [(50, 9), (2**31 - 1, -(2**31)), (49, 50)], ids=str)
def test_entries_that_are_all_padding(leftpad, sink, variant, variant_of):
    """Zeros, and −inf or the sink."""
    dense = Call(40, 50, 2, 1, batch=2, window=(None, 0), leftpad_k=leftpad, sink=sink)
    check(variant_of(variant.key), dense)
    check(variant_of(variant.key), replace(dense, seqused_k=(50, 9), pack=True))
    check(variant_of(variant.key), varlen((40, 9), (50, 41), leftpad_k=leftpad, sink=sink))


BAD_CU_SEQLENS = [
    (0, 90, 40),  # decreasing
    (0, 40, 10**9),
    (-50, 40, 90),
    (2**31 - 1, -(2**31), 5),
    (2**31 - 1, 2**31 - 1, 2**31 - 1),
    (-(2**31), -(2**31), -1),
]


@of(SKELETONS)
@pytest.mark.parametrize("pack", [False, True], ids=["heads-apart", "packed"])
@pytest.mark.parametrize("cu_seqlens", BAD_CU_SEQLENS, ids=str)
def test_bad_cu_seqlens_stay_inside(cu_seqlens, pack, variant, variant_of):
    """What lies outside the array is clamped to it (`Tokens.of`); tiles of nonsensical queries may be left out."""
    compiled = variant_of(variant.key)
    case = varlen((40, 50), (40, 50), heads_q=3, pack=pack, window=(None, 0))
    check(compiled, replace(case, cu_seqlens_k=cu_seqlens))
    assert run(compiled, replace(case, cu_seqlens_q=cu_seqlens)).stray == 0


@of(SKELETONS)
@pytest.mark.parametrize("seqused", [(10**9, -7), (-(2**31), 2**31 - 1), (41, 0)], ids=str)
def test_bad_seqused_stays_inside(seqused, variant, variant_of):
    case = varlen((40, 50), (40, 50), window=(None, 0))
    dense = Call(40, 50, 1, 1, batch=2, window=(None, 0))
    for side in "qk":
        check(variant_of(variant.key), replace(case, **{f"seqused_{side}": seqused}))
        check(variant_of(variant.key), replace(dense, **{f"seqused_{side}": seqused}))


@st.composite
def any_case(draw: st.DrawFn, variant: Variant) -> Call:
    """Any combination of the options, lengths up to a little more than two tiles."""
    m, n = variant.size("m"), variant.size("n")
    batch = draw(st.integers(1, 3))
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    sides: dict[str, Any] = {}
    for side, most in (("q", m + 20), ("k", 2 * n + 20)):
        length = st.integers(0, most)
        if draw(st.booleans()):
            lengths = draw(st.lists(length, min_size=batch, max_size=batch))
            sides[f"seqlen_{side}"], sides[f"cu_seqlens_{side}"] = packed(lengths, draw(st.integers(0, 9)))
        else:
            sides[f"seqlen_{side}"] = draw(length)
        if draw(st.booleans()):
            sides[f"seqused_{side}"] = tuple(draw(st.lists(length, min_size=batch, max_size=batch)))
    if draw(st.booleans()):
        sides["leftpad_k"] = tuple(draw(st.lists(st.integers(-1, 2 * n + 22), min_size=batch, max_size=batch)))
    bound = st.none() | st.integers(0, 2 * n)
    return Call(
        **sides,
        heads_q=group * heads_kv,
        heads_kv=heads_kv,
        batch=batch,
        window=(draw(bound), draw(st.none() | st.just(0) | st.integers(-n, n))),
        family=draw(st.sampled_from(["normal", "times4", "far_below"])),
        lse=draw(st.integers(0, 4)) > 0,
        heads_first=draw(st.booleans()),
        head_dim=8 * draw(st.integers(1, variant.head_dim // 8)),
        head_dim_v=8 * draw(st.integers(1, variant.head_dim_v // 8)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0, 30.0])),
        sink=draw(st.sampled_from(["", "", "fp32", "low"])),
        alibi=draw(st.sampled_from(["", "", "heads", "batch"])),
        pack=group > 1 and draw(st.booleans()),
    )


@of(SKELETONS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_case(data: st.DataObject, variant: Variant, variant_of: Callable[[str], Compiled]):
    check(variant_of(variant.key), data.draw(any_case(variant)), RMS_ROWS)


@of(VARIANTS)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Offsets and sizes as the assembler will see them, and as the runtime packs them."""
    program = variant_of(variant.key).kernel.program
    assert tuple(program.params.values()) == FWD.layout
    assert program.param_bytes == FWD.nbytes


def test_the_table_has_forward_variants():
    assert len(VARIANTS) >= 12
    assert {loops(v) for v in SKELETONS} == {loops(v) for v in VARIANTS}
    assert {v.head_dim > v.head_dim_v for v in SKELETONS} == {False, True}


def test_every_variant_is_called_with_every_option():
    for variant in VARIANTS:
        bf16 = variant.replace(dtype="bf16")
        assert set.union(*map(options, cases(variant).values())) == set.union(*map(options, cases(bf16).values()))
