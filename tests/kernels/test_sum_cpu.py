"""The PTX of `bwd_sum`, bit for bit: sums of fp32 in the order of the splits, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from kernels import dispatch
from registry.contract import Variant
from registry.ops.bwd_sum import UNIT as SUM_UNIT
from tests.kernels import faults
from tests.kernels.cases import of
from tests.kernels.launch import Compiled
from tests.ptx.interpreter import Device, Kernel, PtxError
from tests.reference import Array, encode
from tests.support.abis import BWD_SUM

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "bwd_sum"]
SPLIT = 2**33  # elements from split to split of a far call


@dataclass(frozen=True)
class Sums:
    """One call. dk, dv: elements. before: elements of dk, and of its partials, that only the address space has, in
    front of those that there are. far: splits lie SPLIT elements apart."""

    dk: int
    dv: int
    splits: int
    before: int = 0
    far: bool = False


CASES = [
    *[Sums(SUM_UNIT + 8, 8 * SUM_UNIT + 8 * splits, splits) for splits in range(2, 10)],
    Sums(8, 8, 2),
    Sums(SUM_UNIT, SUM_UNIT - 8, 3),
    Sums(8 * SUM_UNIT, 8 * SUM_UNIT, 4),
    Sums(16 * SUM_UNIT + 8, 8, 21),
    Sums(40, 7 * SUM_UNIT + 48, 1),
]
LARGE = [Sums(SUM_UNIT + 40, 48, 3, 2**31), Sums(SUM_UNIT + 40, 48, 3, 2**38, far=True)]


def partials(case: Sums, number: int, count: int) -> Array:
    """(splits, count) in fp32. Of three or more, the second takes off what the first, a large one, adds: behind others
    they would take bits along."""
    parts = np.random.default_rng([number, case.splits]).standard_normal((case.splits, count)).astype(np.float32)
    if case.splits > 2:
        parts[0] *= 2.0**18
        parts[1] = -parts[0]
    return parts


def summed(parts: Array, dtype: str) -> Array:
    """Bits of the sum over splits, the first first."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return encode(total, dtype)


class Call:
    """A call's memory; nothing can be loaded but the partials themselves."""

    def __init__(self, case: Sums, dtype: str):
        self.case, self.dtype, self.device = case, dtype, Device()
        self.values = {"splits": case.splits}
        self.outputs = {}
        self.right = {}
        for number, (name, count) in enumerate((("dk", case.dk), ("dv", case.dv))):
            before = case.before if name == "dk" else 0
            parts = partials(case, number, count)
            self.right[name] = summed(parts, dtype)
            address, stride = self._put(parts)
            self.outputs[name] = self.device.empty(2 * count)
            self.values |= {f"{name}_partial": address - 4 * before, f"{name}_partial_stride_split": stride}
            self.values |= {name: self.outputs[name] - 2 * before, f"{name}_elements": count + before}

    def _put(self, parts: Array) -> tuple[int, int]:
        """(address, elements from split to split) of partials between what cannot be loaded."""
        if self.case.far:
            first = self.device.next
            for i, part in enumerate(parts):
                self.device.put(part, at=first + 4 * SPLIT * i)
            return first, SPLIT
        padded = np.concatenate([np.zeros((len(parts), 8), np.float32), parts], axis=1)
        defined = np.zeros(padded.shape, bool)
        defined[:, 8:] = True
        return self.device.put(padded, defined) + 4 * 8, padded.shape[1]

    def blocks(self, compiled: Compiled) -> range:
        """Those that the runtime launches, but for the ones of what only the address space has."""
        per_block = compiled.artifact.grid.tile_m
        rows = sum(-(-self.values[f"{name}_elements"] // SUM_UNIT) for name in ("dk", "dv"))
        return range(self.case.before // SUM_UNIT // per_block, compiled.artifact.grid.blocks({"rows": rows}))

    def run(self, compiled: Compiled, kernel: Kernel | None, changed: Mapping[str, int], order: Sequence[int]) -> None:
        grid, artifact = self.blocks(compiled).stop, compiled.artifact
        params = BWD_SUM.pack(self.values | dict(changed))
        (kernel or compiled.kernel).run(
            self.device, grid=(grid, 1, 1), block=(artifact.threads, 1, 1), params=params, smem=artifact.smem,
            order=order,
        )  # fmt: skip


def problems(
    compiled: Compiled, case: Sums, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> str:
    """What is wrong; '' if nothing is."""
    call = Call(case, compiled.variant.dtype)
    try:
        call.run(compiled, kernel, changed or {}, call.blocks(compiled))
    except PtxError as error:
        return str(error)
    wrong = {
        name: np.count_nonzero(call.device.get(call.outputs[name], np.uint16) != right)
        for name, right in call.right.items()
    }
    return f"wrong elements: {wrong}" if any(wrong.values()) else ""


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@of(VARIANTS)
def test_sums(case: Sums, variant: Variant, variant_of: Callable[[str], Compiled]):
    assert problems(variant_of(variant.key), case) == ""


def test_the_order_of_additions_shows():
    parts = partials(CASES[3], 0, CASES[3].dk)
    for dtype in ("bf16", "fp16"):
        assert (summed(parts, dtype) != summed(parts[::-1], dtype)).any()


BOUND = r"setp\.(lt|le|gt|ge)\.s64\s+%p\d+, %rd\d+, %rd\d+"


@of(VARIANTS[:1])
def test_shifted_bounds(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Where dK's units end, and the elements of either, is met and matters."""
    compiled = variant_of(variant.key)
    found = faults.planted(
        compiled.ptx, BOUND, lambda match: match[0].replace(f".{match[1]}.", f".{faults.WIDER[match[1]]}.")
    )
    assert len(found) == 3
    cases = [Sums(SUM_UNIT - 8, SUM_UNIT - 8, 2), Sums(SUM_UNIT, 8, 2)]
    caught = [any(problems(compiled, case, Kernel(fault.ptx)) for case in cases) for fault in found]
    assert caught == [True] * len(found)


@of(VARIANTS[:1])
def test_dropped_terms(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Each addition counts: with one left out some call is wrong."""
    compiled = variant_of(variant.key)
    found = faults.planted(compiled.ptx, r"add\.f32\s+(%r\d+), (%r\d+), (%r\d+);", lambda m: f"mov.b32 {m[1]}, {m[2]};")
    assert len(found) >= 16
    cases = [Sums(SUM_UNIT, SUM_UNIT, splits) for splits in (2, 6)]
    caught = [any(problems(compiled, case, Kernel(fault.ptx)) for case in cases) for fault in found]
    assert caught == [True] * len(found)


FALSE_PARAMETERS = [
    {"splits": 3},
    {"splits": 5},
    {"dk_elements": SUM_UNIT},
    {"dk_elements": SUM_UNIT + 16},
    {"dv_elements": 8},
    {"dv_elements": 24},
    {"dk_partial_stride_split": 8},
    {"dv_partial_stride_split": 0},
]


@pytest.mark.parametrize("changed", FALSE_PARAMETERS, ids=str)
@of(VARIANTS[:1])
def test_false_parameters(changed: dict[str, int], variant: Variant, variant_of: Callable[[str], Compiled]):
    case = Sums(SUM_UNIT + 8, 16, 4)
    assert problems(variant_of(variant.key), case, changed=changed) != ""


@of(VARIANTS)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    assert tuple(variant_of(variant.key).kernel.program.params.values()) == BWD_SUM.layout


def test_a_table_of_both_dtypes():
    assert [v.dtype for v in VARIANTS] == ["bf16", "fp16"]
