"""What has no gradients, and what a backward refuses: typed errors that name the argument, first and warm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad as fwAD

import runtime
from registry.contract import Param
from runtime.errors import ArgumentError, CaptureError, DriverError, IntegrityError, NoKernelError
from tests.runtime import backward_kernels
from tests.runtime.backward_kernels import KERNELS
from tests.runtime.cache_kernels import write_cache_registry
from tests.runtime.fakes import FakeBackend
from tests.support.abis import ABIS
from tests.support.attention import inputs
from tests.support.backward import SINK, leaves
from tests.support.varlen import ints

pytestmark = pytest.mark.usefixtures("backward_registry")


def test_a_second_derivative_is_refused(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    (grad,) = torch.autograd.grad(runtime.flash_attn(q, k, v).float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_changed_before_the_backward_are_an_error(backend: FakeBackend):
    q, k, v = inputs()
    ends = ints(4, 5)
    out = runtime.flash_attn_varlen(*leaves(q, k, v), seqused_k=ends)
    ends.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("wanting", ["q", "v", "sink", "out"])
def test_out_cannot_be_given(backend: FakeBackend, wanting):
    given = dict(zip(("q", "k", "v"), inputs(), strict=True)) | {"sink": SINK}
    given["out"] = torch.empty_like(given["q"])
    for _ in range(2):
        with pytest.raises(ArgumentError, match="leave it out") as error:
            runtime.flash_attn(**given | {wanting: given[wanting].detach().requires_grad_()})
        assert (error.value.argument, error.value.reason) == ("out", "requires_grad")
        assert not backend.driver.launches
    with torch.no_grad():
        runtime.flash_attn(**given | {wanting: given[wanting].detach().requires_grad_()})


@pytest.mark.parametrize("wanting", ["q", "k", "sink", "alibi_slopes", "page_table"])
def test_there_are_no_gradients_over_a_cache(backend: FakeBackend, tmp_path: Path, wanting):
    """The forward is served, and says that it depends on what requires grad: a backward must not miss that part."""
    write_cache_registry(tmp_path / "r.db")
    runtime.configure(registry=tmp_path / "r.db")
    q, k, v = inputs(seqlen_k=16)
    given = {"q": q, "k": k, "v": v, "page_table": ints(0, 1).view(2, 1), "sink": SINK, "alibi_slopes": torch.rand(4)}
    for _ in range(2):
        if wanting == "page_table":  # nothing to refuse
            assert not runtime.flash_attn_varlen(**given, deterministic=True).requires_grad
            continue
        out, lse = runtime.flash_attn_varlen(
            **given | {wanting: given[wanting].clone().requires_grad_()}, return_lse=True
        )
        want = runtime.flash_attn_varlen(**given, return_lse=True)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and out.requires_grad and lse.requires_grad
        with pytest.raises(ArgumentError, match="not implemented over a cache") as error:
            (out.float().sum() + lse.sum()).backward()
        assert (error.value.argument, error.value.reason) == (wanting, "requires_grad")
        with torch.no_grad():
            runtime.flash_attn_varlen(**given | {wanting: given[wanting].clone().requires_grad_()})


def test_other_kinds_of_derivatives_are_refused(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    for _ in range(2):  # first and warm
        with fwAD.dual_level():
            for given, name in (((fwAD.make_dual(q, q), k, v), "q"), ((q, k, fwAD.make_dual(v.detach(), v)), "v")):
                with pytest.raises(ArgumentError, match="tangent") as error:
                    runtime.flash_attn(*given)
                assert (error.value.argument, error.value.reason) == (name, "forward_ad")
            with pytest.raises(ArgumentError, match="tangent") as error:
                runtime.flash_attn(q, k, v, sink=fwAD.make_dual(SINK, SINK))
            assert error.value.argument == "sink"
        with pytest.raises(ArgumentError, match="memory of its own") as error:
            torch.func.grad(lambda q: runtime.flash_attn(q, k, v).sum())(q)
        assert (error.value.argument, error.value.reason) == ("q", "storage")
        runtime.flash_attn(q, k, v)


def test_a_registry_without_the_backward_serves_the_forward(backend: FakeBackend, registry: Path):
    runtime.configure(registry=registry)
    out = runtime.flash_attn(*leaves(*inputs()))
    with pytest.raises(NoKernelError, match="no bwd kernel on sm_120") as error:
        out.sum().backward()
    assert error.value.reason == "row" and "kernels/bwd/" in str(error.value)
    assert "varlen_k=0" in str(error.value) and "total_k=14" in str(error.value)


def test_a_load_while_capturing_is_refused(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    out = runtime.flash_attn(q, k, v)
    backend.capturing = True
    with pytest.raises(CaptureError, match="not loaded yet"):
        out.sum().backward(retain_graph=True)
    backend.capturing = False
    out.sum().backward(retain_graph=True)
    backend.capturing = True
    out.sum().backward()
    assert len(backend.driver.launched("fwd")) == 1
    for op in KERNELS:
        assert len(backend.driver.launched(op)) == 2, op


def test_a_failed_launch_is_an_error(backend: FakeBackend):
    out = runtime.flash_attn(*leaves(*inputs()))
    backend.driver.status = 700
    with pytest.raises(DriverError) as error:
        out.sum().backward()
    assert error.value.status == 700


def test_an_abi_from_the_future_is_refused(backend: FakeBackend, tmp_path: Path, monkeypatch):
    for n, op in enumerate(backward_kernels.KERNELS):
        abi = ABIS[op]
        with monkeypatch.context() as patch:
            patch.setitem(backward_kernels.ABIS, op, abi.replace(params=(*abi.params, Param("dropout", "f32"))))
            backward_kernels.write_backward_registry(tmp_path / f"{n}.db")
        runtime.configure(registry=tmp_path / f"{n}.db")
        out = runtime.flash_attn(*leaves(*inputs()))
        with pytest.raises(IntegrityError, match="dropout, unknown here"):
            out.sum().backward()


def test_tensors_that_hooks_misplace_are_refused(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    for pack, reason in (
        (lambda t: t.clone(), None),
        (lambda t: t.mT.contiguous().mT, "contiguity"),
        (lambda t: torch.zeros(t.numel() + 8, dtype=t.dtype)[4:-4].view(t.shape), "alignment"),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = runtime.flash_attn(q, k, v)
        if reason is None:
            out.sum().backward()
            continue
        with pytest.raises(ArgumentError) as error:
            out.sum().backward()
        assert (error.value.argument, error.value.reason) == ("q", reason)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda t: t[:, :3] if t.dim() == 4 and t.shape[2] == 2 else t, "shape"),
    (lambda t: t.half() if t.dtype == torch.bfloat16 and t.dim() == 4 and t.shape[2] == 2 else t, "dtype"),
    (lambda t: t[0] if t.dim() == 4 and t.shape[2] == 2 else t, "rank"),
    (lambda t: t.bfloat16() if t.dtype == torch.float32 else t, "dtype"),
], ids=["shorter k", "other dtype", "other rank", "lower LSE"])  # fmt: skip
def test_hooks_of_saved_tensors_must_keep_what_the_kernels_rely_on(
    backend: FakeBackend, backward_registry, change, reason
):
    q, k, v = (torch.randn(1, 7, heads, 64).bfloat16().requires_grad_() for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
        out = runtime.flash_attn(q, k, v)
    with pytest.raises(ArgumentError) as error:
        out.sum().backward()
    assert error.value.reason == reason
    assert not backend.driver.launched("bwd")
