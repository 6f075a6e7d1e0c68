"""The PTX of `fwd_combine` against fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kernels import dispatch
from registry.contract import Variant
from tests.kernels.arrays import Strided
from tests.kernels.cases import of
from tests.kernels.faults import Switchable, shifted
from tests.kernels.launch import Compiled
from tests.ptx.interpreter import Device, Kernel, PtxError
from tests.reference import Array, combine, decode, misrounded
from tests.support.abis import FWD_COMBINE

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "fwd_combine"]
ERROR = 2.0**-18  # of a sum's terms; exp2 and the reciprocal are approximate


@dataclass(frozen=True)
class Combine:
    """One call. empty: the share of parts that saw no key; heads_first: LSEs are (…, heads, seqlen) in memory, o is
    (batch, heads, seqlen, dim); spread: standard deviation of the LSEs, level: their mean."""

    splits: int
    batch: int = 2
    seqlen: int = 3
    heads: int = 3
    head_dim_v: int = 64
    empty: float = 0.0
    heads_first: bool = False
    lse: bool = True
    spread: float = 2.0
    level: float = 0.0


CASES = {
    "one-split": Combine(1),
    "two": Combine(2, empty=0.3, head_dim_v=128),
    "three-heads-first": Combine(3, heads_first=True, head_dim_v=72, empty=0.2),
    "no-lse": Combine(5, lse=False, head_dim_v=192, spread=40.0),
    "more-than-a-warp": Combine(33, head_dim_v=256, empty=0.5, level=-90.0),
    "many": Combine(128, 1, 1, 5, head_dim_v=8, empty=0.9, spread=9.0, level=300.0),
    "two-warps": Combine(64, 1, 2, 3, head_dim_v=136, empty=0.2),
    "nothing": Combine(4, empty=1.0, head_dim_v=96),
    "one-row": Combine(7, 1, 1, 1, spread=0.0),
}


def inputs(case: Combine) -> tuple[Array, Array]:
    """o (splits, rows, head_dim_v) and lse (splits, batch, seqlen, heads) in fp32."""
    random = np.random.default_rng(0)
    shape = (case.batch, case.seqlen, case.heads)
    o = random.standard_normal((case.splits, int(np.prod(shape)), case.head_dim_v)).astype(np.float32)
    lse = case.level + case.spread * random.standard_normal((case.splits, *shape))
    lse[random.random(lse.shape) < case.empty] = -np.inf
    return o, lse.astype(np.float32)


def problems(
    compiled: Compiled, case: Combine, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None,
    steps: list[int] | None = None,
) -> str:  # fmt: skip
    """What is wrong with the result; '' if nothing is. steps: gets the number of instructions executed."""
    variant, device, (o, lse) = compiled.variant, Device(), inputs(case)
    rows, seen = o.shape[1], ~np.isneginf(lse)
    # What a part that saw no key holds does not matter: it may be loaded, but not count.
    held = np.where(seen.reshape(case.splits, rows, 1), o, np.float32(np.nan))
    partial = Strided(device, held.view(np.uint32), pad=0)
    order = (0, 1, 3, 2) if case.heads_first else (0, 1, 2, 3)
    partial_lse = Strided(device, lse[..., None].view(np.uint32), order=order, pad=1)
    shape, kind = lse.shape[1:], np.uint32 if variant.dtype == "fp32" else np.uint16
    outer = (0, 2, 1) if case.heads_first else (0, 1, 2)
    out = Strided(device, np.full((*shape, case.head_dim_v), np.iinfo(kind).max, kind), False, outer)
    out_lse = Strided(device, np.full((*shape, 1), np.iinfo(np.uint32).max, np.uint32), False, outer, pad=1)
    values: dict[str, Any] = dict.fromkeys((p.name for p in FWD_COMBINE.params), 0)
    values |= partial.named("o_partial", ".") | partial_lse.named("lse_partial", ".bsh") | out.named("o", "bsh")
    values |= {"o_partial_stride_split": partial.strides[0], "lse_partial_stride_split": partial_lse.strides[0]}
    values |= {**out_lse.named("lse", "bsh"), "lse": out_lse.address if case.lse else 0}
    values |= {"num_splits": case.splits, "rows": rows, "seqlen": case.seqlen, "heads": case.heads}
    values |= {"head_dim_v": case.head_dim_v} | dict(changed or {})
    artifact = compiled.artifact
    try:
        executed = (kernel or compiled.kernel).run(
            device, grid=(artifact.grid.blocks({"rows": rows}), 1, 1), block=(artifact.threads, 1, 1),
            params=FWD_COMBINE.pack(values), smem=artifact.smem,
        )  # fmt: skip
    except PtxError as error:
        return str(error)
    if steps is not None:
        steps.append(executed)
    o = np.where(seen[..., None], o.reshape(*lse.shape, -1), 0)
    right, right_lse = combine(o, lse)
    size, _ = combine(np.abs(o), lse)
    wrong = misrounded(decode(out.result(), variant.dtype), right, size, variant.dtype, ERROR)
    stray = out.stray() + out_lse.stray(case.lse)
    if not case.lse:
        return f"{wrong} wrong, {stray} stray" if wrong or stray else ""
    got = out_lse.result()[..., 0].view(np.float32)
    close = np.isclose(got, right_lse, rtol=1e-6, atol=2e-6)
    return "" if close.all() and not wrong and not stray else f"{wrong} wrong, {stray} stray, lse {got[~close]}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@of(VARIANTS)
def test_combine(variant: Variant, case: Combine, variant_of: Callable[[str], Compiled]):
    assert problems(variant_of(variant.key), case) == ""


@pytest.mark.variants(VARIANTS[0])
def test_shifted_bounds(variant_of: Callable[[str], Compiled]):
    """Every comparison of registers is met with equal sides, and then a shift of it is caught."""
    compiled = variant_of(VARIANTS[0].key)
    kernel, equal = Switchable(compiled.ptx, shifted), {}
    for case in CASES.values():
        assert problems(compiled, case, kernel) == ""
        equal[case] = set(kernel.equal)
    assert len(set().union(*equal.values())) == len(kernel.places) >= 5
    left = kernel.survivors(equal, lambda case: problems(compiled, case, kernel))
    slow = [number for number in left if executed(compiled, kernel, number) > executed(compiled, kernel, None)]
    assert [kernel.text(number) for number in left if number not in slow] == []
    assert len(slow) <= 3, "bounds that only save work"


def executed(compiled: Compiled, kernel: Switchable, place: int | None) -> int:
    """Instructions of all cases, with this place changed."""
    steps: list[int] = []
    kernel.on = place
    for case in CASES.values():
        problems(compiled, case, kernel, steps=steps)
    return sum(steps)


FALSE_PARAMETERS: list[tuple[str, Combine, dict[str, int]]] = [
    ("split-beyond", CASES["two"], {"num_splits": 3}),
    ("split-missing", CASES["two"], {"num_splits": 1}),
    ("row-missing", CASES["two"], {"rows": 17}),
    ("row-beyond", CASES["two"], {"rows": 19}),
    ("seqlen", CASES["two"], {"seqlen": 4}),
    ("heads", CASES["two"], {"heads": 2}),
    ("columns", CASES["two"], {"head_dim_v": 120}),
    *[
        (name, CASES["three-heads-first"], {name: 24})
        for name in (p.name for p in FWD_COMBINE.params)
        if "stride" in name
    ],
]


@pytest.mark.parametrize(
    ("case", "changed"), [row[1:] for row in FALSE_PARAMETERS], ids=[r[0] for r in FALSE_PARAMETERS]
)
@pytest.mark.variants(VARIANTS[0])
def test_false_parameters(case: Combine, changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    assert problems(variant_of(VARIANTS[0].key), case, changed=changed) != ""


@of(VARIANTS)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    program = variant_of(variant.key).kernel.program
    assert tuple(program.params.values()) == FWD_COMBINE.layout


def test_an_output_of_every_dtype():
    assert [variant.dtype for variant in VARIANTS] == ["bf16", "fp16", "fp32"]
