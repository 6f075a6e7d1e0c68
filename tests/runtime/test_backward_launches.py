"""The backward's launches: exact parameters, workspaces, plans, refusals."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch

import runtime
from registry.contract import WINDOW_OPEN
from runtime.call import launch, plan
from runtime.errors import ArgumentError
from runtime.load import plans, session
from tests.runtime.fakes import FakeBackend
from tests.support.abis import ABIS
from tests.support.attention import BF16, inputs
from tests.support.backward import SINK, assert_close, check, grads, leaves
from tests.support.varlen import ints

LOG2E = math.log2(math.e)


@pytest.fixture(autouse=True)
def launches(backend: FakeBackend, backward_registry: Path):
    """What was launched of the backward."""
    return lambda: [m for m in backend.driver.launches if m["variant"].startswith("bwd")]


def backward_of(*tensors, dlse=None, **options):
    """The gradients' leaves, out, its gradient and the LSE's."""
    given = leaves(*tensors)
    out, lse = runtime.flash_attn(*given, return_lse=True, **options)
    dout = torch.randn(out.shape).to(out.dtype)
    torch.autograd.backward((out, lse) if dlse is not None else out, (dout, dlse) if dlse is not None else dout)
    return given, out, dout


def test_every_parameter_of_each_launch(backend: FakeBackend, launches):
    backend.driver.resident = (2, 2)
    q, k, v = inputs(batch=2, seqlen_q=200, seqlen_k=70, heads_q=4, heads_kv=2, head_dim_v=40)
    dlse = torch.randn(2, 200, 9).transpose(1, 2)[:, 1:8:2]
    given, out, dout = backward_of(q, k, v, dlse=dlse, causal=True, softmax_scale=0.5, window=(3, 9))
    pre, main, post = launches()
    assert [m["variant"] for m in (pre, main, post)] == [
        "bwd_preprocess-bf16-d256-dv256-m128",
        "bwd-bf16-d64-dv64-m64-n64-w4-s1",
        "bwd_postprocess-bf16-d256-dv256-m128",
    ]
    assert [m["grid"] for m in (pre, main, post)] == [(2 * 4 * 2, 1, 1), (2 * 2 * 2, 1, 1), (2 * 4 * 2, 1, 1)]
    assert all(m["block"] == (128, 1, 1) and m["stream"] == 0x5EA for m in (pre, main, post))
    a, b, c = (dict(m["params"]) for m in (pre, main, post))
    base, n = a["dq_accum"], 4 * 512  # heads · rows
    assert (a["lse_log2"], a["delta"]) == (base + 4 * n * 64, base + 4 * n * 65)
    assert a == {
        "o": out.data_ptr(), "dout": dout.data_ptr(), "lse": a["lse"], "dlse": dlse.data_ptr(), "dq_accum": base,
        "lse_log2": a["lse_log2"], "delta": a["delta"], "semaphores": 0, "cu_seqlens_q": 0, "seqused_q": 0,
        "o_stride_b": 200 * 160, "o_stride_s": 160, "o_stride_h": 40,
        "dout_stride_b": 200 * 160, "dout_stride_s": 160, "dout_stride_h": 40,
        "lse_stride_b": 800, "lse_stride_h": 200, "dlse_stride_b": 1800, "dlse_stride_s": 9, "dlse_stride_h": 2,
        "rows": 512, "batch": 2, "heads_q": 4, "seqlen_q": 200, "head_dim_v": 40, "head_dim_accum": 64,
    }  # fmt: skip
    assert a["lse"] and list(a) == [p.name for p in ABIS["bwd_preprocess"].params]
    single = {name: b.pop(name) for name in ("scale_log2", "softcap_scale", "slope_scale", "softmax_scale")}
    assert list(single.values()) == [pytest.approx(0.5 * LOG2E), 0, 2, 0.5]
    assert b == {
        "q": given[0].data_ptr(), "k": given[1].data_ptr(), "v": given[2].data_ptr(), "dout": dout.data_ptr(),
        "lse_log2": a["lse_log2"], "delta": a["delta"], "dq_accum": base, "dk": given[1].grad.data_ptr(),
        "dv": given[2].grad.data_ptr(), "dk_partial": 0, "dv_partial": 0, "cu_seqlens_q": 0, "cu_seqlens_k": 0,
        "seqused_q": 0, "seqused_k": 0, "leftpad_k": 0, "alibi_slopes": 0, "dalibi": 0, "semaphores": 0,
        "q_stride_b": 200 * 256, "q_stride_s": 256, "q_stride_h": 64,
        "k_stride_b": 70 * 128, "k_stride_s": 128, "k_stride_h": 64,
        "v_stride_b": 70 * 80, "v_stride_s": 80, "v_stride_h": 40,
        "dout_stride_b": 200 * 160, "dout_stride_s": 160, "dout_stride_h": 40,
        "dk_stride_b": 70 * 128, "dk_stride_s": 128, "dk_stride_h": 64,
        "dv_stride_b": 70 * 80, "dv_stride_s": 80, "dv_stride_h": 40,
        "dk_partial_stride_split": 0, "dv_partial_stride_split": 0, "rows": 512, "batch": 2, "heads_q": 4,
        "heads_kv": 2, "seqlen_q": 200, "seqlen_k": 70, "head_dim": 64, "head_dim_v": 40, "window_left": 3,
        "window_right": 0, "splits": 1, "alibi_stride_b": 0,
    }  # fmt: skip
    assert c == {
        "dq_accum": base, "dq": given[0].grad.data_ptr(), "cu_seqlens_q": 0, "seqused_q": 0, "dq_stride_b": 200 * 256,
        "dq_stride_s": 256, "dq_stride_h": 64, "rows": 512, "batch": 2, "heads_q": 4, "seqlen_q": 200, "head_dim": 64,
        "head_dim_accum": 64, "softmax_scale": 0.5,
    }  # fmt: skip


def test_parameters_of_scores(backend: FakeBackend, launches):
    q, k, v = inputs(heads_q=2, batch=1)
    slopes = torch.rand(1, 2)
    backward_of(q, k, v, softcap=20.0, softmax_scale=0.5, window=(None, 2), alibi_slopes=slopes)
    p = launches()[1]["params"]
    assert p["alibi_slopes"] == slopes.data_ptr() and p["dalibi"] == 0 and p["alibi_stride_b"] == 0
    assert (p["window_left"], p["window_right"]) == (WINDOW_OPEN, 2)
    assert p["scale_log2"] == pytest.approx(20 * LOG2E)
    assert p["softcap_scale"] == pytest.approx(2 * LOG2E * 0.5 / 20) and p["softmax_scale"] == 0.5
    assert p["slope_scale"] == pytest.approx(1 / 20)
    assert launches()[0]["params"]["dlse"] == 0


def test_group_splits_have_partial_sums(backend: FakeBackend, launches, monkeypatch):
    allocated, empty = [], torch.empty

    def filled(*shape, **how):
        """With NaN."""
        if how.get("dtype") is not torch.uint8:
            return empty(*shape, **how)
        allocated.append(empty(*shape, **how).fill_(0xFF))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty", filled)
    backend.driver.resident = (132, 2)
    q, k, v = inputs(batch=1, seqlen_q=5, seqlen_k=7, heads_q=12, heads_kv=2, head_dim_v=72)
    backward_of(q, k, v)
    pre, made, total, _ = launches()
    p = made["params"]
    assert p["splits"] == 6 and made["grid"] == (2 * 6, 1, 1) and not p["dk"] and not p["dv"]
    room = [-(-t.numel() // 64) * 64 for t in (k, v)]
    assert p["dv_partial"] - p["dk_partial"] == 4 * room[0]
    assert p["dk_partial_stride_split"] == p["dv_partial_stride_split"] == sum(room)
    rows = 4 * 12 * 128
    assert [space.numel() for space in allocated] == [rows * (128 + 1 + 1) + 6 * 4 * sum(room)]
    start = allocated[0].data_ptr()
    assert [p[name] - start for name in ("dq_accum", "lse_log2", "delta", "dk_partial")] == [
        0, 128 * rows, 129 * rows, 130 * rows]  # fmt: skip
    assert not pre["params"]["semaphores"]
    units = sum(-(-t.numel() // 256) for t in (k, v))
    assert total["grid"] == (-(-units // 8), 1, 1) and total["params"] == {
        "dk_partial": p["dk_partial"], "dv_partial": p["dv_partial"], "dk": total["params"]["dk"],
        "dv": total["params"]["dv"], "dk_partial_stride_split": sum(room), "dv_partial_stride_split": sum(room),
        "dk_elements": k.numel(), "dv_elements": v.numel(), "splits": 6,
    }  # fmt: skip
    given = leaves(q, k, v)
    runtime.flash_attn_varlen(*given, seqused_k=ints(3)).sum().backward()  # adds up rows that nothing else writes
    assert len(allocated) == 2 and allocated[1].numel() == allocated[0].numel()
    for grad in grads(given):
        assert grad.isfinite().all()
    assert all(not grad[:, 3:].any() and grad[:, :3].all() for grad in grads(given)[1:])


@pytest.mark.parametrize("how", ["argument", "torch"])
def test_deterministic_has_semaphores(backend: FakeBackend, launches, how):
    q, k, v = leaves(*inputs())
    try:
        out = runtime.flash_attn(q, k, v, deterministic=how == "argument")
        torch.use_deterministic_algorithms(how == "torch")
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (backend.driver.launched(op)[0]["params"] for op in ("bwd_preprocess", "bwd"))
    assert a["semaphores"] == b["semaphores"] == a["delta"] + 4 * 4 * 256
    runtime.flash_attn(q, k, v).sum().backward()
    assert backend.driver.launched("bwd")[-1]["params"]["semaphores"] == 0
    runtime.flash_attn_varlen(q, k, v, seqused_k=ints(3, 4), deterministic=1).sum().backward()
    assert backend.driver.launched("bwd")[-1]["params"]["semaphores"]


def test_deterministic_must_be_a_flag(backend: FakeBackend):
    q, k, v = inputs()
    for function in (runtime.flash_attn, runtime.flash_attn_varlen):
        for _ in range(2):
            with pytest.raises(ArgumentError) as error:
                function(q, k, v, deterministic="yes")
            assert (error.value.argument, error.value.reason) == ("deterministic", "type")
            function(q, k, v, deterministic=True)


def test_packed_arrays_in_the_parameters(backend: FakeBackend, launches):
    backend.driver.resident = (1, 1)
    q, k, v = leaves(torch.randn(300, 4, 64).to(BF16), *(torch.randn(150, 2, 64).to(BF16) for _ in range(2)))
    slopes = torch.rand(3, 4).requires_grad_()
    ends_q, ends_k, used = ints(0, 100, 130, 300), ints(0, 50, 50, 150), ints(90, 30, 170)
    out, lse = runtime.flash_attn_varlen(q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, seqused_q=used,
                                         seqused_k=used, alibi_slopes=slopes, return_lse=True)  # fmt: skip
    dlse = torch.randn(lse.shape)
    torch.autograd.backward((out, lse), (torch.ones_like(out), dlse))
    made = launches()
    a, b, c = (m["params"] for m in made)
    rows = (300 // 128 + 3) * 128
    assert [m["grid"][0] for m in made] == [4 * rows // 128, 2 * (150 // 64 + 3), 4 * rows // 128]
    assert a["rows"] == b["rows"] == c["rows"] == rows
    assert (a["lse_stride_b"], a["lse_stride_h"]) == (0, 300)
    assert (a["dlse_stride_b"], a["dlse_stride_s"], a["dlse_stride_h"]) == (0, 1, 300)
    assert (b["cu_seqlens_q"], b["cu_seqlens_k"]) == (ends_q.data_ptr(), ends_k.data_ptr())
    assert a["cu_seqlens_q"] == c["cu_seqlens_q"] == ends_q.data_ptr()
    assert [p["seqused_q"] for p in (a, b, c)] == [used.data_ptr()] * 3 == [b["seqused_k"]] * 3
    assert (b["seqlen_q"], b["seqlen_k"], b["alibi_stride_b"]) == (300, 150, 4) and b["dalibi"]
    assert not any(p[name] for p in (a, b, c) for name in p if name.endswith("stride_b") and name != "alibi_stride_b")


def test_new_totals_change_plans_in_place(backend: FakeBackend, launches, monkeypatch):
    def call(*lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        q, k, v = leaves(*(torch.randn(sum(lengths), heads, 64).to(BF16) for heads in (4, 2, 2)))
        out, lse = runtime.flash_attn_varlen(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=1000,
                                             return_lse=True)  # fmt: skip
        (out.float().sum() + lse.sum()).backward()
        return {op: backend.driver.launched(op)[-1]["grid"][0] for op in ("bwd_preprocess", "bwd", "bwd_postprocess")}

    backend.driver.resident = (16, 1)
    short = {"bwd_preprocess": 12, "bwd": 2 * 8, "bwd_postprocess": 12}
    assert call(100, 28) == short
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    kept = len(plans.plans.by_call)
    assert call(300, 100) == {"bwd_preprocess": 20, "bwd": 16, "bwd_postprocess": 20}
    assert backend.driver.launched("bwd")[-1]["params"]["rows"] == 5 * 128
    assert backend.driver.launched("bwd_postprocess")[-1]["params"]["seqlen_q"] == 400
    assert [made["params"]["splits"] for made in backend.driver.launched("bwd")] == [2, 1]
    assert call(100, 28) == short and len(plans.plans.by_call) == kept
    monkeypatch.setattr(session.Session, "kernel", None)
    assert call(28, 100) == short
    assert len(backend.driver.launched("bwd_sum")) == 3


def test_a_failure_while_plans_change_leaves_none_behind(backend: FakeBackend, launches, monkeypatch):
    backend.driver.resident = (1, 1)

    def call(n, given):
        return runtime.flash_attn_varlen(*given, cu_seqlens_q=ints(0, n), cu_seqlens_k=ints(0, n), max_seqlen_q=9).sum()

    of_5, of_500 = (leaves(*(torch.randn(n, heads, 64).to(BF16) for heads in (8, 1, 1))) for n in (5, 500))
    call(5, of_5).backward()
    first = grads(of_5)
    output = call(500, of_500)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "MAX_BLOCKS", 10)  # enough for `bwd`, whose plan comes first
        with pytest.raises(ArgumentError, match="32 blocks of bwd_preprocess"):
            output.backward(retain_graph=True)
    again = leaves(*of_5)
    call(5, again).backward()
    assert_close(grads(again), first)
    output.backward()
    assert launches()[-1]["params"]["seqlen_q"] == 500


def test_a_warm_backward_only_launches(backend: FakeBackend, launches, monkeypatch):
    given = leaves(*inputs(), SINK, torch.rand(2, 4))

    def call():
        runtime.flash_attn(*given[:3], sink=given[3], alibi_slopes=given[4], causal=True).sum().backward()

    call()
    calls = list(backend.driver.calls)
    for module, name in ((session, "current"), (plan, "prepare"), (launch, "Launch")):
        monkeypatch.setattr(module, name, None)
    ops = [made["variant"].split("-")[0] for made in launches()]
    assert ops == ["bwd_preprocess", "bwd", "bwd_sum", "bwd_postprocess"]
    call()
    assert backend.driver.calls == calls and [made["variant"].split("-")[0] for made in launches()] == 2 * ops


def heads_first(t):
    """The same values in memory as (batch, heads, seqlen, head_dim)."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def test_every_property_of_a_call_is_in_its_key(backend: FakeBackend, launches):
    """Each change must be served rightly, though the call before it differs in nothing else."""
    q, k, v = inputs(seqlen_q=4, seqlen_k=4, heads_q=4, heads_kv=4)
    slopes = torch.rand(2, 4)
    for options in ({}, {"causal": True}, {"softmax_scale": 0.9}, {"window": (1, None)}, {"softcap": 0.5}, {},
                    {"softcap": 0.6}, {"sink": SINK}, {"alibi_slopes": slopes}, {"alibi_slopes": slopes[0]},
                    {"alibi_slopes": torch.rand(2, 9)[:, 4:8]}, {}):  # fmt: skip
        check(q, k, v, **options)
    dout, dlse = torch.randn(q.shape).to(BF16), torch.randn(2, 4, 4)
    for gradients in ((dout, dlse), (heads_first(dout), dlse), (dout, dlse.mT.contiguous().mT),
                      (dout, dlse[..., :1].expand(2, 4, 4)), (dout, dlse)):  # fmt: skip
        check(q, k, v, gradients=gradients)
    check(heads_first(q), k, v)
    check(q, heads_first(k), v)
    check(q, k, heads_first(v))
    check(q, k[:, :, :2], v[:, :, :2])
    check(q, k, v[..., :32])
    check(q[:, :3], k, v)
    check(q, k[:, :3], v[:, :3])
    check(q.half(), k.half(), v.half())


@pytest.mark.parametrize("resident", [(1, 1), (132, 1)], ids=str)
@pytest.mark.parametrize(("wanted", "count"), [
    ("q", 3), ("k", 2), ("v", 2), ("sink", 1), ("alibi_slopes", 2), ("q sink", 3), ("v alibi_slopes", 2),
])  # fmt: skip
def test_only_what_is_needed(backend: FakeBackend, launches, wanted, count, resident):
    backend.driver.resident = resident
    ops = ["bwd_preprocess", "bwd", "bwd_postprocess"][:count]
    if count > 1 and resident != (1, 1):
        ops.insert(2, "bwd_sum")
    given = dict(zip(("q", "k", "v", "sink", "alibi_slopes"), (*inputs(), SINK, torch.rand(4)), strict=True))
    every = dict(zip(given, leaves(*given.values()), strict=True))
    runtime.flash_attn(**every).sum().backward()
    for name in wanted.split():
        given[name] = given[name].clone().requires_grad_()
    for _ in range(2):  # first and warm
        before = len(launches())
        out = runtime.flash_attn(**given)
        found = torch.autograd.grad(out.sum(), [given[name] for name in wanted.split()])
        assert [m["variant"].split("-")[0] for m in launches()[before:]] == ops
        for name, grad in zip(wanted.split(), found, strict=True):
            assert torch.equal(grad, every[name].grad), name
    for made in backend.driver.launched("bwd")[-1:] if count > 1 else ():
        assert bool(made["params"]["dalibi"]) == ("alibi_slopes" in wanted)


def test_without_grad_nothing_changes(backend: FakeBackend, launches):
    q, k, v = inputs()
    sink = SINK.clone().requires_grad_()
    want = runtime.flash_attn(q, k, v, sink=SINK)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = runtime.flash_attn(q.requires_grad_(), k, v, sink=sink)
            assert torch.equal(out, want) and not out.requires_grad
            runtime.flash_attn(q, k, v, sink=sink, out=torch.empty_like(q))
    assert runtime.flash_attn(q, k, v, sink=SINK).requires_grad
    assert runtime.flash_attn(q.detach(), k, v, sink=sink).requires_grad
    assert not runtime.flash_attn(q.detach(), k, v, sink=SINK).requires_grad
    assert not launches()


def test_both_outputs_are_differentiable(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    out, lse = runtime.flash_attn(q, k, v, return_lse=True)
    assert out.requires_grad and lse.requires_grad and out.grad_fn is lse.grad_fn
    assert runtime.flash_attn(q, k, v).requires_grad
    (out * 2).sum().backward(retain_graph=True)
    first = q.grad.clone()
    (out * 2).sum().backward()  # and once more over the same graph
    torch.testing.assert_close(q.grad, 2 * first)


def test_another_device_than_the_current_one_is_guarded(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    runtime.flash_attn(q, k, v).sum().backward()
    out = runtime.flash_attn(q, k, v)
    backend.guarded.clear()
    backend.current = 3
    out.sum().backward()
    assert backend.guarded == [-1] and backend.current == 3


def test_each_thread_makes_its_plans_once_and_configure_drops_them(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    made = []

    def backward_twice():
        for _ in range(2):
            runtime.flash_attn(q, k, v).sum().backward()
            made.append([id(ready) for key, ready in plans.plans.by_call.items() if key[0] == "bwd"])

    for _ in range(2):
        thread = threading.Thread(target=backward_twice)
        thread.start()
        thread.join()
    assert len(made) == 4 and all(len(ids) == 1 for ids in made) and made[0] == made[1] and made[2] == made[3]
    backward_twice()
    runtime.configure()
    assert not plans.plans.by_call
