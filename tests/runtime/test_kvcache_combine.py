"""`flash_attn_combine` on the CPU, against attention over the whole and against sums in fp64."""

from __future__ import annotations

import pytest
import torch

import runtime
from runtime.api import combine
from runtime.errors import ArgumentError, CaptureError
from runtime.load import plans, session
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, inputs, reference

F32 = torch.float32


pytestmark = pytest.mark.usefixtures("cache_registry")


def parts(*shape, splits=3, head_dim_v=40):
    """(out_partial, lse_partial); the first part of the first row saw no key, nor did any part of the last row."""
    torch.manual_seed(6)
    out, lse = torch.randn(splits, *shape, head_dim_v), 3 * torch.randn(splits, *shape)
    rows = lse.view(splits, -1)
    rows[0, 0] = rows[:, -1] = -torch.inf
    out[0].view(-1, head_dim_v)[0] = torch.nan
    out.view(splits, -1, head_dim_v)[:, -1] = torch.nan
    return out, lse


def wanted(out, lse):
    whole = torch.logsumexp(lse.double(), 0)
    weights = torch.where(lse.isinf(), 0.0, torch.exp(lse.double() - whole))
    return (weights[..., None] * out.double().nan_to_num()).sum(0), whole


@pytest.mark.parametrize("shape", [(2, 3, 4), (7, 4), (1, 1, 1)])
@pytest.mark.parametrize("splits", [1, 2, 33])
@pytest.mark.parametrize("dtype", [None, F32, BF16, torch.float16])
def test_sums(backend: FakeBackend, shape, splits, dtype):
    out_partial, lse_partial = parts(*shape, splits=splits)
    for _ in range(2):
        out, lse = runtime.flash_attn_combine(out_partial, lse_partial, out_dtype=dtype)
        want, want_lse = wanted(out_partial, lse_partial)
        assert out.dtype == (dtype or F32) and out.is_contiguous() and lse.dtype == F32 and lse.shape == shape
        tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype in (BF16, torch.float16) else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(out.double(), want, **tolerance)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
        assert lse.transpose(-1, -2).is_contiguous()
    assert isinstance(
        runtime.flash_attn_combine(out_partial, lse_partial, out_dtype=dtype, return_lse=False), torch.Tensor
    )
    assert backend.driver.launches[-1]["params"]["lse"] == 0
    name = {BF16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    assert {m["variant"] for m in backend.driver.launches} == {f"fwd_combine-{name}-d256-dv256-m4"}


def test_parts_of_the_keys_make_the_whole(backend: FakeBackend):
    q, k, v = inputs(seqlen_k=9)
    found = [runtime.flash_attn(q, k[:, a:b].contiguous(), v[:, a:b].contiguous(), return_lse=True)
             for a, b in ((0, 4), (4, 5), (5, 9))]  # fmt: skip
    out_partial = torch.stack([out.float() for out, _ in found])
    lse_partial = torch.stack([lse for _, lse in found]).transpose(2, 3)  # strides of its own
    out, lse = runtime.flash_attn_combine(out_partial, lse_partial, out_dtype=BF16)
    want, want_lse = reference(q, k, v)
    torch.testing.assert_close(out.double(), want, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(lse.transpose(1, 2), want_lse.float(), atol=1e-3, rtol=1e-4)


def test_strides_and_out(backend: FakeBackend):
    out_partial, lse_partial = parts(2, 3, 4, splits=4)
    wide, crooked = torch.zeros(4, 2, 2, 3, 4, 40), torch.zeros(4, 3, 5, 2)
    wide[:, 1], crooked[:, :, :4] = out_partial, lse_partial.permute(0, 2, 3, 1)
    buffer = torch.full((2, 3, 8, 40), 9.0, dtype=BF16)
    out = buffer[:, :, ::2]
    for _ in range(2):
        version = out._version
        found, _ = runtime.flash_attn_combine(wide[:, 1], crooked.permute(0, 3, 1, 2)[..., :4], out)
        assert found is out and out._version == version + 1 and (buffer[:, :, 1::2] == 9).all()
        torch.testing.assert_close(out.double(), wanted(out_partial, lse_partial)[0], atol=1e-2, rtol=1e-2)
    p = backend.driver.launches[-1]["params"]
    assert (p["o_partial_stride_split"], p["lse_partial_stride_split"]) == (2 * 960, 30)
    assert [p[f"lse_partial_stride_{axis}"] for axis in "bsh"] == [1, 10, 2]
    assert [p[f"o_stride_{axis}"] for axis in "bsh"] == [960, 320, 80]
    assert [p[f"lse_stride_{axis}"] for axis in "bsh"] == [12, 1, 3]
    assert (p["num_splits"], p["rows"], p["seqlen"], p["heads"], p["head_dim_v"]) == (4, 24, 3, 4, 40)
    assert backend.driver.launches[-1]["grid"] == (6, 1, 1)


def test_nothing_to_combine(backend: FakeBackend):
    for shape in ((0, 3, 4), (2, 0, 4), (0, 4)):
        out, lse = runtime.flash_attn_combine(*(x.new_empty(x.shape) for x in (
            torch.empty(3, *shape, 8), torch.empty(3, *shape))))  # fmt: skip
        assert out.shape == (*shape, 8) and lse.shape == shape
    assert not backend.driver.calls


def test_a_warm_call_only_launches(backend: FakeBackend, monkeypatch):
    given = parts(2, 3, 4)
    backend.capturing = True
    with pytest.raises(CaptureError):
        runtime.flash_attn_combine(*given)
    backend.capturing = False
    runtime.flash_attn_combine(*given)
    monkeypatch.setattr(session, "current", None)
    monkeypatch.setattr(combine, "prepare", None)
    backend.capturing = True
    calls = list(backend.driver.calls)
    runtime.flash_attn_combine(*(x.clone() for x in given))
    assert backend.driver.calls == calls and len(backend.driver.launches) == 2 and len(plans.plans.by_call) == 1


OUT, LSE = parts(2, 3, 4)
CASES = {
    "out_partial kind": ((None, LSE), {}, "out_partial", "type"),
    "out_partial dtype": ((OUT.to(BF16), LSE), {}, "out_partial", "dtype"),
    "out_partial rank": ((OUT[0, 0], LSE), {}, "out_partial", "rank"),
    "out_partial strides": ((OUT.transpose(1, 2).contiguous().transpose(1, 2), LSE), {}, "out_partial", "contiguity"),
    "out_partial first stride": ((torch.zeros(3, 970)[:, :960].view(3, 2, 3, 4, 40), LSE), {}, "out_partial", "stride"),
    "head_dim": ((OUT[..., :36].contiguous(), LSE), {}, "out_partial", "head_dim"),
    "no splits": ((OUT[:0], LSE[:0]), {}, "out_partial", "shape"),
    "too many splits": ((torch.zeros(257, 1, 1, 8), torch.zeros(257, 1, 1)), {}, "out_partial", "shape"),
    "lse shape": ((OUT, LSE[:, :1]), {}, "lse_partial", "shape"),
    "lse rank": ((OUT, LSE[0]), {}, "lse_partial", "rank"),
    "out rank": ((OUT, LSE, torch.zeros(12, 4, 64)), {}, "out", "rank"),
    "lse dtype": ((OUT, LSE.double()), {}, "lse_partial", "dtype"),
    "lse device": ((OUT, LSE.to("meta")), {}, "lse_partial", "device"),
    "out_dtype": ((OUT, LSE), {"out_dtype": torch.float64}, "out_dtype", "dtype"),
    "out_dtype kind": ((OUT, LSE), {"out_dtype": "bf16"}, "out_dtype", "dtype"),
    "out_dtype text": ((OUT, LSE), {"out_dtype": "torch.float32"}, "out_dtype", "dtype"),
    "out_dtype unhashable": ((OUT, LSE), {"out_dtype": []}, "out_dtype", "dtype"),
    "out shape": ((OUT, LSE, OUT[0, :1]), {}, "out", "shape"),
    "out dtype": ((OUT, LSE, OUT[0].clone()), {"out_dtype": BF16}, "out", "dtype"),
    "out expanded": ((OUT, LSE, OUT[0, :1].clone().expand(2, 3, 4, 40)), {}, "out", "overlap"),
    "return_lse": ((OUT, LSE), {"return_lse": "yes"}, "return_lse", "type"),
    "grad": ((OUT.clone().requires_grad_(), LSE), {}, "out_partial", "requires_grad"),
}


@pytest.mark.parametrize(("given", "options", "argument", "reason"), CASES.values(), ids=CASES)
def test_refusals(backend: FakeBackend, given, options, argument, reason):
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_combine(*given, **options)
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    assert not backend.driver.launches


def test_what_a_key_leaves_open_is_refused_warm(backend: FakeBackend):
    out_partial, lse_partial = parts(2, 3, 4)
    crooked = torch.zeros(out_partial.numel() + 4)
    runtime.flash_attn_combine(out_partial, lse_partial, torch.zeros(2, 3, 4, 40))
    runtime.flash_attn_combine(out_partial, lse_partial)
    for given, argument, reason in (
        ((crooked[1:-3].view(out_partial.shape), lse_partial), "out_partial", "alignment"),
        ((out_partial, lse_partial, out_partial[1]), "out", "overlap"),
        ((out_partial, lse_partial, crooked[3:963].view(2, 3, 4, 40)), "out", "alignment"),
    ):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_combine(*given)
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    assert len(backend.driver.launches) == 2
