"""The PTX of every forward variant against fp64, with every check of the interpreter on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kernels import dispatch
from kernels.abi import FWD
from registry.contract import Variant
from tests.kernels.launch import Case, Compiled, expected, run
from tests.reference import visible, yardstick

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "fwd"]


def cases(m: int, n: int) -> list[Case]:
    """m, n: rows and columns of a variant's tile. Lengths lie beside its edges."""
    return [
        Case("ragged", m + 17, 2 * n + n // 2 + 11, batch=2),
        Case("causal-gqa4", m // 2 + 9, m // 2 + 9 + n, 4, 1, window=(None, 0), family="x4", heads_first=True),
        Case("causal-empty-rows", m + n + 9, n + 7, 2, 1, window=(None, 0), family="low"),
        Case("causal-square", m + 1, m + 1, window=(None, 0), batch=2),
        Case("window-gqa7", m + 5, m + n + 3, 7, 1, window=(n // 2 + 3, 9)),
        Case("left-window", m - 3, 3 * n + 1, window=(n + 1, None), family="low"),
        Case("right-window", 31, 2 * n - 1, window=(None, n + 2), heads_first=True),
        Case("left-of-all-keys", m // 2, n, window=(None, -n // 2), family="x4"),
        Case("one-query-mqa", 1, 2 * n + 1, 4, 1, batch=2, window=(None, 0), family="low", heads_first=True),
        Case("one-by-one", 1, 1, batch=2),
        Case("no-keys", 5, 0, 4, 2),
        Case("whole-tiles-no-lse", m, 2 * n, 2, 1, batch=2, lse=False, family="x4"),
        Case("far-batches", 19, n + 3, 2, 1, batch=2, far=True),
    ]


def all_cases() -> list:
    return [
        pytest.param(variant, case, id=f"{variant.key}-{case.name}", marks=pytest.mark.xdist_group(variant.key))
        for variant in VARIANTS
        for case in cases(variant.size("m"), variant.size("n"))
    ]


@pytest.mark.parametrize(("variant", "case"), all_cases())
def test_forward(variant: Variant, case: Case, variant_of: Callable[[str], Compiled]):
    outcome = run(variant_of(variant.key), case)
    assert outcome.stray == 0, "bytes outside the output or the LSE were written"
    assert yardstick(outcome.out, expected(case, variant), outcome.lse) == []
    unseen = ~visible(case.seqlen_q, case.seqlen_k, case.window).any(1)
    assert not outcome.out[:, unseen].any(), "a row that sees no key must be exactly 0"
    assert np.isfinite(outcome.out).all()


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.key, marks=pytest.mark.xdist_group(v.key)) for v in VARIANTS])
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Offsets and sizes as the assembler will see them, and as the runtime packs them."""
    program = variant_of(variant.key).kernel.program
    assert tuple(program.params.values()) == FWD.layout
    assert program.param_bytes == FWD.nbytes


def test_the_table_has_forward_variants():
    assert len(VARIANTS) >= 12
