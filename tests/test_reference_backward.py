"""The gradients against torch's autograd in float64, and the yardstick against near misses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.reference import Scores, attention, rounded, visible, yardstick
from tests.reference_backward import FLOOR, Gradients, backward_reference, gradients, join_backward, row_sums

SLOPES = np.array([[0.5, 0.25, 0.1, -0.2], [1.0, -0.5, 0.0, 0.3]])
SCORES = {
    "full": Scores(0.3),
    "causal": Scores(0.3, (None, 0)),
    "window": Scores(0.3, (2, 1)),
    "softcap": Scores(0.3, (2, 1), softcap=0.7),
    "alibi": Scores(0.3, (None, 0), alibi=SLOPES[0]),
    "alibi-of-each-entry": Scores(0.3, alibi=SLOPES),
    "sink": Scores(0.3, sink=np.array([-1.0, 2.0, 0.0, 0.5])),
    "left-padding": Scores(0.3, (2, 1), alibi=SLOPES, leftpad=3),
    "all": Scores(0.3, (4, -3), 0.7, SLOPES, np.array([-1.0, 2.0, 0.5, 0.1])),  # row 0 sees no key
}


def arrays(seqlen_q=3, seqlen_k=5, heads_q=4, heads_kv=2, dim=8, dim_v=4, batch=2):
    """q, k, v, dout, dlse."""
    random = np.random.default_rng(1)
    of_q, of_k = (batch, seqlen_q, heads_q), (batch, seqlen_k, heads_kv)
    shapes = ((*of_q, dim), (*of_k, dim), (*of_k, dim_v), (*of_q, dim_v), (batch, heads_q, seqlen_q))
    return tuple(random.standard_normal(shape) for shape in shapes)


def autograd(q, k, v, scores, dout, dlse) -> Gradients:
    """The definition, differentiated by torch; slopes and a sink are there even where scores has none."""
    heads, batch = q.shape[2], len(q)
    slopes = np.zeros((batch, heads)) if scores.alibi is None else np.broadcast_to(scores.alibi, (batch, heads))
    sink = np.full(heads, -np.inf) if scores.sink is None else scores.sink
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v, sink, slopes)]
    q, k, v, sink, slopes = leaves
    keys, values = (x.repeat_interleave(heads // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    logits = q.transpose(1, 2) @ keys.transpose(-1, -2) * scores.scale
    if scores.softcap:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    i, j = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    left, right = (10**6 if side is None else side for side in scores.window)
    hidden = (j < i - left) | (j > i + right) | (j < scores.leftpad)
    logits = (logits - slopes[..., None, None] * (i - j).abs()).masked_fill(hidden, -torch.inf)
    seen = ~hidden.all(-1) | torch.isfinite(sink)[:, None]  # a row that sees nothing gets a logit to share with nobody
    extra = torch.where(seen, sink[:, None], 0).expand(batch, -1, -1)
    logits = torch.cat([logits, extra[..., None]], -1)
    out = (logits.softmax(-1)[..., :-1] @ values).transpose(1, 2)
    loss = (out * torch.tensor(dout)).sum() + (logits.logsumexp(-1) * torch.tensor(dlse)).sum()
    return Gradients(*(x.numpy() for x in torch.autograd.grad(loss, leaves)))


def test_left_padding_is_as_if_its_keys_were_not_there():
    """Which is how `tests.kernels` gives entries with padding to the reference."""
    q, k, v, dout, dlse = arrays(3, 5)
    padded = gradients(q, k, v, SCORES["left-padding"], dout, dlse)
    cut = gradients(q, k[:, 3:], v[:, 3:], replace(SCORES["left-padding"], leftpad=0), dout, dlse)
    for name in ("dq", "dsink", "dalibi"):
        np.testing.assert_allclose(getattr(padded, name), getattr(cut, name), atol=1e-14)
    for name in ("dk", "dv"):
        np.testing.assert_allclose(getattr(padded, name)[:, 3:], getattr(cut, name), atol=1e-14)
        assert not getattr(padded, name)[:, :3].any()


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (1, 1), (1, 7)], ids=str)
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_against_autograd(scores, lengths, heads_kv):
    *inputs, dout, dlse = arrays(*lengths, heads_kv=heads_kv)
    got, right = gradients(*inputs, scores, dout, dlse), autograd(*inputs, scores, dout, dlse)
    for name in ("dq", "dk", "dv", "dsink", "dalibi"):
        expected = np.nan_to_num(getattr(right, name))  # without a sink its gradient is NaN in torch
        np.testing.assert_allclose(getattr(got, name), expected, atol=1e-12, err_msg=name)


def test_without_a_gradient_of_the_lse():
    *inputs, dout, dlse = arrays()
    got, right = gradients(*inputs, SCORES["all"], dout), autograd(*inputs, SCORES["all"], dout, 0 * dlse)
    np.testing.assert_allclose(got.dq, right.dq, atol=1e-12)
    np.testing.assert_allclose(got.dsink, right.dsink, atol=1e-12)


def test_rows_that_see_no_key():
    *inputs, dout, dlse = arrays(9, 4)
    got = gradients(*inputs, Scores(0.3, (None, 0)), dout, dlse)
    assert not got.dq[:, :5].any() and got.dq[:, 6:].all()
    nothing = gradients(inputs[0], inputs[1][:, :0], inputs[2][:, :0], SCORES["sink"], dout, dlse)
    assert not nothing.dq.any() and nothing.dk.size == 0
    np.testing.assert_allclose(nothing.dsink, dlse.sum((0, 2)))


# ---- is the yardstick sharp? -----------------------------------------------------------------------------------------
FAMILIES = {"normal": (1, 0), "x4": (4, 0), "low": (1, 2)}  # as in tests/test_reference.py
SHAPES = {"seqlen_q": 70, "seqlen_k": 203, "dim": 64, "dim_v": 64}


@pytest.fixture(params=[(family, dtype) for family in FAMILIES for dtype in ("bf16", "fp16")], ids="-".join)
def problem(request):
    """(dtype, inputs, dout, what is expected)."""
    family, dtype = request.param
    factor, shift = FAMILIES[family]
    q, k, v, dout, dlse = arrays(**SHAPES)
    q, k, v, dout = (rounded(x, dtype) for x in (factor * q + shift, factor * k - shift, factor * v, dout))
    return dtype, (q, k, v), (dout, dlse), backward_reference(q, k, v, dtype, Scores(0.125, (None, 0)), dout, dlse)


def kernel(q, k, v, dtype, dout, dlse, *, scale=0.125, window=(None, 0), delta_factor=1.0):
    """The backward as a kernel computes it: fp32, P and dS rounded, everything in base 2; dq, dk, dv by name."""
    out, lse = attention(q, k, v, Scores(0.125, (None, 0)))
    delta = (row_sums(rounded(out, dtype), dout, dlse) * delta_factor).astype(np.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, 2).swapaxes(1, 2) for x in (k, v))
    q, dout = q.swapaxes(1, 2), dout.swapaxes(1, 2)
    log2_e = np.log2(np.e)
    scores = q @ k.swapaxes(-1, -2) * np.float32(scale * log2_e)
    p = np.where(
        visible(70, 203, window), np.exp2(scores - (lse * log2_e).astype(np.float32)[..., None]), np.float32(0)
    )
    ds = rounded(p * (dout @ v.swapaxes(-1, -2) - delta[..., None]), dtype)
    dk, dv = ds.swapaxes(-1, -2) @ q * np.float32(scale), rounded(p, dtype).swapaxes(-1, -2) @ dout
    dk, dv = (x.reshape(2, -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    found = {"dq": ds @ k * np.float32(scale), "dk": dk, "dv": dv}
    return {name: rounded(x.swapaxes(1, 2), dtype) for name, x in found.items()}


def wrong(problem, **fault) -> set[str]:
    """The gradients that the yardstick rejects."""
    dtype, inputs, (dout, dlse), expected = problem
    got = kernel(*inputs, dtype, dout, dlse, **fault)
    return {name for name, values in got.items() if yardstick(values, getattr(expected, name))}


def test_a_good_kernel_passes(problem):
    assert wrong(problem) == set()


def test_near_misses_are_rejected(problem):
    assert wrong(problem, scale=0.125 * 1.01) == {"dq", "dk", "dv"}
    assert wrong(problem, window=(None, 1)) == {"dq", "dk", "dv"}
    assert wrong(problem, window=(None, -1)) == {"dq", "dk", "dv"}
    assert wrong(problem, delta_factor=0.95) >= {"dq", "dk"}
    assert wrong(problem, delta_factor=0.0) >= {"dq", "dk"}


def test_gradients_that_are_off_by_one_percent_are_rejected(problem):
    dtype, inputs, (dout, dlse), expected = problem
    for name, values in kernel(*inputs, dtype, dout, dlse).items():
        assert yardstick(values * np.float32(1.01), getattr(expected, name)) != []


def test_what_follows_from_the_rounded_output(problem):
    """It differs from the exact gradients by no more than that rounding."""
    _, inputs, (dout, dlse), expected = problem
    exact = gradients(*inputs, Scores(0.125, (None, 0)), dout, dlse)
    for name in ("dq", "dk"):
        error = np.abs(getattr(expected, name).out - getattr(exact, name))
        assert 0 < error.max() < getattr(expected, name).floor / FLOOR * 2.0**-8
    np.testing.assert_array_equal(expected.dv.out, exact.dv)
    assert (np.abs(exact.dalibi - expected.dalibi) < 2.0**-8 * expected.dalibi_size).all()


def test_join_puts_entries_end_to_end():
    q, k, v, dout, dlse = arrays(6, 9)
    scores = SCORES["sink"]
    whole = backward_reference(q, k, v, "bf16", scores, dout, dlse)
    each = [
        backward_reference(*(x[b : b + 1] for x in (q, k, v)), "bf16", scores, dout[b : b + 1], dlse[b : b + 1])
        for b in range(2)
    ]
    joined = join_backward(each)
    for name in ("dq", "dk", "dv"):
        one, other = getattr(joined, name), getattr(whole, name)
        for part in ("out", "plain", "rounded_p"):
            shape = (-1, *getattr(other, part).shape[2:])
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part).reshape(shape))
        assert one.floor == other.floor > 0
    np.testing.assert_array_equal(joined.lse, whole.lse.swapaxes(0, 1).reshape(4, 12))
    for name in ("dsink", "dsink_size", "dalibi", "dalibi_size"):
        np.testing.assert_allclose(getattr(joined, name), getattr(whole, name))
