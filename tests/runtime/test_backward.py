"""Gradients on the CPU: fake kernels compute from a kernel's own parameters, compared with torch's autograd in fp64."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import runtime
from runtime import fa4
from runtime.call import splits
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, inputs
from tests.support.backward import SINK, Side, assert_close, attention64, check, grads, leaves
from tests.support.varlen import ints

pytestmark = pytest.mark.usefixtures("backward_registry")

SLOPES = torch.tensor([0.5, 0.1, 0.0, 2.0])


@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"softmax_scale": 0.3}, {"window": (2, 1)}, {"window": (3, None), "causal": True},
    {"softcap": 0.7}, {"softcap": 3.0, "softmax_scale": 1.5, "causal": True},
    {"sink": SINK}, {"sink": SINK.to(BF16), "window": (1, 1)}, {"alibi_slopes": SLOPES, "softcap": 2.0},
    {"alibi_slopes": torch.rand(2, 4), "causal": True}, {"alibi_slopes": torch.rand(2, 4), "sink": SINK, "softcap": 2},
], ids=lambda options: " ".join(options) or "none")  # fmt: skip
@pytest.mark.parametrize("seqlens", [(5, 7), (70, 140)], ids=str)
def test_gradients(backend: FakeBackend, options, seqlens):
    check(*inputs(seqlen_q=seqlens[0], seqlen_k=seqlens[1]), **options)


@pytest.mark.parametrize("shape", [
    {"heads_q": 4, "heads_kv": 4}, {"heads_q": 6, "heads_kv": 1}, {"dtype": torch.float16}, {"head_dim": 128},
    {"head_dim": 72, "head_dim_v": 40}, {"head_dim": 40, "head_dim_v": 128}, {"batch": 1, "seqlen_q": 130},
], ids=str)  # fmt: skip
def test_shapes(backend: FakeBackend, shape):
    check(*inputs(**{"seqlen_k": 135} | shape))


def test_group_splits_are_summed_up(backend: FakeBackend):
    for resident, wanted in (((1, 1), 1), ((16, 1), 4), ((132, 1), 8)):
        runtime.configure(registry=runtime.load.session.current().config.registry)
        backend.driver.resident = resident
        check(*inputs(seqlen_q=70, seqlen_k=70, heads_q=32, heads_kv=4, batch=1), causal=True)
        assert backend.driver.launched("bwd")[-1]["params"]["splits"] == wanted
        sums = backend.driver.launched("bwd_sum")
        assert [made["params"]["splits"] for made in sums] == [n for n in (4, 8) if n <= wanted]


def test_strided_inputs_and_gradients(backend: FakeBackend):
    packed = torch.randn(2, 6, 3, 2, 64).to(BF16)
    whole, exact = packed.clone().requires_grad_(), packed.double().requires_grad_()
    out = runtime.flash_attn(whole[:, :, 0], whole[:, :, 1], whole[:, :, 2], causal=True)
    want, _ = attention64(exact[:, :, 0], exact[:, :, 1], exact[:, :, 2], causal=True)
    dout = torch.randn(2, 2, 6, 64).to(BF16).transpose(1, 2)
    out.backward(dout)
    want.backward(dout.double())
    assert_close([whole.grad], [exact.grad])
    (pre, *_) = (made["params"] for made in backend.driver.launches[1:])
    assert pre["dout"] == dout.data_ptr() and (pre["dout_stride_s"], pre["dout_stride_h"]) == (64, 6 * 64)


def shifted(dout):
    """The same values, 8 bytes off."""
    return torch.zeros(dout.numel() + 8, dtype=dout.dtype)[4:-4].view(dout.shape).copy_(dout)


@pytest.mark.parametrize("of", [
    lambda dout: dout[..., :1].expand(dout.shape), lambda dout: dout[:, :1].expand(dout.shape), shifted,
    lambda dout: torch.stack((dout, dout), 4)[..., 0], lambda dout: torch.cat((dout, dout[..., :4]), 3)[..., :-4],
    lambda dout: torch._neg_view(dout),
], ids=["expanded", "tokens", "misaligned", "interleaved", "odd", "negated"])  # fmt: skip
def test_what_the_kernels_cannot_read_of_dout_is_copied(backend: FakeBackend, of):
    q, k, v = inputs()
    dout = of(torch.randn(q.shape).to(BF16))
    for _ in range(2):  # first and warm
        given, exact = leaves(q, k, v), leaves(q, k, v, dtype=torch.float64)
        runtime.flash_attn(*given).backward(dout)
        attention64(*exact)[0].backward(dout.double())
        assert_close(grads(given), grads(exact))
        p = backend.driver.launched("bwd")[-1]["params"]
        assert p["dout"] != dout.data_ptr() and (p["dout_stride_s"], p["dout_stride_h"]) == (256, 64)


def test_either_output_may_have_no_gradient(backend: FakeBackend):
    q, k, v = inputs()
    given, exact = leaves(q, k, v), leaves(q, k, v, dtype=torch.float64)
    runtime.flash_attn(*given, return_lse=True)[1].sum().backward()  # an expanded gradient
    p = backend.driver.launches[1]["params"]
    assert p["dlse"] and (p["dlse_stride_b"], p["dlse_stride_s"], p["dlse_stride_h"]) == (0, 0, 0)
    attention64(*exact)[1].sum().backward()
    assert not given[2].grad.any()
    exact[2].grad = torch.zeros_like(exact[2])
    assert_close(grads(given), grads(exact))
    given, exact = leaves(q, k, v), leaves(q, k, v, dtype=torch.float64)
    runtime.flash_attn(*given, return_lse=True)[0].sum().backward()
    attention64(*exact)[0].sum().backward()
    assert_close(grads(given), grads(exact))


@pytest.mark.parametrize(("packed_q", "packed_k", "used"), [
    (True, True, False), (True, True, True), (False, True, False), (True, False, True), (False, False, True),
])  # fmt: skip
@pytest.mark.parametrize("resident", [(1, 1), (132, 1)], ids=str)
def test_sequences_of_different_lengths(backend: FakeBackend, packed_q, packed_k, used, resident):
    """Each as if alone; what belongs to none gets zeros. Twice, with other totals."""
    backend.driver.resident = resident
    torch.manual_seed(1)
    for lengths in (((5, 0, 140, 3), (9, 70, 150, 4)), ((1, 130, 2, 7), (3, 131, 2, 64))):
        of_q, of_k = Side(lengths[0], packed_q, used), Side(lengths[1], packed_k, used)
        slopes, sink = leaves(torch.rand(4, 4), SINK)
        given = [of_q.tensor(4), of_k.tensor(2), of_k.tensor(2), sink, slopes]
        out, lse = runtime.flash_attn_varlen(
            *given[:3], cu_seqlens_q=of_q.ends, cu_seqlens_k=of_k.ends, seqused_q=of_q.seqused, seqused_k=of_k.seqused,
            sink=sink, alibi_slopes=slopes, return_lse=True,
        )  # fmt: skip
        dout, dlse = torch.randn(out.shape).to(BF16), torch.randn(lse.shape)
        torch.autograd.backward((out, lse), (dout, dlse))
        exact = leaves(*given, dtype=torch.float64)
        for b in range(4):
            if of_q.alive[b]:
                q, k, v = (side.entry(b, t) for side, t in zip((of_q, of_k, of_k), exact, strict=False))
                want = attention64(q, k, v, sink=exact[3], alibi_slopes=exact[4][b : b + 1])
                by_row = of_q.entry(b, dlse.transpose(-1, -2)).transpose(1, 2)
                torch.autograd.backward(want, (of_q.entry(b, dout).double(), by_row.double()))
        assert_close(grads(given), grads(exact))
        for found, want in zip(given[:3], exact, strict=False):
            assert not found.grad[(want.grad == 0).all(-1)].any()


def test_queries_that_see_nothing_get_zeros(backend: FakeBackend):
    q, k, v = inputs(seqlen_q=9, seqlen_k=5)
    given, exact = leaves(q, k, v), leaves(q[:, 4:], k, v, dtype=torch.float64)
    out = runtime.flash_attn(*given, causal=True)
    dout = torch.randn(out.shape).to(BF16)
    out.backward(dout)
    attention64(*exact, causal=True)[0].backward(dout[:, 4:].double())
    assert not given[0].grad[:, :4].any()
    assert_close([given[0].grad[:, 4:], *grads(given[1:])], grads(exact))


@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads_q": 0, "heads_kv": 0}])
def test_empty_problems_launch_no_backward(backend: FakeBackend, empty):
    given = leaves(*inputs(**empty), torch.rand(inputs(**empty)[0].shape[0], inputs(**empty)[0].shape[2]))
    out = runtime.flash_attn(*given[:3], alibi_slopes=given[3])
    out.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in given)
    assert not any(made["variant"].startswith("bwd") for made in backend.driver.launches)


def test_without_keys_a_sink_is_all_that_the_lse_has(backend: FakeBackend):
    q, k, v = inputs(seqlen_k=0)
    given = leaves(q, k, v, SINK)
    out, lse = runtime.flash_attn(*given[:3], sink=given[3], return_lse=True)
    dlse = torch.randn(lse.shape)
    torch.autograd.backward((out, lse), (torch.randn(out.shape).to(BF16), dlse))
    torch.testing.assert_close(given[3].grad, dlse.sum((0, 2)))
    assert not given[0].grad.any() and given[1].grad.shape == k.shape


def test_workspaces_may_hold_anything(backend: FakeBackend, monkeypatch):
    """torch fills new memory with NaN in this mode."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        check(*inputs(seqlen_q=140, seqlen_k=70), sink=SINK, alibi_slopes=torch.rand(2, 4))
        backend.driver.resident = (132, 1)
        check(*inputs(seqlen_q=139, seqlen_k=71), sink=SINK, alibi_slopes=torch.rand(2, 4))
        assert torch.empty(3).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(backend: FakeBackend, use_reentrant):
    given, again = leaves(*inputs(), SINK), leaves(*inputs(), SINK)

    def block(q, k, v, sink):
        out, lse = runtime.flash_attn(q, k, v, sink=sink, causal=True, return_lse=True)
        return out.float() * lse.sigmoid().transpose(1, 2)[..., None]

    block(*given).sum().backward()
    checkpoint(block, *again, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, again, strict=True))


def test_saved_tensors_may_come_back_with_other_strides(backend: FakeBackend):
    q, k, v = inputs(heads_q=8)
    slopes = torch.rand(2, 12)
    given, again = (leaves(q, k, v, slopes) for _ in range(2))

    def change(t):
        """A strided LSE, and contiguous others."""
        lse = t.dtype == torch.float32 and t.dim() == 3
        return t.mT.contiguous().mT if lse else t.clone(memory_format=torch.contiguous_format)

    for tensors, pack in ((given, lambda t: t), (again, change)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            q, k, v, slopes = tensors
            runtime.flash_attn(q[:, :, ::2], k, v, alibi_slopes=slopes[:, 4:8]).float().square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, again, strict=True))
    assert [m["params"]["alibi_stride_b"] for m in backend.driver.launched("bwd")] == [12, 4]


def test_threads_have_plans_of_their_own(backend: FakeBackend):
    given = [leaves(*inputs(seed=i)) for i in range(6)]
    outputs = [runtime.flash_attn(*tensors, causal=True).float().square().sum() for tensors in given]
    start = threading.Barrier(6)

    def backward(output):
        start.wait()
        output.backward()

    threads = [threading.Thread(target=backward, args=(output,)) for output in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tensors in given:
        again = leaves(*tensors)
        runtime.flash_attn(*again, causal=True).float().square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, again, strict=True))


def test_drop_ins_are_differentiable(backend: FakeBackend):
    q, k, v = inputs(seqlen_k=5)
    wanted = leaves(q, k, v)
    runtime.flash_attn(*wanted, causal=True).sum().backward()
    ends = ints(0, 5, 10)
    for call in (
        lambda q, k, v: runtime.flash_attn_func(q, k, v, causal=True, deterministic=True),
        lambda q, k, v: runtime.flash_attn_func(q, k, v, causal=True, pack_gqa=True, deterministic=True),
        lambda q, k, v: fa4.flash_attn_func(q, k, v, causal=True, deterministic=True)[0],
        lambda q, k, v: runtime.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, 5, 5, causal=True, deterministic=True),
        lambda q, k, v: fa4.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=ends, cu_seqlens_k=ends, causal=True,
            deterministic=True)[0],
    ):  # fmt: skip
        given = leaves(q, k, v)
        call(*given).sum().backward()
        assert_close(grads(given), grads(wanted))
        assert backend.driver.launched("bwd")[-1]["params"]["semaphores"]


def test_the_splits_of_a_group():
    assert splits.group_splits(10, 8, 10, 1) == 1
    assert splits.group_splits(10, 8, 10, 2) == 2
    assert splits.group_splits(10, 6, 41, 1) == 3  # 6 would run in two waves
    assert splits.group_splits(10, 6, 25, 1) == 2
    assert splits.group_splits(128, 4, 132, 1) == 1  # nearly full already
    assert splits.group_splits(128, 4, 132, 1, causal=True) == 2  # but half of it is idle half of the time
    assert splits.group_splits(512, 4, 132, 1, causal=True) == 1
    assert splits.group_splits(0, 8, 132, 2, causal=True) == 1
    assert splits.group_splits(1, 8, 132, 2) == 8
    assert splits.group_splits(0, 8, 132, 2) == splits.group_splits(5, 1, 132, 2) == 1
