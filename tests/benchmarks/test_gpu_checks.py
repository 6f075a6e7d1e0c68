"""The checks themselves, on the CPU and in small: a right implementation passes, every planted fault is caught."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import checks, ledger, test_fwd, yardstick
from tests.gpu.inputs import FAMILIES, Shape, padded, place, untouched, values

KEY = "fwd-bf16-d64-dv64-m64-n64-w4-s1"


class Stand:
    """Stands in for the GPU: a float32 softmax with P rounded, as a kernel computes it. `fault` breaks one thing."""

    device = "cpu"
    artifacts: ClassVar[dict] = {}

    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0

    def force(self, key):
        pass

    def attn(self, q, k, v, *, causal=False, softmax_scale=None, window=None, return_lse=False, out=None):
        self.calls += 1
        left, right = window or (None, None)
        right = 0 if causal else right
        if causal and self.fault == "causal flag dropped":
            right = (window or (None, None))[1]
        if left is not None and self.fault == "window one too wide":
            left += 1
        result = torch.full(q.shape, math.nan, dtype=q.dtype) if out is None else out
        statistics = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        if q.numel():
            self._compute(q, k, v, scale, left, right, result, statistics)
        if self.fault == "output not returned":
            result = result.clone()
        if self.fault == "not deterministic" and self.calls % 3 == 0 and result.numel():
            result.view(-1)[0] += 1
        return (result, statistics) if return_lse else result

    def _compute(self, q, k, v, scale, left, right, out, statistics):
        fault = self.fault
        group = q.shape[2] // k.shape[2]
        if fault == "one key too many" and k.shape[1] > 8:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        heads = torch.arange(q.shape[2])
        pick = heads % k.shape[2] if fault == "heads mapped wrongly" else heads // group
        k, v = k[:, :, pick], v[:, :, pick]
        mask = yardstick.allowed(q.shape[1], k.shape[1], (left, right), "cpu")
        if mask is not None and fault == "aligned top-left":
            mask = torch.ones_like(mask).tril()
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
        if fault == "scale 0.5 % off":
            scores *= 1.005
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        lse = torch.logsumexp(scores, -1) if k.shape[1] else scores.new_full(scores.shape[:-1], -math.inf)
        p = (scores - lse[..., None]).exp().nan_to_num(0.0)
        p = p.to(q.dtype).float() if fault != "P in 4 bits" else (p * 16).round() / 16
        o = torch.einsum("bhqk,bkhd->bqhd", p, v.float())
        if fault == "empty rows are NaN":
            o[torch.isneginf(lse).transpose(1, 2)] = math.nan
        out.copy_(o.to(q.dtype))
        statistics.copy_(lse / math.log(2) if fault == "lse in base 2" else lse)
        if fault == "a row not written":
            out[-1, -1, -1] = math.nan
        if fault == "writes past the end" and out._base is not None and out._base.dim() == 4:
            out._base[: out.shape[0], out.shape[1] + 1] = 0
        if fault == "lse row not written":
            statistics[-1, -1, -1] = math.nan
        if fault == "strides ignored" and q.stride(1) < q.stride(2):
            out.zero_()
        if fault == "32-bit offsets" and q.shape[0] > 1 and q.stride(0) >= checks.TINY.beyond:
            out[1:] = out[:1]


RUNS_HERE = sorted(set(checks.CHECKS) - {"graph_capture"})  # which needs CUDA graphs
CAUGHT = {
    "causal flag dropped": "yardstick",
    "one key too many": "yardstick",
    "heads mapped wrongly": "yardstick",
    "aligned top-left": "yardstick",
    "scale 0.5 % off": "yardstick",
    "P in 4 bits": "yardstick",
    "lse in base 2": "yardstick",
    "a row not written": "yardstick",
    "writes past the end": "yardstick",
    "lse row not written": "lse",
    "output not returned": "strided",
    "strides ignored": "strided",
    "window one too wide": "windows",
    "empty rows are NaN": "empty",
    "32-bit offsets": "beyond_2g",
    "not deterministic": "determinism",
}


@pytest.mark.parametrize("name", RUNS_HERE)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_right_implementation_passes(name, dtype):
    checks.CHECKS[name](Stand(), KEY.replace("bf16", dtype), checks.TINY)


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_planted_fault_is_caught(fault):
    with pytest.raises(AssertionError, match="failures:"):
        checks.CHECKS[CAUGHT[fault]](Stand(fault), KEY, checks.TINY)


def test_threads_that_disagree_or_raise_are_reported():
    class Racy(Stand):
        def attn(self, q, k, v, **options):
            import threading

            if threading.current_thread() is not threading.main_thread():
                if self.fault == "raises":
                    raise RuntimeError("lost")
                q = q.flip(1)
            return super().attn(q, k, v, **options)

    for fault in ("", "raises"):
        with pytest.raises(AssertionError, match="threads"):
            checks.streams(Racy(fault), KEY, checks.TINY)


def test_every_name_of_the_conformance_list_has_a_check():
    names = ledger.CONFORMANCE["ops"]["fwd"]
    assert list(checks.CHECKS) == list(test_fwd.NAMES)
    assert [*test_fwd.NAMES, "memcheck", "racecheck"] == names


def test_rms_sees_what_the_maximum_lets_pass():
    """A scale that is 0.5 % off at 1,024 keys stays within the max-norm's allowance: the RMS must tell."""
    shape = Shape(1, 1, 1, 256, 1024, 64, "bf16")
    tensors = values(shape, "normal", "cpu", 0)
    right = yardstick.expected(**tensors, scale=0.125, window=(None, None))
    wrong = yardstick.expected(**{**tensors, "v": tensors["v"] * 1.01}, scale=0.125, window=(None, None))
    found = yardstick.problems(wrong.out, None, right)
    assert len(found) == 1 and found[0].startswith("RMS")


def test_the_reference_is_that_of_pytorch():
    shape = Shape(2, 4, 2, 33, 33, 64, "bf16")
    tensors = values(shape, "normal", "cpu", 1)
    right = yardstick.expected(**tensors, scale=0.125, window=(None, 0))
    q, k, v = (x.transpose(1, 2).double() for x in (tensors["q"], tensors["k"], tensors["v"]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    assert torch.equal(right.out, out.transpose(1, 2).to(torch.bfloat16))


def test_the_reference_is_the_same_in_chunks(monkeypatch):
    tensors = values(Shape(2, 6, 2, 20, 30, 64, "fp16"), "times4", "cpu", 2)
    whole = yardstick.expected(**tensors, scale=0.1, window=(5, 2))
    monkeypatch.setattr(yardstick, "CHUNK", 6 * 20 * 30 // 2)
    parts = yardstick.expected(**tensors, scale=0.1, window=(5, 2))
    torch.testing.assert_close(whole.lse, parts.lse, rtol=1e-12, atol=1e-12)
    assert (whole.out == parts.out).float().mean() > 0.999
    assert whole.max_error == pytest.approx(parts.max_error, rel=0.3)


@pytest.mark.parametrize(
    ("dtype", "value", "step"), [("bfloat16", 1.0, 2**-7), ("bfloat16", 3.9, 2**-6), ("float16", 0.5, 2**-11)]
)
def test_ulp(dtype, value, step):
    assert yardstick.ulp(value, getattr(torch, dtype)) == step


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    tensors = values(Shape(1, 2, 1, 50, 60, 128, "bf16"), family, "cpu", 3)
    logits = torch.einsum("bqhd,bkd->bhqk", tensors["q"].float(), tensors["k"][:, :, 0].float()) * 128**-0.5
    if family == "far_below":
        assert logits.max() < -30
    else:
        assert logits.std() == pytest.approx(16 if family == "times4" else 1, rel=0.1)
    assert untouched(place(tensors["q"]))
    with pytest.raises(ValueError, match="family"):
        values(Shape(1, 1, 1, 1, 1, 64, "bf16"), "odd", "cpu", 0)


def test_surroundings_are_watched():
    tensor = padded((1, 2, 3, 64), torch.bfloat16, "cpu")
    tensor.zero_()
    assert untouched(tensor)
    tensor._base[0, 0, 0, 0] = 1
    assert not untouched(tensor)
    assert all(step % 8 == 0 for step in tensor.stride()[:3]) and tensor.storage_offset() % 8 == 0
