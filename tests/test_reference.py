"""Is the yardstick sharp? It must pass a good kernel and reject near misses, for every family of inputs."""

import numpy as np
import pytest

from tests.reference import (
    Scores,
    attention,
    combine,
    decode,
    encode,
    gather,
    join,
    misrounded,
    reference,
    rotate,
    rounded,
    ulp,
    visible,
    yardstick,
)

FAMILIES = {
    "normal": (1, 0),
    "x4": (4, 0),
    "low": (1, 2),  # q + 2 and k − 2: every logit lies near −4·sqrt(head_dim)
}
DTYPES = ("bf16", "fp16")
SHAPE = (2, 70, 4, 64)  # batch, seqlen, heads, head_dim of q
KEYS = (2, 203, 2, 64)


def inputs(family: str, dtype: str, keys=KEYS):
    factor, shift = FAMILIES[family]
    random = np.random.default_rng(7)
    q, k, v = (random.standard_normal(shape) for shape in (SHAPE, keys, keys))
    return tuple(rounded(x, dtype) for x in (factor * q + shift, factor * k - shift, factor * v))


def flash(q, k, v, dtype, *, window=(None, None), scale=0.125, tile=64, keep=lambda block: True, count=None):
    """Tiled attention as a kernel computes it: fp32 scores, exp2, P rounded before it is normalised, one division.

    keep: which key blocks are visited; count: how many keys are taken to exist.
    """
    seen = np.zeros((q.shape[1], len(k[0])), bool)
    real = min(count or KEYS[1], KEYS[1])
    seen[:, :real] = visible(q.shape[1], real, window)
    seen[:, real : count or real] = True
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2).swapaxes(1, 2) for x in (k, v))
    q = q.swapaxes(1, 2)
    out, total = np.zeros((*q.shape[:3], v.shape[-1]), np.float32), np.zeros((*q.shape[:3], 1), np.float32)
    high = np.full_like(total, -np.inf)
    for start in range(0, k.shape[2], tile):
        if not keep(start // tile):
            continue
        part = slice(start, start + tile)
        scores = np.where(
            seen[:, part], q @ k[:, :, part].swapaxes(-1, -2) * np.float32(scale * np.log2(np.e)), -np.inf
        )
        new = np.maximum(high, scores.max(-1, keepdims=True)).astype(np.float32)
        point = np.where(np.isneginf(new), 0, new).astype(np.float32)
        factor, p = np.exp2(high - point), np.exp2(scores - point).astype(np.float32)
        out, total, high = (
            out * factor + rounded(p, dtype) @ v[:, :, part],
            total * factor + p.sum(-1, keepdims=True),
            new,
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.where(total > 0, (np.log2(total) + high) * np.log(2), -np.inf)[..., 0]
    out = rounded(out / np.where(total > 0, total, 1), dtype).swapaxes(1, 2)
    return np.ascontiguousarray(out), lse.astype(np.float32)


@pytest.fixture(params=[(family, dtype) for family in FAMILIES for dtype in DTYPES], ids="-".join)
def problem(request):
    family, dtype = request.param
    return family, dtype, inputs(family, dtype)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (40, 9)], ids=["full", "causal", "window"])
def test_a_good_kernel_passes(problem, window):
    _, dtype, (q, k, v) = problem
    out, lse = flash(q, k, v, dtype, window=window)
    assert yardstick(out, reference(q, k, v, dtype, Scores(0.125, window)), lse) == []


def test_an_unmasked_padding_key_is_rejected(problem):
    """The tail of the last tile holds zeros: one of them counted as a key. Beside ×4 logits exp(0) is nothing."""
    family, dtype, (q, k, v) = problem
    padded = [np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v)]
    out, lse = flash(q, *padded, dtype, count=KEYS[1] + 1)
    expected = reference(q, k, v, dtype, Scores(0.125))
    assert (yardstick(out, expected, lse) != []) == (family != "x4")
    if family == "low":
        assert len(yardstick(out, expected)) == 2, "the outputs alone show it"


def test_a_softmax_scale_that_is_off_by_half_a_percent_is_rejected(problem):
    family, dtype, (q, k, v) = problem
    expected = reference(q, k, v, dtype, Scores(0.125))
    out, lse = flash(q, k, v, dtype, scale=0.125 * 1.005)
    assert yardstick(out, expected, lse) != []
    if family != "x4":  # where one key takes nearly all the weight
        assert yardstick(out, expected) != []


def test_outputs_that_are_off_by_half_a_percent_are_rejected(problem):
    family, dtype, (q, k, v) = problem
    out, _ = flash(q, k, v, dtype)
    expected = reference(q, k, v, dtype, Scores(0.125))
    if (family, dtype) != ("low", "bf16"):  # where that is near bf16's own error
        assert yardstick(out * np.float32(1.005), expected) != []
    assert yardstick(out * np.float32(1.01), expected) != []


@pytest.mark.parametrize("dropped", [0, 3])
def test_a_dropped_block_is_rejected(problem, dropped):
    _, dtype, (q, k, v) = problem
    out, _ = flash(q, k, v, dtype, keep=lambda block: block != dropped)
    assert yardstick(out, reference(q, k, v, dtype, Scores(0.125))) != []


def test_a_mask_that_is_off_by_one_is_rejected(problem):
    _, dtype, (q, k, v) = problem
    for window, wrong in (((None, 0), (None, 1)), ((None, 0), (None, -1)), ((40, 9), (41, 9))):
        out, _ = flash(q, k, v, dtype, window=wrong)
        assert yardstick(out, reference(q, k, v, dtype, Scores(0.125, window))) != []


def test_nan_and_infinity_are_rejected():
    q, k, v = inputs("normal", "bf16")
    expected = reference(q, k, v, "bf16", Scores(0.125))
    out, lse = flash(q, k, v, "bf16")
    for value in (np.nan, np.inf):
        bad = out.copy()
        bad[0, 0, 0, 0] = value
        assert yardstick(bad, expected) == ["1 of 35840 outputs are not finite"]
        bad = lse.copy()
        bad[0, 0, 0] = value
        assert yardstick(out, expected, bad) != []
    assert yardstick(out, expected, lse * np.float32(1 + 1e-4)) != []


def test_rows_that_see_no_key():
    """causal with more queries than keys: the first rows see nothing."""
    q, k, v = inputs("normal", "fp16", (2, 60, 2, 64))
    out, lse = attention(q, k, v, Scores(0.125, (None, 0)))
    assert not out[:, :10].any() and np.isneginf(lse[:, :, :10]).all()
    assert np.isfinite(lse[:, :, 10:]).all()
    expected = reference(q, k, v, "fp16", Scores(0.125, (None, 0)))
    good = rounded(out, "fp16")
    assert yardstick(good, expected, lse.astype(np.float32)) == []
    wrong = lse.astype(np.float32).copy()
    wrong[:, :, 0] = 0
    assert yardstick(good, expected, wrong) == ["lse is -inf where it should not be, or the other way round"]
    empty, lse = attention(q, k[:, :0], v[:, :0], Scores(0.125))
    assert not empty.any() and np.isneginf(lse).all()


@pytest.mark.parametrize(
    "scores",
    [
        Scores(0.3, (2, 1)),
        Scores(0.3, (2, 1), softcap=0.7),
        Scores(0.3, (2, 1), alibi=np.array([0.5, 0.25])),
        Scores(0.3, (2, 1), alibi=np.array([[0.5, 0.25], [1.0, -0.5]])),
        Scores(0.3, (2, 1), sink=np.array([-1.0, 2.0])),
        Scores(0.3, (4, -3), 0.7, np.array([[0.5, 0.25], [1.0, -0.5]]), np.array([-1.0, 2.0])),  # row 0 is empty
    ],
    ids=["window", "softcap", "alibi", "alibi-of-each-entry", "sink", "all"],
)
def test_against_a_loop(scores):
    """The reference itself, on one small problem, against the definition written as loops."""
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal(shape) for shape in ((2, 3, 2, 8), (2, 5, 1, 8), (2, 5, 1, 4)))
    out, lse = attention(q, k, v, scores)
    left, right = scores.window
    for b, i, h in np.ndindex(2, 3, 2):
        keys = [j for j in range(5) if i + 2 - left <= j <= i + 2 + right]
        logits = np.array([scores.scale * q[b, i, h] @ k[b, j, 0] for j in keys])
        if scores.softcap:
            logits = scores.softcap * np.tanh(logits / scores.softcap)
        if scores.alibi is not None:
            slope = np.broadcast_to(scores.alibi, (2, 2))[b, h]
            logits = logits - slope * np.array([abs(i + 2 - j) for j in keys])
        weights = np.exp(logits)
        total = weights.sum() + (0 if scores.sink is None else np.exp(scores.sink[h]))
        np.testing.assert_allclose(np.exp(lse[b, h, i]), total)
        np.testing.assert_allclose(out[b, i, h], weights @ v[b, keys, 0] / total if keys else 0)


def test_join_puts_entries_end_to_end():
    q, k, v = inputs("normal", "bf16")
    whole = reference(q, k, v, "bf16", Scores(0.125))
    joined = join([reference(q[b : b + 1], k[b : b + 1], v[b : b + 1], "bf16", Scores(0.125)) for b in range(2)])
    for name in ("out", "plain", "rounded_p"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name).reshape(140, 4, 64))
    np.testing.assert_array_equal(joined.lse, whole.lse.swapaxes(0, 1).reshape(4, 140))


def test_few_rows_have_no_rms():
    """Neither rows whose P happens to round well in the model, nor rows that are wrong, are judged by it."""
    q, k, v = inputs("normal", "bf16")
    expected = reference(q, k, v, "bf16", Scores(0.125))
    out, _ = flash(q, k, v, "bf16", scale=0.125 * 1.005)
    rows = out.size // out.shape[-1]
    assert "RMS" in " ".join(yardstick(out, expected, rms_rows=rows))
    assert yardstick(out, expected, rms_rows=rows + 1) == []


def test_an_lse_is_as_exact_as_the_biases_that_scores_cancel():
    distance = np.arange(200.0)[::-1]
    q, k, v = np.zeros((1, 1, 1, 8)), np.zeros((1, 200, 1, 8)), np.ones((1, 200, 1, 8))
    q[..., 0], k[0, :, 0, 0] = 1, distance
    biased = reference(q, k, v, "bf16", Scores(1.0, alibi=np.ones(1)))
    plain = reference(q, 0 * k, v, "bf16", Scores(1.0))
    np.testing.assert_allclose(biased.lse, plain.lse)
    for error, problems in ((1e-3, 0), (4e-3, 1)):
        assert len(yardstick(v[:, :1], biased, biased.lse + error)) == problems
    assert yardstick(v[:, :1], plain, plain.lse + 1e-3) != []


def test_gathered_pages_are_what_a_contiguous_cache_holds():
    random = np.random.default_rng(3)
    tokens = random.standard_normal((11, 2, 8))
    table = np.array([4, 0, 3, -1, 2**31 - 1])  # no more than three pages are looked at
    pages = np.full((5, 4, 2, 8), np.nan)
    for j, token in enumerate(tokens):
        pages[table[j // 4], j % 4] = token
    for length in (0, 1, 4, 11):
        np.testing.assert_array_equal(gather(pages, table, length), tokens[:length])


def test_combined_parts_are_the_whole():
    q, k, v = inputs("normal", "bf16")
    whole, lse = attention(q, k, v, Scores(0.125, sink=np.arange(4.0)))
    cuts = ((0, 64), (64, 64), (64, 200), (200, 203))
    parts = [
        attention(q, k[:, a:b], v[:, a:b], Scores(0.125, sink=np.arange(4.0) if a == 0 and b else None))
        for a, b in cuts
    ]
    outs, lses = np.stack([out for out, _ in parts]), np.stack([lse.swapaxes(1, 2) for _, lse in parts])
    assert np.isneginf(lses[1]).all()
    out, combined = combine(outs, lses)
    np.testing.assert_allclose(out, whole)
    np.testing.assert_allclose(combined, lse.swapaxes(1, 2))
    out, combined = combine(np.zeros((3, 5, 8)), np.full((3, 5), -np.inf))
    assert not out.any() and np.isneginf(combined).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_pairs(interleaved):
    """Pairs as complex numbers: turned by the angle of their position; twice is once by the sum."""
    random = np.random.default_rng(4)
    x, angles = random.standard_normal((5, 2, 12)), random.uniform(0, 7, (9, 4))
    positions = np.array([0, 3, 8, 9, 100])
    got, _ = rotate(x, np.cos(angles), np.sin(angles), positions, interleaved)

    def pairs(y):
        return y[..., 0:8:2] + 1j * y[..., 1:8:2] if interleaved else y[..., :4] + 1j * y[..., 4:8]

    np.testing.assert_allclose(pairs(got), pairs(x) * np.exp(1j * angles[[0, 3, 8, 8, 8]])[:, None])
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_misrounded_counts_what_is_off_by_one():
    random = np.random.default_rng(5)
    exact = random.standard_normal(1000)
    for dtype in ("bf16", "fp16", "e4m3"):
        bits = encode(exact, dtype)
        assert misrounded(decode(bits, dtype), exact, np.abs(exact), dtype) == 0
        assert misrounded(decode(bits + bits.dtype.type(1), dtype), exact, np.abs(exact), dtype) >= 990
    assert misrounded(np.array([np.nan]), exact[:1], exact[:1], "bf16") == 1
    assert misrounded(np.array([1.0, 1.0]), np.array([1.0, 1 + 2**-9]), np.zeros(2), "bf16") == 0
    assert misrounded(exact.astype(np.float32), exact, np.abs(exact), "fp32") == 0
    assert misrounded((exact * (1 + 1e-5)).astype(np.float32), exact, np.abs(exact), "fp32") == 1000


def test_visible():
    assert visible(2, 4, (None, 0)).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(3, 2, (None, 0)).astype(int).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert visible(3, 3, (1, 0)).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert visible(2, 2).all()


def test_ulp():
    assert (
        ulp(1.0, "bf16") == 2**-7 and ulp(1.9, "bf16") == 2**-7 and ulp(2.0, "fp16") == 2**-9 and ulp(0.0, "fp16") == 0
    )
