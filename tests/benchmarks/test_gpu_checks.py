"""The checks themselves, on the CPU and in small: a right implementation passes, every planted fault is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import checks, ledger, test_fwd, yardstick
from tests.gpu.inputs import padded, place, untouched, values
from tests.gpu.stand_in import Stand
from tests.support.call import FAMILIES, Call
from tests.support.threads import graphs, one_thread

__all__ = ["graphs", "one_thread"]  # fixtures

TESTS = Path(__file__).resolve().parents[1]
KEY = "fwd-bf16-d64-dv64-m64-n64-w4-s1"
NARROW_V = "fwd-bf16-d64-dv40-m64-n64-w4-s1"
CAUGHT = {
    "causal flag dropped": "yardstick",
    "one key too many": "yardstick",
    "heads mapped wrongly": "yardstick",
    "aligned top-left": "yardstick",
    "scale 0.5 % off": "yardstick",
    "P in 4 bits": "yardstick",
    "columns scrambled": "yardstick",
    "lse in base 2": "yardstick",
    "a row not written": "yardstick",
    "writes past the end": "yardstick",
    "lse row not written": "lse",
    "softmax_scale ignored": "lse",
    "output not returned": "strided",
    "strides ignored": "strided",
    "window one too wide": "windows",
    "empty rows are NaN": "empty",
    "no sink in the LSE of empty rows": "empty",
    "32-bit offsets": "beyond_2g",
    "columns beyond head_dim": "head_dims",
    "writes columns beyond head_dim_v": "head_dims",
    "scale of the variant's head_dim": "head_dims",
    "misaligned head_dim accepted": "head_dims",
    "softcap ignored": "score_mods",
    "softcap halved": "score_mods",
    "sink ignored": "score_mods",
    "low sink ignored": "score_mods",
    "slopes ignored": "score_mods",
    "slope's sign": "score_mods",
    "slopes of the first entry": "score_mods",
    "packed rows taken for tokens": "pack_gqa",
    "packed heads share a sink": "pack_gqa",
    "packed heads share a slope": "pack_gqa",
    "seqused_q ignored": "varlen",
    "seqused_k ignored": "varlen",
    "rows before seqused": "varlen",
    "lse in the wrong layout": "varlen_many",
    "tiles beyond the last entry write": "varlen_many",
    "windows of packed varlen rows one too wide": "drawn",
    "not deterministic": "determinism",
    "a graph keeps the lengths": "graph_capture",
    "a cold capture": "graph_capture",
    "a plan keeps its first pointers": "streams",
    "leftpad ignored": "leftpad",
    "one key of the padding too many": "leftpad",
    "negative padding not cut": "leftpad",
    "padding that ends behind the keys ignored": "leftpad",
    "rows that nobody owns are NaN to autograd": "unused_rows",
    "zero_unused ignored": "unused_rows",
    "heads · heads_kv in 32 bits": "largest",
    "32-bit rows of the LSE": "largest",
    "32-bit token offsets": "largest",
    "32-bit head strides": "largest",
}
# What others fell into (facts/kernels.md), as far as it concerns a forward: the fault that the suite is proved with
# or, for what no run shows, the test elsewhere.
TRAPS = {
    "stmatrix fed with mma.sync fragments scrambles": "columns scrambled",
    "packed GQA when the ratio does not divide the tile": "packed rows taken for tokens",
    "varlen reads cu_seqlens[b + 1] past the end on over-launched tiles": "tiles beyond the last entry write",
    "seqused treated as dense": "seqused_k ignored",
    "fully masked rows": "empty rows are NaN",
    "softmax_scale=None": "scale of the variant's head_dim",
    "head_dim > head_dim_v": "writes columns beyond head_dim_v",
    "misaligned head_dim reaches the device": "misaligned head_dim accepted",
    "a padding key left unmasked at seqlen ≥ 1024": "one key too many",
}


ELSEWHERE = {
    "tile sizes missing from a cache key": "registry/contract/test_variant.py::"
    "test_different_variants_have_different_keys",
    "can-implement checked with other stages": "kernels/test_validity.py::test_the_table_is_valid",
}


def run(name, stand, key=KEY):
    stand.force(key)
    checks.CHECKS[name](stand, key, checks.TINY)


@pytest.mark.parametrize("name", checks.CHECKS)
@pytest.mark.parametrize("key", [KEY, NARROW_V.replace("bf16", "fp16")])
def test_a_right_implementation_passes(name, key):
    run(name, Stand(), key)


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_planted_fault_is_caught(fault):
    with pytest.raises(AssertionError, match="failures:"):
        run(CAUGHT[fault], Stand(fault))


def test_every_check_can_fail():
    assert set(CAUGHT.values()) == set(checks.CHECKS)


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_a_check_that_sees_it(trap):
    assert CAUGHT[TRAPS[trap]] in ledger.CONFORMANCE["ops"]["fwd"]


@pytest.mark.parametrize("trap", ELSEWHERE)
def test_traps_that_no_run_shows_have_a_test_elsewhere(trap):
    file, name = ELSEWHERE[trap].split("::")
    assert f"def {name}(" in (TESTS / file).read_text()


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
            checks.CHECKS["streams"](Racy(fault), KEY, checks.TINY)


def test_every_name_of_the_conformance_list_has_a_check():
    names = ledger.CONFORMANCE["ops"]["fwd"]
    assert list(checks.CHECKS) == list(test_fwd.NAMES)
    assert [*test_fwd.NAMES, "memcheck", "racecheck"] == names


def call(seqlen_q, seqlen_k, heads_q, heads_kv, batch, head_dim, head_dim_v, dtype="bf16", **more):
    return Call(seqlen_q, seqlen_k, heads_q, heads_kv, batch, head_dim, head_dim_v, dtype, **more)


def test_rms_sees_what_the_maximum_lets_pass():
    """A scale that is 0.5 % off at 1,024 keys stays within the max-norm's allowance: the RMS must tell."""
    tensors = values(call(256, 1024, 1, 1, 1, 64, 64), "cpu")
    rule = yardstick.Rule(0.125)
    right = yardstick.expected(**tensors, rule=rule)
    wrong = yardstick.expected(**{**tensors, "v": tensors["v"] * 1.01}, rule=rule)
    found = yardstick.problems(wrong.out, None, right)
    assert len(found) == 1 and found[0].startswith("RMS")


def test_the_reference_is_that_of_pytorch():
    tensors = values(call(33, 33, 4, 2, 2, 64, 64, seed=1), "cpu")
    right = yardstick.expected(**tensors, rule=yardstick.Rule(0.125, (None, 0)))
    q, k, v = (x.transpose(1, 2).double() for x in (tensors["q"], tensors["k"], tensors["v"]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    assert torch.equal(right.out, out.transpose(1, 2).to(torch.bfloat16))


def test_softcap_slopes_and_sink_are_those_of_pytorch():
    """Against SDPA: a bias for ALiBi, and for the sink one more key, whose value is 0."""
    batch, seqlen_q, seqlen_k, heads = 2, 9, 14, 3
    tensors = values(call(seqlen_q, seqlen_k, heads, heads, batch, 16, 8, "fp16", seed=1), "cpu")
    sink, slopes = torch.randn(heads).double(), torch.rand(batch, heads).double()
    right = yardstick.expected(**tensors, rule=yardstick.Rule(0.25, (None, 3), 2.0, sink, slopes))
    q, k, v = (tensors[name].transpose(1, 2).double() for name in "qkv")
    i, j = torch.arange(seqlen_q)[:, None] + 5, torch.arange(seqlen_k)
    scores = 2 * torch.tanh(q @ k.mT / 4 / 2) - slopes[..., None, None] * (i - j).abs()
    scores = torch.cat([scores.masked_fill(j > i + 3, -torch.inf), sink.view(3, 1, 1).expand(2, 3, 9, 1)], -1)
    nothing = torch.zeros(batch, heads, 1, 1, dtype=torch.float64)
    out = torch.nn.functional.scaled_dot_product_attention(
        nothing.expand(-1, -1, seqlen_q, -1), nothing.expand(-1, -1, seqlen_k + 1, -1),
        torch.nn.functional.pad(v, (0, 0, 0, 1)), attn_mask=scores,
    )  # fmt: skip
    assert torch.equal(right.out, out.transpose(1, 2).half())
    torch.testing.assert_close(right.lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (4, 2)])
def test_the_reference_of_an_entry_is_that_of_its_rows_alone(window):
    tensors = values(call(20, 30, 4, 2, 3, 32, 16, seed=3), "cpu")
    slopes, lengths_q, lengths_k = torch.rand(3, 4), torch.tensor([20, 0, 7]), torch.tensor([11, 30, 0])
    lengths = {"lengths_q": lengths_q, "lengths_k": lengths_k}
    whole = yardstick.expected(**tensors, rule=yardstick.Rule(0.2, window, slopes=slopes, **lengths))
    for b, (n, m) in enumerate(zip(lengths_q.tolist(), lengths_k.tolist(), strict=True)):
        alone = {name: x[b : b + 1, : n if name == "q" else m] for name, x in tensors.items()}
        one = yardstick.expected(**alone, rule=yardstick.Rule(0.2, window, slopes=slopes[b]))
        torch.testing.assert_close(whole.lse[b, :, :n], one.lse[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(whole.out[b, :n], one.out[0]) and torch.equal(whole.empty[b, :, :n], one.empty[0])
        assert whole.max_error[b].item() == pytest.approx(one.max_error.item(), rel=0.3)


def test_an_entry_is_judged_by_itself():
    """Many keys average out: what is right for an entry of one key is far too much for one of a thousand."""
    tensors = values(call(100, 1000, 4, 4, 2, 64, 64, seed=4), "cpu")
    rule = yardstick.Rule(0.125, lengths_k=torch.tensor([1, 1000]), lengths_q=torch.tensor([100, 100]))
    right = yardstick.expected(**tensors, rule=rule)
    out = right.out.clone()
    out[1] += 0.5 * right.max_error[0]
    wrong = yardstick.problems(out, None, right)
    assert wrong[0].startswith("entry 1: max") and len(wrong) == 2
    right.max_error[1] = right.max_error[0]
    assert [text[:3] for text in yardstick.problems(out, None, right)] == ["RMS"]


def test_pools_have_enough_rows():
    assert yardstick.pooled([1000, 1000], [5, 5]) == [0, 0]
    assert yardstick.pooled([1000, 10, 1000], [5, 6, 7]) == [0, 1, 1]
    assert yardstick.pooled([300, 10, 300, 20], [1, 2, 3, 4]) == [0, 1, 1, 1]
    assert yardstick.pooled([10, 300, 5], [9, 1, 1]) == [0, 0, 0]
    assert yardstick.pooled([], []) == []


def test_the_reference_is_the_same_in_chunks(monkeypatch):
    tensors = values(call(20, 30, 6, 2, 2, 64, 40, "fp16", family="times4", seed=2), "cpu")
    rule = yardstick.Rule(0.1, (5, 2), 20.0, torch.rand(6), torch.rand(2, 6))
    whole = yardstick.expected(**tensors, rule=rule)
    monkeypatch.setattr(yardstick, "CHUNK", 6 * 20 * 30 // 2)
    parts = yardstick.expected(**tensors, rule=rule)
    torch.testing.assert_close(whole.lse, parts.lse, rtol=1e-12, atol=1e-12)
    assert (whole.out == parts.out).float().mean() > 0.999
    torch.testing.assert_close(whole.max_error, parts.max_error, rtol=0.3, atol=0)


@pytest.mark.parametrize(
    ("dtype", "value", "step"), [("bfloat16", 1.0, 2**-7), ("bfloat16", 3.9, 2**-6), ("float16", 0.5, 2**-11)]
)
def test_ulp(dtype, value, step):
    assert yardstick.ulp(value, getattr(torch, dtype)) == step


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    tensors = values(call(50, 60, 2, 1, 1, 128, 128, family=family, seed=3), "cpu")
    logits = torch.einsum("bqhd,bkd->bhqk", tensors["q"].float(), tensors["k"][:, :, 0].float()) * 128**-0.5
    if family == "far_below":
        assert logits.max() < -30
    else:
        assert logits.std() == pytest.approx(16 if family == "times4" else 1, rel=0.1)
    assert untouched(place(tensors["q"]))
    with pytest.raises(ValueError, match="family"):
        values(call(1, 1, 1, 1, 1, 64, 64, family="odd"), "cpu")


def test_surroundings_are_watched():
    tensor = padded((1, 2, 3, 64), torch.bfloat16, "cpu")
    tensor.zero_()
    assert untouched(tensor)
    tensor._base[0, 0, 0, 0] = 1
    assert not untouched(tensor)
    assert all(step % 8 == 0 for step in tensor.stride()[:3]) and tensor.storage_offset() % 8 == 0
