"""The PTX of `bwd_preprocess` and `bwd_postprocess`, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from kernels import dispatch
from registry.contract import Variant
from registry.ops.workspaces import ROWS
from tests.kernels.backward import (
    STRIP,
    Memory,
    existing_rows,
    expected,
    first_rows,
    gradients_in,
    matrix,
    units,
)
from tests.kernels.backward_cases import dense, varlen
from tests.kernels.cases import of
from tests.kernels.faults import Switchable, shifted
from tests.kernels.launch import Compiled
from tests.ptx.interpreter import Kernel, PtxError
from tests.reference import decode, encode
from tests.reference_backward import row_sums
from tests.support.abis import BWD_POSTPROCESS, BWD_PREPROCESS
from tests.support.call import Call

BEFORE, AFTER = ([v for v in dispatch.variants() if v.op == op] for op in ("bwd_preprocess", "bwd_postprocess"))
LOG2_E = np.float32(np.log2(np.e))


def packed_queries(lengths: tuple[int, ...], spare: int = 0, **more: Any) -> Call:
    """Entries of these many queries, and of 3 keys each."""
    return varlen(lengths, (3,) * len(lengths), spare, **{"heads_q": 2, **more})


CASES = {
    "one-row": dense(1, 3, 1, 1, head_dim=8, head_dim_v=8),
    "ragged": dense(ROWS + 5, 3, 3, 1, batch=2, head_dim=40, head_dim_v=72, dlse=True),
    "whole-tiles": dense(ROWS, 3, 1, 1, batch=2, head_dim_v=256, deterministic=True),
    "unseen-rows": dense(19, 7, 2, 2, batch=2, window=(None, 0), dlse=True, heads_first=True, head_dim_v=128),
    "unseen-rows-sink": dense(9, 7, 2, 2, window=(None, 0), sink="fp32", dlse=True, head_dim_v=64),
    "used": dense(35, 3, 1, 1, batch=3, seqused_q=(31, 0, 35), far=True, deterministic=True, head_dim_v=248),
    "packed": packed_queries((ROWS + 9, 0, 1, 20), 5, dlse=True, deterministic=True, head_dim_v=96),
    "packed-whole-tiles": packed_queries((ROWS, 0, ROWS, 0, 0), head_dim_v=8, dlse=True, heads_first=True),
    "packed-used": packed_queries((17, 40), 3, seqused_q=(16, 33), heads_q=1, head_dim_v=16, far=True),
    "40-entries": packed_queries((1, 0, 2, 5) * 10, head_dim=8, head_dim_v=8, dlse=True, deterministic=True),
}
ACCUM = Variant.parse("bwd-bf16-d96-dv256-m64-n64-w4")  # any: head_dim is that of dq_accum
NARROW = ACCUM.replace(head_dim=32)


def main_variant(variant: Variant, case: Call) -> Variant:
    return (NARROW if case.head_dim and case.head_dim <= 32 else ACCUM).replace(dtype=variant.dtype)


def preprocessed(
    compiled: Compiled, case: Call, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> str:
    """What is wrong with the workspaces; '' if nothing is."""
    variant = main_variant(compiled.variant, case)
    call, right, exists = Memory(case, variant), expected(case, variant), existing_rows(case)
    try:
        call.run(compiled, BWD_PREPROCESS, call.blocks(compiled), kernel, changed)
    except PtxError as error:
        return str(error)
    lse = np.full((case.heads_q, call.rows), np.inf, np.float32)
    lse[:, exists] = np.where(np.isneginf(right.lse), np.inf, right.lse * LOG2_E)
    if (wrong := call.workspace("lse_log2") != lse).any():
        return f"lse_log2 of rows {np.unique(np.nonzero(wrong)[1])}"
    delta, size = wanted_delta(case, variant, exists)
    if (wrong := ~(np.abs(call.workspace("delta") - delta) <= 2.0**-20 * size)).any():
        return f"delta of rows {np.unique(np.nonzero(wrong)[1])}"
    dirty = np.count_nonzero(call.device.get(call.dq_accum))
    if call.semaphores:
        dirty += np.count_nonzero(call.device.get(call.semaphores))
    return f"{dirty} bytes are not 0" if dirty else ""


def wanted_delta(case: Call, variant: Variant, exists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(delta, what its error is relative to), (heads_q, rows), 0 where there is no row."""
    bits, dlse = gradients_in(case, variant)
    dout = np.concatenate([decode(bits, variant.dtype)[i, part] for i, part in case.queries.entries])
    of_lse = np.zeros((case.heads_q, len(dout)))
    if dlse is not None:
        of_lse = np.concatenate([dlse[i][:, part] for i, part in case.queries.entries], axis=1)
    out = expected(case, variant).out
    found = np.zeros((2, case.heads_q, len(exists)))
    found[0][:, exists] = row_sums(out[None], dout[None], of_lse[None])[0]
    found[1][:, exists] = row_sums(abs(out[None]), abs(dout[None]), -abs(of_lse[None]))[0]
    return found[0], found[1]


def postprocessed(
    compiled: Compiled, case: Call, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> str:
    """What is wrong with dq, from a dq_accum of numbers; '' if nothing is."""
    variant = main_variant(compiled.variant, case)
    call, exists = Memory(case, variant), existing_rows(case)
    accum = np.random.default_rng(5).standard_normal((case.heads_q, call.rows, call.accum_columns)).astype(np.float32)
    call.values["dq_accum"] = call.device.put(units(accum))
    call.values["softmax_scale"] = 0.3
    try:
        call.run(compiled, BWD_POSTPROCESS, call.blocks(compiled), kernel, changed)
    except PtxError as error:
        return str(error)
    dq, stray = call.dq.result()
    right = accum[:, exists, : call.dim].swapaxes(0, 1) * np.float32(0.3)
    wrong = np.count_nonzero(dq != encode(right, variant.dtype))
    return f"{wrong} wrong, {stray} stray" if wrong or stray else ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@of(BEFORE)
def test_preprocess(variant: Variant, case: Call, variant_of: Callable[[str], Compiled]):
    assert preprocessed(variant_of(variant.key), case) == ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@of(AFTER)
def test_postprocess(variant: Variant, case: Call, variant_of: Callable[[str], Compiled]):
    assert postprocessed(variant_of(variant.key), case) == ""


@pytest.mark.parametrize("check", [preprocessed, postprocessed])
@pytest.mark.variants(BEFORE[0], AFTER[0])
def test_shifted_bounds(check, variant_of: Callable[[str], Compiled]):
    """Every comparison of registers is met with equal sides, and then matters, or saves work alone."""
    compiled = variant_of((BEFORE if check is preprocessed else AFTER)[0].key)
    kernel, equal = Switchable(compiled.ptx, shifted), {}
    for case in CASES.values():
        assert check(compiled, case, kernel) == ""
        equal[case] = set(kernel.equal)
    assert len(set().union(*equal.values())) == len(kernel.places) >= 5
    left = kernel.survivors(equal, lambda case: check(compiled, case, kernel))
    assert len(left) <= 2, f"bounds that only save work: {[kernel.text(number) for number in left]}"


PACKED, DENSE = CASES["packed"], CASES["ragged"]
FALSE_PARAMETERS: list[tuple[str, Call, dict[str, int]]] = [
    ("row-beyond", DENSE, {"seqlen_q": ROWS + 6}),
    ("row-missing", DENSE, {"seqlen_q": ROWS + 4}),
    ("rows", DENSE, {"rows": 3 * ROWS}),
    ("heads", DENSE, {"batch": 1}),
    ("entries", PACKED, {"cu_seqlens_q": 0}),
    ("used", CASES["used"], {"seqused_q": 0}),
]
OF_PREPROCESS = [
    ("columns", DENSE, {"head_dim_v": 64}),
    ("columns-beyond", DENSE, {"head_dim_v": 80}),
    ("accum-columns", DENSE, {"head_dim_accum": 64}),
    ("no-dlse", DENSE, {"dlse": 0}),
    ("no-semaphores", PACKED, {"semaphores": 0}),
    *[(p.name, DENSE, {p.name: 24}) for p in BWD_PREPROCESS.params if "_stride_" in p.name],
]
OF_POSTPROCESS = [
    ("columns", DENSE, {"head_dim": 32}),
    ("columns-beyond", DENSE, {"head_dim": 48}),
    ("accum-columns", DENSE, {"head_dim_accum": 64}),
    ("scale", DENSE, {"softmax_scale": 1}),
    *[(p.name, DENSE, {p.name: 24}) for p in BWD_POSTPROCESS.params if "_stride_" in p.name],
]


@pytest.mark.parametrize(
    ("check", "case", "changed"),
    [pytest.param(check, *row[1:], id=f"{check.__name__}-{row[0]}") for check, rows in (
        (preprocessed, FALSE_PARAMETERS + OF_PREPROCESS), (postprocessed, FALSE_PARAMETERS + OF_POSTPROCESS)
    ) for row in rows],
)  # fmt: skip
@pytest.mark.variants(BEFORE[0], AFTER[0])
def test_false_parameters(check, case: Call, changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    compiled = variant_of((BEFORE if check is preprocessed else AFTER)[0].key)
    assert check(compiled, case, changed=changed) != ""


@of(BEFORE + AFTER)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    abi = BWD_PREPROCESS if variant.op == "bwd_preprocess" else BWD_POSTPROCESS
    assert tuple(variant_of(variant.key).kernel.program.params.values()) == abi.layout


def test_units_and_matrix():
    """Against the text of registry/ops, element by element."""
    accum = np.random.default_rng(6).permutation(3 * 32 * 24).reshape(3, 32, 24)
    flat = units(accum).reshape(3, 2, 3, 32, 4)
    for head, row, column in np.ndindex(accum.shape):
        strip, unit = row // STRIP, column // 8
        lane, element = row % 8 * 4 + column % 8 // 2, row % STRIP // 8 * 2 + column % 2
        assert flat[head, strip, unit, lane, element] == accum[head, row, column]
    np.testing.assert_array_equal(matrix(units(accum), 24), accum)


def test_rows_of_entries():
    packed, plain = packed_queries((ROWS + 9, 0, 1, 20), 5), dense(ROWS + 1, 1, batch=2)
    assert (
        first_rows(packed) == [0, 2 * ROWS, 3 * ROWS, 4 * ROWS, 5 * ROWS] and existing_rows(packed).sum() == ROWS + 30
    )
    assert first_rows(plain) == [0, 2 * ROWS, 4 * ROWS]
    assert np.flatnonzero(existing_rows(plain)).tolist() == [*range(ROWS + 1), *range(2 * ROWS, 3 * ROWS + 1)]


def test_a_table_of_both_dtypes():
    assert [v.dtype for v in BEFORE] == [v.dtype for v in AFTER] == ["bf16", "fp16"]
