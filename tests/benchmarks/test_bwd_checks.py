"""The checks of gradients themselves, on the CPU and in small: the right pass, every planted fault is caught."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import bwd_yardstick, calls, checks, ledger, yardstick
from tests.gpu.bwd_stand_in import BwdStand
from tests.gpu.inputs import values
from tests.gpu.sanitize import TOOLS
from tests.support.call import FAMILIES, Call
from tests.support.threads import graphs, one_thread

__all__ = ["graphs", "one_thread"]  # fixtures

BWD, BWD_NARROW = "bwd-bf16-d64-dv64-m64-n64-w4-s1", "bwd-fp16-d64-dv40-m64-n64-w4-s1"
PRE, POST = "bwd_preprocess-bf16-d256-dv256-m128", "bwd_postprocess-fp16-d256-dv256-m128"
SUM = "bwd_sum-bf16-d256-dv256-m8"
CAUGHT = [
    (BWD, "dQ's fragments scrambled", "lengths"),
    (BWD, "scale missing on dK", "lengths"),
    (BWD, "scale 0.5 % off", "lengths"),
    (BWD, "P in 4 bits", "lengths"),
    (BWD, "heads mapped wrongly", "lengths"),
    (BWD, "the last ragged tile missing", "lengths"),
    (BWD, "the last ragged keys missing", "lengths"),
    (BWD, "a row not written", "lengths"),
    (BWD, "causal ignored", "masks"),
    (BWD, "window one too wide", "masks"),
    (BWD, "the second half's mask shifted", "masks"),
    (BWD, "one head of the group", "gqa"),
    (BWD, "dV of the wrong head", "gqa"),
    (BWD, "dK off by the padding", "gqa"),
    (BWD, "statistics off by the padding", "varlen"),
    (BWD, "seqused_k ignored", "varlen"),
    (BWD, "rows behind the last entry written", "varlen_many"),
    (BWD, "delta without dLSE", "scores"),
    (BWD, "softcap's derivative missing", "scores"),
    (BWD, "the slopes' sign", "scores"),
    (BWD, "slopes of the first entry", "scores"),
    (BWD, "a row missing from the sink's", "scores"),
    (BWD, "columns beyond head_dim", "head_dims"),
    (BWD, "strides ignored", "strides"),
    (BWD, "strides of dout ignored", "strides"),
    (BWD, "an expanded dout refused", "strides"),
    (BWD, "empty rows are NaN", "empty"),
    (BWD, "a split's part missing", "splits"),
    (BWD, "dV of the wrong head", "drawn"),
    (BWD, "not deterministic", "determinism"),
    (BWD, "32-bit offsets", "large"),
    (BWD, "32-bit workspaces", "large"),
    (BWD, "a graph keeps the lengths", "graph_capture"),
    (BWD, "a cold capture", "graph_capture"),
    (BWD, "the last forward's state", "streams"),
    (BWD, "the last forward's state", "autograd"),
    (BWD, "some inputs alone get nothing", "autograd"),
    (BWD, "a missing dout is not 0", "autograd"),
    (BWD, "leftpad ignored in the backward", "leftpad"),
    (BWD, "gradients of the padding are not 0", "leftpad"),
    (BWD, "heads · heads_kv in 32 bits", "largest"),
    (BWD, "32-bit rows of the accumulator", "largest"),
    (BWD, "entries in 16 bits", "largest"),
    (PRE, "delta without dLSE", "scores"),
    (PRE, "statistics off by the padding", "varlen"),
    (PRE, "statistics off by the padding", "varlen_many"),
    (PRE, "columns beyond head_dim", "head_dims"),
    (PRE, "strides of dout ignored", "strides"),
    (PRE, "empty rows are NaN", "empty"),
    (PRE, "columns beyond head_dim", "drawn"),
    (PRE, "not deterministic", "determinism"),
    (PRE, "32-bit offsets", "large"),
    (PRE, "a graph keeps the lengths", "graph_capture"),
    (PRE, "statistics of the first heads", "largest"),
    (SUM, "a split's part missing", "splits"),
    (SUM, "a split's part missing", "largest"),
    (SUM, "rows behind the last entry written", "varlen"),
    (SUM, "a row not written", "head_dims"),
    (SUM, "a row not written", "drawn"),
    (SUM, "not deterministic", "determinism"),
    (SUM, "a cold capture", "graph_capture"),
    (POST, "dQ's fragments scrambled", "lengths"),
    (POST, "dQ's fragments scrambled", "gqa"),
    (POST, "dQ's fragments scrambled", "varlen"),
    (POST, "dQ's fragments scrambled", "varlen_many"),
    (POST, "columns beyond head_dim", "head_dims"),
    (POST, "empty rows are NaN", "empty"),
    (POST, "dQ's fragments scrambled", "drawn"),
    (POST, "not deterministic", "determinism"),
    (POST, "32-bit workspaces", "large"),
    (POST, "32-bit rows of the accumulator", "largest"),
    (POST, "a cold capture", "graph_capture"),
]
# What others fell into (facts/kernels.md), as far as it concerns a backward.
TRAPS = {
    "reader of the accumulator in another fragment order than its writer": "dQ's fragments scrambled",
    "GQA + varlen: dK and dV at padded offsets that differ between kernels": "dK off by the padding",
    "bitmask of columns with two N-warps": "the second half's mask shifted",
    "seqused treated as dense": "seqused_k ignored",
    "varlen reads past the end on over-launched tiles": "rows behind the last entry written",
    "head_dim > head_dim_v": "columns beyond head_dim",
    "fully masked rows": "empty rows are NaN",
}
OPS = ("bwd_preprocess", "bwd", "bwd_sum", "bwd_postprocess")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Head dims of the ops that serve all, where a check does not choose its own."""
    monkeypatch.setattr(calls, "ALL_DIMS", ((32, 32), (64, 24), (24, 40)))


def run(name, stand, key):
    stand.force(key)
    checks.OPS[key.split("-")[0]][name](stand, key, checks.TINY)


@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key in (BWD_NARROW, PRE, SUM, POST) for name in checks.OPS[key.split("-")[0]]]
)
def test_a_right_backward_passes(key, name):
    run(name, BwdStand(), key)


@pytest.mark.parametrize(("key", "fault", "name"), CAUGHT)
def test_a_planted_fault_is_caught(key, fault, name):
    with pytest.raises(AssertionError, match="failures:"):
        run(name, BwdStand(fault), key)


@pytest.mark.parametrize("op", OPS)
def test_every_check_can_fail_and_is_listed(op):
    named = list(checks.OPS[op])
    assert {name for key, _, name in CAUGHT if key.split("-")[0] == op} == set(named)
    assert ledger.CONFORMANCE["ops"][op] == [*named, *TOOLS]


def test_every_trap_has_a_fault_that_is_caught():
    assert set(TRAPS.values()) <= {fault for _, fault, _ in CAUGHT}


# ---- the yardstick ----


def inputs(dtype="bf16", family="normal", sizes=(40, 53, 4, 2, 2, 32, 24)):
    """(q, k, v, dout, dlse) of a family."""
    call = Call(*sizes, dtype, family=family, seed=3)
    tensors = values(call, "cpu")
    generator = torch.Generator().manual_seed(4)
    dout = torch.randn(call.sizes["o"], generator=generator).to(tensors["q"].dtype)
    return (*tensors.values(), dout, torch.randn((call.batch, call.heads_q, call.seqlen_q), generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_that_of_autograd(family):
    q, k, v, dout, dlse = inputs(family=family)
    sink, slopes = torch.randn(4) - (60 if family == "far_below" else 0), torch.rand(2, 4)
    lengths_q, lengths_k = torch.tensor([40, 30]), torch.tensor([53, 20])
    dout[1, 30:], dlse[1, :, 30:] = 0, 0
    rule = yardstick.Rule(0.2, (None, 3), 90.0, sink, slopes, lengths_q, lengths_k)
    right = bwd_yardstick.expected(q, k, v, dout, rule, dlse)
    leaves = [x.double().requires_grad_() for x in (q, k, v, sink, slopes)]
    qs, ks, vs = (x.transpose(1, 2) for x in leaves[:3])
    i = torch.arange(40)[:, None] + (lengths_k - lengths_q)[:, None, None]
    j = torch.arange(53)
    scores = 90 * torch.tanh(qs @ ks.repeat_interleave(2, 1).mT * 0.2 / 90)
    scores = scores - leaves[4][..., None, None] * (i - j).abs()[:, None]
    scores = scores.masked_fill(~((j - i <= 3) & (j < lengths_k[:, None, None]))[:, None], -1e300)
    lse = torch.logaddexp(scores.logsumexp(-1), leaves[3][:, None])
    out = ((scores - lse[..., None]).exp() @ vs.repeat_interleave(2, 1)).transpose(1, 2)
    found = torch.autograd.grad([out, lse], leaves, [dout.double(), dlse.double()])
    for (name, gradient), wanted in zip(right.items(), found, strict=True):
        dtype = torch.float32 if name in ("sink", "slopes") else torch.bfloat16
        got, wanted = gradient.ref.to(dtype), wanted.reshape(gradient.ref.shape).to(dtype)
        assert torch.equal(got, wanted) or (got - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_is_allowed_is_what_pytorch_achieves(dtype):
    """Its own backward, in the low precision, passes as to the largest error, and nothing a third further off."""
    q, k, v, dout, _ = inputs(dtype, sizes=(64, 96, 4, 4, 4, 64, 64))
    right = bwd_yardstick.expected(q, k, v, dout, yardstick.Rule(0.125))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    scores = (leaves[0].transpose(1, 2) * 0.125) @ leaves[1].transpose(1, 2).mT
    out = (scores.softmax(-1) @ leaves[2].transpose(1, 2)).transpose(1, 2)
    found = dict(zip("qkv", torch.autograd.grad(out, leaves, dout), strict=True))
    for name, got in found.items():
        error = (got.double() - right[name].ref).abs().max()
        assert 0.2 * right[name].max_error.max() < error < right[name].max_error.min()
        assert all(text.startswith(f"d{name}: RMS") for text in bwd_yardstick.problems(name, got, right[name]))


def test_rms_sees_what_the_maximum_lets_pass():
    q, k, v, dout, _ = inputs(sizes=(64, 96, 4, 4, 4, 64, 64))
    right = bwd_yardstick.expected(q, k, v, dout, yardstick.Rule(0.125))
    for name, gradient in right.items():
        ((text,),) = [bwd_yardstick.problems(name, (gradient.ref * 1.01).to(q.dtype), gradient)]
        assert text.startswith(f"d{name}: RMS")
        nothing = bwd_yardstick.problems(name, gradient.ref * torch.nan, gradient)
        assert len(nothing) == 2


@pytest.mark.parametrize("window", [(None, None), (None, 0), (2, 1), (0, 0), (0, None)])
@pytest.mark.parametrize("sink", [None, torch.zeros(1)])
def test_rows_that_see_two_columns_are_telling(window, sink):
    counted, lengths_k = torch.arange(9) < torch.tensor([[9], [4], [0], [6]]), torch.tensor([3, 12, 5, 0])
    rule = yardstick.Rule(1.0, window, sink=sink, lengths_k=lengths_k)
    distance = yardstick.distances(9, 12, lengths_k - counted.sum(1))
    allowed = yardstick.allowed(distance, window)
    seen = torch.ones_like(distance, dtype=torch.bool) if allowed is None else allowed
    columns = (seen & (torch.arange(12) < lengths_k[:, None, None])).sum(2) + (sink is not None)
    found = bwd_yardstick._telling(counted, torch.zeros(4, 12, 1, 8), rule)
    assert torch.equal(found, counted & (columns >= 2))


def test_a_gradient_of_few_telling_rows_is_not_judged_by_its_rms():
    """Of 150 rows, the last alone sees a key."""
    q, k, v, dout, _ = inputs(sizes=(150, 1, 6, 1, 1, 256, 256))
    causal = (None, 0)
    for sink, judged in ((None, True), (torch.zeros(6), False)):
        right = bwd_yardstick.expected(q, k, v, dout, yardstick.Rule(0.0625, causal, sink=sink))
        assert bool(right["q"].rms_error.isfinite().all()) == judged


def test_the_reference_is_the_same_in_chunks(monkeypatch):
    q, k, v, dout, dlse = inputs("fp16", "times4")
    rule = yardstick.Rule(0.1, (5, 2), 20.0, torch.rand(4), torch.rand(4))
    whole = bwd_yardstick.expected(q, k, v, dout, rule, dlse)
    monkeypatch.setattr(bwd_yardstick, "CHUNK", 4 * 40 * 53 // 2)
    parts = bwd_yardstick.expected(q, k, v, dout, rule, dlse)
    for name in whole:
        torch.testing.assert_close(whole[name].ref, parts[name].ref, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(whole[name].max_error, parts[name].max_error, rtol=0.3, atol=0)
