"""Checks of the weighted sum of partial outputs, by itself: `runtime.flash_attn_combine`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.dut import Dut
from tests.gpu.inputs import DTYPES
from tests.gpu.report import Report, Scale
from tests.gpu.rotary import misrounded
from tests.gpu.run import same
from tests.gpu.yardstick import LSE_TOLERANCE
from tests.support.covering import covering

OUT_DTYPES = {**DTYPES, "fp32": torch.float32}
ERROR = 2.0**-16  # of an output, relative to the weighted sizes of what is summed
WEIGHTS = ("alike", "far apart", "some empty", "one only", "all empty", "far below")


@dataclass(frozen=True)
class Partials:
    """splits of (batch, seqlen, heads, dim); flat: (total, heads, dim) instead. lse: how the weights lie, of WEIGHTS.

    heads_first: the LSE is stored (splits, batch, heads, seqlen). apart: what lies between two splits, in rows.
    """

    splits: int
    batch: int
    seqlen: int
    heads: int
    dim: int
    weights: str = "alike"
    flat: bool = False
    heads_first: bool = False
    apart: bool = False
    seed: int = 0

    def make(self, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """out_partial and lse_partial: fp32, NaN beside them; an empty split is zeros or, if its seed is odd, NaN."""
        generator = torch.Generator(device).manual_seed(self.seed)
        rows = (self.splits, self.batch, self.seqlen, self.heads)
        out = torch.randn((*rows, self.dim), generator=generator, device=device)
        lse = torch.randn(rows, generator=generator, device=device)
        chance = torch.rand(rows, generator=generator, device=device)
        lse = {"far apart": 40 * lse, "far below": lse - 300}.get(self.weights, lse)
        if self.weights in ("some empty", "one only", "all empty"):
            share = {"some empty": 0.5, "all empty": 1.0}.get(self.weights, 0.0)
            gone = chance < share
            if self.weights == "one only":
                gone = torch.arange(self.splits, device=device)[:, None, None, None] != self.seed % self.splits
            lse = lse.masked_fill(gone, -math.inf)
            out = out.masked_fill(gone[..., None], (0.0, math.nan)[self.seed % 2])
        return self._placed(out, lse)

    def _placed(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        more = 3 if self.apart else 1
        buffer = torch.full((self.splits, more, *out.shape[1:]), math.nan, device=out.device)
        out = buffer[:, 0].copy_(out)
        lse = lse.transpose(2, 3).contiguous().transpose(2, 3) if self.heads_first else lse
        return (out.flatten(1, 2), lse.flatten(1, 2)) if self.flat else (out, lse)


def combined(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, its weighted size, lse), in float64."""
    top = lse.double().amax(0)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = (lse.double() - top).exp()
    total = weights.sum(0)
    shares = (weights / total.clamp(min=1e-300))[..., None]
    out = out.double().masked_fill(shares == 0, 0.0)
    return (shares * out).sum(0), (shares * out.abs()).sum(0), total.log() + top


def combine(dut: Dut, key: str, scale: Scale) -> None:
    """Splits × rows × head dims × weights × layouts: every output rounded right, every LSE."""
    full = Variant.parse(key).head_dim_v
    factors: dict[str, tuple[Any, ...]] = {
        "splits": (*scale.splits[1:], *scale.many_splits),
        "rows": ((1, 1, 1), (3, 1, 8), (2, 5, 6), (33, 1, 64), (1, 130, 7)),
        "dim": tuple(dict.fromkeys(min(dim, full) for dim in (8, 64, 72, 128, 192, 256))),
        "weights": WEIGHTS,
        "flat": (False, True),
        "heads_first": (False, True),
        "apart": (False, True),
    }
    report = Report()
    for seed, case in enumerate(covering(factors)):
        batch, seqlen, heads = case.pop("rows")
        _hold(report, dut, key, Partials(batch=batch, seqlen=seqlen, heads=heads, seed=seed, **case))
    report.done()


def into_given(dut: Dut, key: str, scale: Scale) -> None:
    """`out` of any strides is written, nothing beside it, and returned; without the LSE the output is the same."""
    report = Report()
    for seed, flat in enumerate((False, True)):
        partials = Partials(3, 2, 5, 6, min(64, Variant.parse(key).head_dim_v), seed=seed, flat=flat).make(dut.device)
        right, right_lse = _call(dut, key, *partials)
        buffer = torch.full((*right.shape[:-1], right.shape[-1] + 16), math.nan, dtype=right.dtype, device=right.device)
        out = buffer[..., 8:-8]
        got, lse = dut.combine(*partials, out=out)
        report.expect(got is out, "`out` is not returned")
        report.expect(same(out, right) and same(lse, right_lse), "an output with strides differs")
        beside = torch.cat([buffer[..., :8], buffer[..., -8:]], -1)
        report.expect(bool(beside.isnan().all()), "something beside the output was written")
        alone = dut.combine(*partials, out_dtype=right.dtype, return_lse=False)
        alone = alone[0] if isinstance(alone, tuple) else alone
        report.expect(same(alone, right), "return_lse changes the output")
    report.done()


def determinism(dut: Dut, key: str, scale: Scale) -> None:
    """The same partials give the same bits."""
    report = Report()
    partials = Partials(7, 4, 3, 8, Variant.parse(key).head_dim_v, "far apart").make(dut.device)
    first = [x.clone() for x in _call(dut, key, *partials)]
    for _ in range(6):
        report.expect(all(map(same, first, _call(dut, key, *partials))), "two calls differ")
    report.done()


def _call(dut: Dut, key: str, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = dut.combine(out, lse, out_dtype=OUT_DTYPES[Variant.parse(key).dtype])
    return result


def _hold(report: Report, dut: Dut, key: str, case: Partials) -> None:
    out, lse = case.make(dut.device)
    dtype = OUT_DTYPES[Variant.parse(key).dtype]
    got, got_lse = _call(dut, key, out, lse)
    exact, size, exact_lse = combined(out, lse)
    if got.dtype != dtype or got.shape != exact.shape or got_lse.shape != exact_lse.shape:
        report.expect(False, f"{case}: {got.dtype} {tuple(got.shape)}, LSE {tuple(got_lse.shape)}")
        return
    # An exponent is as exact as the LSEs that it is the difference of.
    size = size * (1 + exact_lse.abs().nan_to_num(posinf=0.0)[..., None] / 64)
    wrong = int(misrounded(got, exact, size, dtype, ERROR).sum())
    report.expect(wrong == 0, f"{case}: {wrong} of {got.numel()} elements are wrong")
    empty = exact_lse.isneginf()
    error = (got_lse.double() - exact_lse).abs() / exact_lse.abs().clamp(min=1)
    right = torch.equal(got_lse.isneginf(), empty) and bool((error[~empty] <= LSE_TOLERANCE).all())
    report.expect(right, f"{case}: the LSE is wrong")
