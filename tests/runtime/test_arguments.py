"""Bad input: each refusal names its argument, says why, and happens before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import runtime
from runtime.call import memory, tensors
from runtime.errors import ArgumentError, CubineryError, InstallError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend, rows

Q, K = (2, 5, 4, 64), (2, 7, 2, 64)
NAN, INF = float("nan"), float("inf")


def t(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def strided(shape, strides):
    return torch.zeros(200_000, dtype=torch.bfloat16).as_strided(shape, strides)


def freed(*shape):
    tensor = t(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake(*shape):
    return FakeTensorMode().from_tensor(t(*shape))


CASES = {
    "q no tensor": ({"q": np.zeros(Q, "float16")}, "q", "type"),
    "k None": ({"k": None}, "k", "type"),
    "v list": ({"v": [[1.0]]}, "v", "type"),
    "out no tensor": ({"out": "here"}, "out", "type"),
    "fp32": ({"q": t(*Q, dtype=torch.float32)}, "q", "dtype"),
    "int": ({"k": t(*K, dtype=torch.int16)}, "k", "dtype"),
    "fp8": ({"v": t(*K, dtype=torch.float8_e4m3fn)}, "v", "dtype"),
    "mixed dtypes": ({"k": t(*K, dtype=torch.float16)}, "k", "dtype"),
    "out dtype": ({"out": t(*Q, dtype=torch.float16)}, "out", "dtype"),
    "rank 3": ({"q": t(5, 4, 64)}, "q", "rank"),
    "rank 5": ({"v": t(1, *K)}, "v", "rank"),
    "rank 0": ({"k": t()}, "k", "rank"),
    "sparse": ({"q": t(*Q).to_sparse()}, "q", "layout"),
    "nested": ({"k": torch.nested.nested_tensor([t(3, 2, 64), t(4, 2, 64)])}, "k", "layout"),
    "meta": ({"q": t(*Q, device="meta")}, "q", "device"),
    "mixed devices": ({"v": t(*K, device="meta")}, "v", "device"),
    "out device": ({"out": t(*Q, device="meta")}, "out", "device"),
    "freed q": ({"q": freed(*Q)}, "q", "storage"),
    "freed v": ({"v": freed(*K)}, "v", "storage"),
    "freed out": ({"out": freed(*Q)}, "out", "storage"),
    "fake k": ({"k": fake(*K)}, "k", "storage"),
    "all fake": ({"q": fake(*Q), "k": fake(*K), "v": fake(*K)}, "q", "storage"),
    "batch": ({"k": t(3, 7, 2, 64), "v": t(3, 7, 2, 64)}, "k", "shape"),
    "seqlen_k": ({"v": t(2, 8, 2, 64)}, "v", "shape"),
    "heads_kv": ({"v": t(2, 7, 1, 64)}, "v", "shape"),
    "head_dim of k": ({"k": t(2, 7, 2, 128), "v": t(2, 7, 2, 128)}, "k", "shape"),
    "head_dim 0": ({"q": t(2, 5, 4, 0), "k": t(2, 7, 2, 0), "v": t(2, 7, 2, 0)}, "q", "head_dim"),
    "head_dim 60": ({"q": t(2, 5, 4, 60), "k": t(2, 7, 2, 60)}, "q", "head_dim"),
    "head_dim 264": ({"q": t(2, 5, 4, 264), "k": t(2, 7, 2, 264)}, "q", "head_dim"),
    "head_dim of v 0": ({"v": t(2, 7, 2, 0)}, "v", "head_dim"),
    "head_dim of v 68": ({"v": t(2, 7, 2, 68)}, "v", "head_dim"),
    "head_dim of v 264": ({"v": t(2, 7, 2, 264)}, "v", "head_dim"),
    "out of q's head_dim": ({"v": t(2, 7, 2, 128), "out": t(*Q)}, "out", "shape"),
    "out shape": ({"out": t(2, 5, 4, 128)}, "out", "shape"),
    "heads ratio": ({"q": t(2, 5, 3, 64)}, "q", "heads"),
    "fewer q heads": ({"q": t(2, 5, 1, 64)}, "q", "heads"),
    "no kv heads": ({"k": t(2, 7, 0, 64), "v": t(2, 7, 0, 64)}, "q", "heads"),
    "last dim": ({"q": t(2, 5, 64, 4).transpose(2, 3)}, "q", "contiguity"),
    "last dim step": ({"k": t(2, 7, 2, 128)[..., ::2]}, "k", "contiguity"),
    "out last dim": ({"out": t(2, 5, 64, 4).transpose(2, 3)}, "out", "contiguity"),
    "stride": ({"v": strided(K, (1000, 132, 64, 1))}, "v", "stride"),
    "head stride": ({"k": strided(K, (1400, 200, 68, 1))}, "k", "stride"),
    "batch stride": ({"q": strided(Q, (1283, 256, 64, 1))}, "q", "stride"),
    "out stride": ({"out": strided(Q, (1284, 256, 64, 1))}, "out", "stride"),
    "alignment": ({"q": t(2 * 5 * 4 * 64 + 1)[1:].view(Q)}, "q", "alignment"),
    "out expanded": ({"out": t(1, 5, 4, 64).expand(Q)}, "out", "overlap"),
    "out overlapping": ({"out": strided(Q, (1280, 256, 32, 1))}, "out", "overlap"),
    "too long": ({"k": t(2, 1, 2, 64).expand(2, 2**30, 2, 64), "v": t(2, 1, 2, 64).expand(2, 2**30, 2, 64)}, "q",
                 "too_large"),
    "causal text": ({"causal": "yes"}, "causal", "type"),
    "causal 2": ({"causal": 2}, "causal", "type"),
    "causal unhashable": ({"causal": []}, "causal", "type"),
    "return_lse": ({"return_lse": None}, "return_lse", "type"),
    "scale nan": ({"softmax_scale": NAN}, "softmax_scale", "value"),
    "scale inf": ({"softmax_scale": INF}, "softmax_scale", "value"),
    "scale negative": ({"softmax_scale": -0.1}, "softmax_scale", "value"),
    "scale 0": ({"softmax_scale": 0}, "softmax_scale", "value"),
    "scale huge": ({"softmax_scale": 10**400}, "softmax_scale", "value"),
    "scale text": ({"softmax_scale": "0.1"}, "softmax_scale", "value"),
    "scale of several": ({"softmax_scale": torch.tensor([0.1, 0.2])}, "softmax_scale", "value"),
    "softcap negative": ({"softcap": -1.0}, "softcap", "value"),
    "softcap nan": ({"softcap": NAN}, "softcap", "value"),
    "softcap inf": ({"softcap": INF}, "softcap", "value"),
    "softcap None": ({"softcap": None}, "softcap", "value"),
    "scale with a gradient": ({"softmax_scale": torch.tensor(0.1, requires_grad=True)}, "softmax_scale", "value"),
    "softcap of several": ({"softcap": torch.zeros(2)}, "softcap", "value"),
    "softcap out of fp32's reach": ({"softcap": 1e-20, "softmax_scale": 1e20}, "softcap", "value"),
    "window number": ({"window": 3}, "window", "type"),
    "window of 3": ({"window": (1, 2, 3)}, "window", "type"),
    "window -1": ({"window": (-1, 0)}, "window", "value"),
    "window float": ({"window": (1.5, None)}, "window", "value"),
    "window text": ({"window": ("1", None)}, "window", "value"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(backend: FakeBackend, registry: Path, name):
    changes, argument, reason = CASES[name]
    given_ = {"q": t(*Q), "k": t(*K), "v": t(*K)} | changes
    for warm in (False, True):
        if warm and name in ("meta", "mixed devices", "out device"):  # a key has but indices of devices, which here
            reason = "storage"  # are all -1, so that only the missing address tells
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn(**given_)
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
        assert str(error.value).startswith(argument + ": ")
        assert isinstance(error.value, CubineryError) and isinstance(error.value, ValueError)
        assert error.value.__context__ is None, "the plan cache's own miss must not show"
        if not warm:  # and again beside a plan that exists
            assert not backend.driver.calls
            runtime.flash_attn(t(*Q), t(*K), t(*K))
            runtime.flash_attn(t(*Q), t(*K), t(*K), out=t(*Q))


def test_tensors_inside_transforms_are_refused(backend: FakeBackend, registry: Path):
    """torch.func's wrappers have no address, or none but 0; a plan made outside must not launch with it."""
    q, k = t(*Q), t(*K)
    refused = []

    def attend(x):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn(x, k, k)
        refused.append((error.value.argument, error.value.reason))
        return x.sum()

    for _ in range(2):  # first and warm
        torch.func.vmap(attend)(q[None])
        torch.func.functionalize(attend)(q)
        assert not backend.driver.launches
        runtime.flash_attn(q, k, k)
        backend.driver.launches.clear()
    assert refused == [("q", "storage")] * 4


def test_forward_mode_tangents_are_refused_first_and_warm(backend: FakeBackend, registry: Path):
    q, k = t(*Q), t(*K)
    with fwAD.dual_level():
        for _ in range(2):
            for name, tensors in (("q", (fwAD.make_dual(q, q), k, k)), ("v", (q, k, fwAD.make_dual(k, k)))):
                with pytest.raises(ArgumentError, match="tangent") as error:
                    runtime.flash_attn(*tensors)
                assert (error.value.argument, error.value.reason) == (name, "forward_ad")
            with pytest.raises(ArgumentError, match="tangent"):
                runtime.flash_attn(q, k, k, out=fwAD.make_dual(t(*Q), q))
            runtime.flash_attn(q, k, k)  # without a tangent, a dual level changes nothing
            runtime.flash_attn(q, k, k, out=t(*Q))


def test_negated_views_are_refused_warm_too(backend: FakeBackend, registry: Path):
    """The plan's key does not hold that bit: such a view was served as what it is a view of."""
    q, k = t(*Q), t(*K)
    lengths = {"cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32)}
    packed = q[0, :1]
    runtime.flash_attn(q, k, k)
    runtime.flash_attn_varlen(packed, k[:1], k[:1], **lengths)
    for name in ("q", "k", "v"):
        given = {"q": q, "k": k, "v": k}
        with pytest.raises(ArgumentError, match="resolve_neg") as error:
            runtime.flash_attn(**given | {name: torch._neg_view(given[name])})
        assert (error.value.argument, error.value.reason) == (name, "layout")
    with pytest.raises(ArgumentError, match="resolve_neg") as error:
        runtime.flash_attn_varlen(torch._neg_view(packed), k[:1], k[:1], **lengths)
    assert error.value.argument == "q"


def test_negated_views_are_refused(backend: FakeBackend, registry: Path):
    with pytest.raises(ArgumentError, match="resolve_neg") as error:
        runtime.flash_attn(torch._neg_view(t(*Q)), t(*K), t(*K))
    assert (error.value.argument, error.value.reason) == ("q", "layout")
    ordinary = torch.zeros(Q, dtype=torch.complex64).conj().imag  # whose strides forbid a plan to be warm with
    assert ordinary.is_neg() and ordinary.stride(3) == 2


@pytest.mark.parametrize("dims", [(136, 136), (256, 64), (64, 256)])
def test_head_dims_without_a_kernel_explain_themselves(backend: FakeBackend, registry: Path, dims):
    from runtime.errors import NoKernelError

    d, dv = dims
    with pytest.raises(NoKernelError) as error:
        runtime.flash_attn(t(2, 5, 4, d), t(2, 7, 2, d), t(2, 7, 2, dv))
    assert error.value.reason == "row" and len(error.value.rejections) == len(rows())
    assert f"needs head_dim{'_v' if dv > 128 else ''} <= 128, the call has {max(dims)}" in str(error.value)
    variant = {(136, 136): "d160-dv160", (256, 64): "d256-dv64", (64, 256): "d64-dv256"}[dims]
    assert f"python -m builder --arch sm_120 --only 'fwd-bf16-{variant}-*'" in str(error.value)
    assert not backend.driver.calls


def test_cuda_is_asked_for_on_the_real_backend():
    """No fake here: torch's CPU build, CPU tensors."""
    with pytest.raises(ArgumentError, match="must be on a cuda device") as error:
        runtime.flash_attn(t(*Q), t(*K), t(*K))
    assert error.value.reason == "device"


def test_without_torch(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InstallError, match=r"cubinery\[torch\]"):
        runtime.flash_attn(1, 2, 3)


@pytest.mark.parametrize("left", [np.int64(3), np.array(3), torch.tensor(3)], ids=lambda left: type(left).__name__)
def test_index_like_window_and_flag_ints_serve(backend: FakeBackend, registry: Path, left):
    """With the plan of the number that they equal: an array has no hash, and a tensor's is not of its value."""
    q, k = t(*Q), t(*K)
    for _ in range(2):
        runtime.flash_attn(q, k, k, window=(left, None), causal=1, return_lse=0)
        assert backend.driver.launches[-1]["params"]["window_left"] == 3
        assert backend.driver.launches[-1]["params"]["window_right"] == 0
    runtime.flash_attn(q, k, k, window=(3, None), causal=1, return_lse=0)
    assert len(plans.plans.by_call) == 1


AXIS = st.tuples(st.integers(1, 3), st.integers(0, 9))  # (size, stride)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.tuples(AXIS, AXIS, AXIS), st.tuples(AXIS, AXIS, AXIS), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_sharing_memory_is_never_missed(mine, theirs, first, second, alike):
    """Against the elements' addresses, one by one. Parts of packed rows (`alike`: equal strides) may be told apart."""
    if alike:
        theirs = tuple((n, stride) for (n, _), (_, stride) in zip(theirs, mine, strict=True))
    buffer = torch.zeros(400, dtype=torch.bfloat16)

    def view(axes, offset):
        return buffer[offset:].as_strided([n for n, _ in axes] + [4], [stride for _, stride in axes] + [1])

    def places(tensor):
        return (
            (torch.arange(400)[tensor.storage_offset() :].as_strided(tensor.shape, tensor.stride())).flatten().tolist()
        )

    out, tensor = view(mine, first), view(theirs, second)
    shared = bool(set(places(out)) & set(places(tensor)))
    try:
        memory.check_apart(out, ("q", tensor))
    except ArgumentError:
        assert out.data_ptr() < tensor.data_ptr() + memory.span(tensor)
        assert tensor.data_ptr() < out.data_ptr() + memory.span(out)
    else:
        assert not shared
    if len(set(places(out))) < out.numel():
        with pytest.raises(ArgumentError):
            tensors.check_apart_within("out", out)


def test_a_new_output_without_memory_is_refused(backend: FakeBackend, registry: Path):
    """As FakeTensorMode makes them: nothing may be launched at address 0."""
    q, k, v = (torch.randn(1, 8, heads, 64).bfloat16() for heads in (4, 2, 2))
    sink = torch.zeros(4)
    runtime.flash_attn(q, k, v, sink=sink)
    launches = len(backend.driver.launches)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ArgumentError) as error:
        runtime.flash_attn(q, k, v, sink=sink, return_lse=True)
    assert error.value.reason == "storage" and len(backend.driver.launches) == launches
