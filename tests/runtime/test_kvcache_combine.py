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
from tests.support.varlen import ints, tensor_at

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


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


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
    again, none = runtime.flash_attn_combine(out_partial, lse_partial, out_dtype=dtype, return_lse=False)
    assert torch.equal(again, out) and none is None
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


def close(found, want, bits=16):
    tolerance = 1e-2 if bits == 16 else 1e-5
    torch.testing.assert_close(found.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_parts_of_16_bits(backend: FakeBackend, dtype):
    """As FlashAttention-4 has it, the output then is of their dtype; what is computed is what they hold, in fp32."""
    out_partial, lse_partial = parts(2, 3, 4)
    low = out_partial.to(dtype)
    want, want_lse = wanted(low, lse_partial)
    for _ in range(2):
        out, lse = runtime.flash_attn_combine(low, lse_partial)
        assert out.dtype == dtype
        close(out, want)
        close(lse, want_lse, 32)
        wide, _ = runtime.flash_attn_combine(low, lse_partial, out_dtype=F32)
        assert wide.dtype == F32
        close(wide, want, 32)
        given = torch.empty(2, 3, 4, 40)
        assert runtime.flash_attn_combine(low, lse_partial, given)[0] is given and torch.equal(given, wide)


def crooked_parts(out_partial):
    yield "of other strides", out_partial.transpose(1, 2).contiguous().transpose(1, 2)
    yield "by columns", out_partial.mT.contiguous().mT
    wide = torch.zeros(3, 970)
    wide[:, :960] = out_partial.flatten(1)
    yield "of an odd first stride", wide[:, :960].view(out_partial.shape)
    memory = torch.zeros(out_partial.numel() + 1)
    memory[1:] = out_partial.flatten()
    yield "misaligned", memory[1:].view(out_partial.shape)


def test_parts_that_the_kernel_cannot_read_are_copied(backend: FakeBackend):
    out_partial, lse_partial = parts(2, 3, 4)
    want, want_lse = runtime.flash_attn_combine(out_partial, lse_partial)
    for what, crooked in crooked_parts(out_partial):
        for _ in range(2):
            out, lse = runtime.flash_attn_combine(crooked, lse_partial)
            assert torch.equal(out, want) and torch.equal(lse, want_lse), what
    memory = torch.zeros(4 * lse_partial.numel() + 8, dtype=torch.uint8)
    odd = tensor_at(memory[1:-7], F32).view(lse_partial.shape).copy_(lse_partial)
    out, lse = runtime.flash_attn_combine(out_partial, odd)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_outputs_that_the_kernel_cannot_write_are_copied_into(backend: FakeBackend):
    out_partial, lse_partial = parts(2, 3, 4)
    want, want_lse = runtime.flash_attn_combine(out_partial, lse_partial)
    for buffer in (torch.full((2, 3, 4, 81), 9.0), torch.full((2, 3, 4, 2, 40), 9.0).mT.contiguous().mT):
        out = buffer[..., 1::2] if buffer.dim() == 4 else buffer[:, :, :, 1]
        before = out._version
        for _ in range(2):
            found, lse = runtime.flash_attn_combine(out_partial, lse_partial, out)
            assert found is out and torch.equal(out, want) and torch.equal(lse, want_lse)
        assert out._version > before and (buffer == 9).sum() == buffer.numel() - out.numel()


def test_rows_that_no_sequence_uses_keep_their_values(backend: FakeBackend):
    """Upstream's kernel ends with a sequence; ours computes all rows, and those of `out` are put back."""
    out_partial, lse_partial = parts(2, 5, 4)
    want, want_lse = wanted(out_partial, lse_partial)
    seqused = ints(3, 0)
    for dtype in (F32, BF16):
        out = torch.full((2, 5, 4, 40), 7.0, dtype=dtype)
        out[1, 2] = torch.nan
        kept = out.clone()
        found, lse = runtime.flash_attn_combine(out_partial, lse_partial, out, seqused=seqused)
        assert found is out
        close(out[0, :3], want[0, :3], 16 if dtype is BF16 else 32)
        close(lse[0, :3], want_lse[0, :3], 32)
        assert torch.equal(out[0, 3:], kept[0, 3:]) and torch.equal(out[1].nan_to_num(8), kept[1].nan_to_num(8))
    new, _ = runtime.flash_attn_combine(out_partial, lse_partial, seqused=seqused)
    close(new[0, :3], want[0, :3], 32)


@pytest.mark.parametrize(("ends", "used", "rows"), [
    ((0, 3, 3, 7), None, [0, 1, 2, 3, 4, 5, 6]), ((2, 5, 6), None, [2, 3, 4, 5]), ((0, 3, 3, 7), (2, 5, 1), [0, 1, 3]),
    ((0, 3, 8), (9, 1), [0, 1, 2, 3]), ((1, 1), (4,), []), ((4,), None, []), ((0, 8), (-3,), []),
])  # fmt: skip
def test_packed_rows_that_no_sequence_uses_keep_their_values(backend: FakeBackend, ends, used, rows):
    out_partial, lse_partial = parts(8, 4)
    want, want_lse = wanted(out_partial, lse_partial)
    lengths = {"cu_seqlens": ints(*ends), "seqused": None if used is None else ints(*used)}
    lengths["virtual_batch_idx"] = torch.arange(len(ends) - 1).flip(0).int()
    out = torch.full((8, 4, 40), 7.0)
    found, lse = runtime.flash_attn_combine(out_partial, lse_partial, out, None, *lengths.values())
    rest = [row for row in range(8) if row not in rows]
    assert found is out and (out[rest] == 7).all()
    close(out[rows], want[rows], 32)
    close(lse[rows], want_lse[rows], 32)
    new, _ = runtime.flash_attn_combine(out_partial, lse_partial, **lengths)
    close(new[rows], want[rows], 32)


def test_an_order_of_sequences_changes_nothing(backend: FakeBackend):
    out_partial, lse_partial = parts(2, 5, 4)
    want, want_lse = runtime.flash_attn_combine(out_partial, lse_partial)
    out = torch.empty_like(want)
    found, lse = runtime.flash_attn_combine(out_partial, lse_partial, out, virtual_batch_idx=ints(1, 0))
    assert found is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    assert backend.driver.launches[-1]["params"]["o"] == out.data_ptr()


@pytest.mark.parametrize("wanting", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_gradient_is_refused_when_it_is_asked_for(backend: FakeBackend, wanting, dtype):
    """FlashAttention-4's function is no autograd Function: there `out` requires no grad, and the parts' part in a
    gradient is lost without a word."""
    out_partial, lse_partial = parts(2, 3, 4)
    given = [out_partial.to(dtype), lse_partial]
    want, want_lse = runtime.flash_attn_combine(*given)
    given[wanting].requires_grad_()
    for _ in range(2):
        out, lse = runtime.flash_attn_combine(*given)
        assert torch.equal(out, want) and torch.equal(lse, want_lse) and out.requires_grad and lse.requires_grad
        for asked in (out, lse):
            with pytest.raises(ArgumentError, match="not implemented of combined outputs") as error:
                asked.sum().backward()
            named = ("out_partial", "lse_partial")[wanting]
            assert (error.value.argument, error.value.reason) == (named, "requires_grad")
    with torch.no_grad():
        assert not runtime.flash_attn_combine(*given)[0].requires_grad


def test_it_is_flash_attention_4_s_too():
    assert runtime.fa4.flash_attn_combine is runtime.flash_attn_combine


OUT, LSE = parts(2, 3, 4)
CASES = {
    "out_partial kind": ((None, LSE), {}, "out_partial", "type"),
    "out_partial dtype": ((OUT.double(), LSE), {}, "out_partial", "dtype"),
    "out_partial rank": ((OUT[0, 0], LSE), {}, "out_partial", "rank"),
    "lse_partial freed": ((OUT, freed(LSE)), {}, "lse_partial", "storage"),
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
    "out beside a gradient": ((OUT.clone().requires_grad_(), LSE, OUT[0].clone()), {}, "out", "requires_grad"),
    "crooked out beside a gradient": (
        (OUT.clone().requires_grad_(), LSE, OUT[0].mT.clone().mT),
        {},
        "out",
        "requires_grad",
    ),
    "packed lengths of dense parts": ((OUT, LSE), {"cu_seqlens": ints(0, 3)}, "cu_seqlens", "rank"),
    "seqused of packed parts": ((OUT[:, 0], LSE[:, 0]), {"seqused": ints(2)}, "seqused", "value"),
    "seqused shape": ((OUT, LSE), {"seqused": ints(1, 2, 3)}, "seqused", "shape"),
    "seqused dtype": ((OUT, LSE), {"seqused": ints(1, 2).long()}, "seqused", "dtype"),
    "seqused kind": ((OUT, LSE), {"seqused": [1, 2]}, "seqused", "type"),
    "seqused rank": ((OUT, LSE), {"seqused": ints(1, 2)[None]}, "seqused", "rank"),
    "seqused device": ((OUT, LSE), {"seqused": ints(1, 2).to("meta")}, "seqused", "device"),
    "cu_seqlens empty": ((OUT[:, 0], LSE[:, 0]), {"cu_seqlens": ints()}, "cu_seqlens", "shape"),
    "seqused beside cu_seqlens": (
        (OUT[:, 0], LSE[:, 0]),
        {"cu_seqlens": ints(0, 3), "seqused": ints(1, 2)},
        "seqused",
        "shape",
    ),
    "order": ((OUT, LSE), {"virtual_batch_idx": ints(0)}, "virtual_batch_idx", "shape"),
    "no parts with lengths": ((None, LSE), {"seqused": ints(1, 2)}, "out_partial", "type"),
    "out kind with lengths": ((OUT, LSE, 3), {"seqused": ints(1, 2)}, "out", "type"),
    "out shape with lengths": ((OUT, LSE, OUT[0, :1].clone()), {"seqused": ints(1, 2)}, "out", "shape"),
    "out device with lengths": ((OUT, LSE, OUT[0].to("meta")), {"seqused": ints(1, 2)}, "out", "device"),
    "out expanded with lengths": (
        (OUT, LSE, OUT[0, :1].clone().expand(2, 3, 4, 40)),
        {"seqused": ints(1, 2)},
        "out",
        "overlap",
    ),
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
    runtime.flash_attn_combine(out_partial, lse_partial, torch.zeros(2, 3, 4, 40))
    runtime.flash_attn_combine(out_partial, lse_partial)
    for given, argument, reason in (
        ((out_partial, lse_partial, out_partial[1]), "out", "overlap"),
        ((out_partial, lse_partial, freed(out_partial[0])), "out", "storage"),
        ((freed(out_partial), lse_partial), "out_partial", "storage"),
    ):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_combine(*given)
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    assert len(backend.driver.launches) == 2
