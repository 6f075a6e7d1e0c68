"""`flash_attn_varlen` on the CPU: FakeDriver reads lengths and places from the very parameters of a kernel."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD

import runtime
from registry import ops
from registry.contract import WINDOW_OPEN, fast_divmod
from runtime.api import attention
from runtime.call import forward, launch, tensors
from runtime.errors import ArgumentError, CaptureError, NoKernelError
from runtime.load import plans, session
from tests.runtime.fakes import FakeBackend, write_registry
from tests.support.attention import BF16, reference
from tests.support.varlen import ints, packed, tensor_at


def entries(array, ends, used):
    """The tokens of each entry, (1, tokens, heads, dim)."""
    found = array.unbind(0) if ends is None else [array[first:last] for first, last in pairwise(ends.tolist())]
    lengths = [len(x) for x in found] if used is None else used.tolist()
    return [x[None, :n] for x, n in zip(found, lengths, strict=True)]


def check(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, alibi_slopes=None,
          hints=(None, None), out=None, pack_gqa=None, **options):  # fmt: skip
    out, lse = runtime.flash_attn_varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
        alibi_slopes=alibi_slopes, max_seqlen_q=hints[0], max_seqlen_k=hints[1], out=out, pack_gqa=pack_gqa,
        return_lse=True, **options,
    )  # fmt: skip
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    assert lse.shape == ((q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1]))
    rows_lse = lse.transpose(-1, -2)[..., None]
    each = [entries(q, cu_seqlens_q, seqused_q), entries(k, cu_seqlens_k, seqused_k),
            entries(v, cu_seqlens_k, seqused_k), entries(out, cu_seqlens_q, seqused_q),
            entries(rows_lse, cu_seqlens_q, seqused_q)]  # fmt: skip
    for b, (qb, kb, vb, ob, lb) in enumerate(zip(*each, strict=True)):
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        want, want_lse = reference(qb, kb, vb, alibi_slopes=slopes, **options)
        torch.testing.assert_close(ob.double(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lb[..., 0].transpose(1, 2), want_lse.float(), atol=1e-3, rtol=1e-4)
    return out


@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (2, 1)}, {"softcap": 0.8, "sink": torch.tensor([1.0, -2, 0, 5])},
    {"alibi_slopes": torch.rand(4, 4)}, {"seqused_q": ints(3, 0, 7, 0), "seqused_k": ints(0, 1, 9, 2)},
    {"seqused_k": ints(4, 2, 3, 5), "causal": True}, {"pack_gqa": True}, {"pack_gqa": False}, {"hints": (70, 9)},
], ids=lambda options: " ".join(options))  # fmt: skip
def test_packed_sequences(backend: FakeBackend, registry: Path, options):
    for _ in range(2):
        check(**packed(), **options)
    check(**packed(head_dim=72, head_dim_v=40), **options)


@pytest.mark.parametrize("used", [{}, {"seqused_q": ints(2, 0)}, {"seqused_k": ints(7, 3)}], ids=str)
def test_dense_and_packed_sides_go_together(backend: FakeBackend, registry: Path, used):
    sides = packed((4, 4), (6, 2))
    dense_q = torch.randn(2, 5, 4, 64).to(BF16)
    dense_k, dense_v = torch.randn(2, 7, 2, 64).to(BF16), torch.randn(2, 7, 2, 64).to(BF16)
    check(dense_q, dense_k, dense_v, causal=True, **used)
    if "seqused_k" not in used:
        check(dense_q, sides["k"], sides["v"], cu_seqlens_k=sides["cu_seqlens_k"], causal=True, **used)
    check(sides["q"], dense_k, dense_v, cu_seqlens_q=sides["cu_seqlens_q"], causal=True, **used)


def test_rows_beyond_seqused_q_are_not_written(backend: FakeBackend, registry: Path):
    given = packed()
    out = torch.full_like(given["q"], 9.0)
    assert check(**given, seqused_q=ints(1, 0, 70, 0), out=out) is out
    assert (out[1:3] == 9).all() and (out[73:] == 9).all() and not (out[:1] == 9).all()


def test_the_parameter_buffer_of_packed_arrays(backend: FakeBackend, registry: Path):
    given = packed(head_dim_v=32)
    used_q, used_k = ints(1, 0, 2, 3), ints(1, 1, 1, 1)
    out, lse = runtime.flash_attn_varlen(**given, seqused_q=used_q, seqused_k=used_k, return_lse=True, causal=True)
    (made,) = backend.driver.launches
    p = made["params"]
    assert made["grid"] == ((78 * 2 // 64 + 4) * 2, 1, 1)  # a mean of 20 tokens in 2 heads: packed into tiles of 64
    assert (p["pack"], p["pack_magic"], p["pack_shift"]) == (2, *fast_divmod(2))
    assert [p[n] for n in ("q", "k", "v", "o", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")] == [
        t.data_ptr() for t in (given["q"], given["k"], given["v"], out, lse, given["cu_seqlens_q"],
                               given["cu_seqlens_k"], used_q, used_k)]  # fmt: skip
    assert (p["leftpad_k"], p["sink"], p["alibi_slopes"]) == (0, 0, 0)
    assert [p[f"{t}_stride_b"] for t in ("q", "k", "v", "o", "lse")] == [0] * 5
    assert (p["q_stride_s"], p["k_stride_s"], p["v_stride_s"], p["o_stride_s"]) == (256, 128, 64, 128)
    assert (p["lse_stride_h"], p["batch"], p["seqlen_q"], p["seqlen_k"]) == (78, 4, 78, 20)
    assert (p["window_left"], p["window_right"]) == (WINDOW_OPEN, 0)
    runtime.flash_attn_varlen(given["q"][None], given["k"][None], given["v"][None], seqused_k=used_k[:1])
    p = backend.driver.launches[-1]["params"]
    assert (p["cu_seqlens_q"], p["cu_seqlens_k"], p["seqused_q"]) == (0, 0, 0) and p["seqused_k"] == used_k.data_ptr()
    assert (p["lse_stride_b"], p["batch"], p["seqlen_q"], p["seqlen_k"]) == (0, 1, 78, 20)


@pytest.mark.parametrize(("hints", "seqlen_q"), [
    ((None, None), 20), ((70, 9), 70), ((0, 0), 0), ((10**12, 10**12), 78), ((np.int64(70), 9), 70),
], ids=str)  # fmt: skip
def test_hints_choose_a_tile_and_nothing_else(backend: FakeBackend, registry: Path, monkeypatch, hints, seqlen_q):
    seen = []
    kernel = session.Session.kernel
    monkeypatch.setattr(session.Session, "kernel", lambda *a: seen.append(a[2]) or kernel(*a))
    check(**packed(), hints=hints)
    (facts,) = seen
    assert facts == {
        "dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "batch": 4, "heads_q": 4, "heads_kv": 2, "group": 2,
        "seqlen_q": seqlen_q, "seqlen_k": {None: 5, 0: 0, 9: 9}.get(hints[1], 20), "causal": 0, "varlen": 1,
        "total_q": 78, "packed_rows": 2 * seqlen_q, "window": 0,
    }  # fmt: skip
    p = backend.driver.launches[0]
    assert (p["params"]["seqlen_q"], p["params"]["seqlen_k"]) == (78, 20)
    pack, tile_m = (2, 64) if 2 * seqlen_q <= 64 else (1, 64) if seqlen_q <= 64 else (1, 128)
    assert p["params"]["pack"] == pack and p["grid"][0] == (78 * pack // tile_m + 4) * (4 // pack)


def test_packing_heads_can_be_asked_for(backend: FakeBackend, registry: Path):
    short, long = packed((2, 3), (4, 4)), packed((200, 100), (4, 4))
    for given, heads_kv, choice, pack in ((short, 2, None, 2), (short, 2, False, 1), (long, 2, None, 1),
                                          (long, 2, True, 2), (short, 4, True, 1)):  # fmt: skip
        if heads_kv == 4:
            given = packed((2, 3), (4, 4), heads_kv=4)
        check(**given, pack_gqa=choice)
        assert backend.driver.launches[-1]["params"]["pack"] == pack
    with pytest.raises(ArgumentError, match="pack_gqa"):
        runtime.flash_attn_varlen(**short, pack_gqa="yes")


def test_rows_of_packed_heads_stay_in_32_bits(backend: FakeBackend, registry: Path):
    assert forward.MAX_PACKED_ROWS == 2**31 - 2**10  # a tile may have so many behind the last
    q = torch.zeros(1, 1, 8, 64, dtype=BF16).expand(1, 2**29, 8, 64)
    k = torch.zeros(1, 1, 1, 64, dtype=BF16)
    with pytest.raises(ArgumentError, match="pack_gqa=False") as error:
        runtime.flash_attn_varlen(q, k, k, pack_gqa=True)
    assert error.value.reason == "too_large"
    ends = {"cu_seqlens_q": ints(0, 2), "cu_seqlens_k": ints(0, 1), "max_seqlen_q": 2}
    runtime.flash_attn_varlen(q[0, :2], k[0], k[0], **ends, pack_gqa=True)
    with pytest.raises(ArgumentError, match="pack_gqa=False"):  # with a plan of other totals
        runtime.flash_attn_varlen(q[0], k[0], k[0], **ends, pack_gqa=True)
    assert len(plans.plans.by_call) == 1


@pytest.mark.parametrize("given", [
    packed((), ()), packed((0, 0), (0, 3)), packed((0,), (0,)),
    packed((5,), (3,)) | {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)},
], ids=["no entries", "no queries", "nothing", "tokens of no entry"])  # fmt: skip
def test_nothing_to_do_needs_no_kernel(backend: FakeBackend, given):
    for _ in range(2):
        out, lse = runtime.flash_attn_varlen(**given, return_lse=True)
        assert out.shape == given["q"].shape and lse.shape == (4, len(given["q"]))
    assert not backend.driver.calls


def test_queries_without_keys(backend: FakeBackend, registry: Path):
    out, lse = runtime.flash_attn_varlen(**packed((2, 1), (0, 0)), return_lse=True)
    assert not out.any() and (lse == -math.inf).all()
    sink = torch.tensor([1.0, 2, 3, 4])
    out, lse = runtime.flash_attn_varlen(**packed((2, 1), (0, 0)), return_lse=True, sink=sink)
    assert not out.any() and torch.equal(lse, sink[:, None].expand(4, 3))


def test_every_fact_of_a_call_is_in_its_key(backend: FakeBackend, registry: Path):
    """Each change must give its own result, though the call before it differs in nothing else."""
    given = packed((4, 4), (4, 4))
    dense = {name: given[name].unflatten(0, (2, 4)) for name in "qkv"}
    slopes, sink, used = torch.rand(4), torch.rand(4), ints(1, 3)
    for options in ({}, {"seqused_q": used}, {"seqused_k": used}, {"seqused_q": used, "seqused_k": used}, {},
                    {"sink": sink}, {"sink": sink.to(BF16)}, {"alibi_slopes": slopes}, {"softcap": 0.5},
                    {"alibi_slopes": slopes.expand(2, 4)}, {"alibi_slopes": torch.rand(2, 4)},
                    {"alibi_slopes": torch.rand(2, 8)[:, ::2].contiguous()}, {"alibi_slopes": torch.rand(2, 5)[:, :4]},
                    {"softcap": 0.6}, {"window": (0, None)}, {"causal": True}, {"softmax_scale": 2.0}, {}):  # fmt: skip
        check(**given, **options)
        check(**dense, **options)
        check(dense["q"], given["k"], given["v"], cu_seqlens_k=given["cu_seqlens_k"], **options)
        check(given["q"], dense["k"], dense["v"], cu_seqlens_q=given["cu_seqlens_q"], **options)
    before = len(plans.plans.by_call)
    for pack_gqa in (True, False):
        check(**given, pack_gqa=pack_gqa)
    assert len(plans.plans.by_call) == before + 2
    check(**packed((3, 5), (7, 1)))  # other lengths of the same totals: the same plan
    check(**packed((3, 2, 3), (4, 4, 0)))
    assert len(plans.plans.by_call) == before + 3


LENGTHS = [((3, 40), (4, 9)), ((3, 7), (4, 9)), ((90, 70), (4, 30)), ((3, 2), (4, 9)), ((3, 2), (6, 9)),
           ((2, 0), (2, 0)), ((3, 40), (4, 9)), ((100, 66), (1, 1)), ((30, 40), (1, 9))]  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"head_dim_v": 32}, {"heads_kv": 4}, {"pack_gqa": True}, {"causal": True, "softcap": 2.0},
    {"seqused_q": ints(2, 0), "seqused_k": ints(1, 1)}, {"out": True, "head_dim_v": 128},
], ids=" ".join)  # fmt: skip
def test_new_totals_change_a_plan(backend: FakeBackend, registry: Path, monkeypatch, options):
    """Every kernel that a change of lengths can lead to is met, and met again."""
    shape = {name: options[name] for name in options if name in ("head_dim_v", "heads_kv")}
    options = {name: value for name, value in options.items() if name not in shape}

    def call(lengths):
        given = packed(*lengths, **shape)
        if "out" in options:
            options["out"] = torch.empty(*given["q"].shape[:2], given["v"].shape[2], dtype=BF16)
        check(**given, **options)
        return backend.driver.launches[-1]

    fresh = []
    for lengths in LENGTHS:
        plans.drop()
        fresh.append(call(lengths))
    plans.drop()
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    call(LENGTHS[0])
    (first,) = plans.plans.by_call.values()
    for lengths, want in zip(LENGTHS, fresh, strict=True):
        made = call(lengths)
        assert (made["variant"], made["grid"]) == (want["variant"], want["grid"])
        for name, value in want["params"].items():
            assert made["params"][name] == value or name in ops.get("fwd").slots, name
    assert len({made["variant"] for made in fresh}) == 2 and len({made["grid"] for made in fresh}) > 1
    monkeypatch.setattr(session.Session, "kernel", None)  # now that each kernel has its launch
    for lengths in LENGTHS:
        call(lengths)
    assert list(plans.plans.by_call.values()) == [first]


def test_a_dense_side_beside_a_packed_one_keeps_its_length(backend: FakeBackend, registry: Path):
    one, other = packed((5, 5), (6, 2)), packed((5, 5), (3, 8))
    for _ in range(2):
        for given in (one, other):
            check(given["q"].unflatten(0, (2, 5)), given["k"], given["v"], cu_seqlens_k=given["cu_seqlens_k"])
        with pytest.raises(ArgumentError, match="cu_seqlens_k") as error:
            runtime.flash_attn_varlen(torch.zeros(3, 5, 4, 64, dtype=BF16), one["k"], one["v"],
                                      cu_seqlens_k=one["cu_seqlens_k"], return_lse=True)  # fmt: skip
        assert error.value.reason == "shape"
        dense = torch.zeros(3, 5, 2, 64, dtype=BF16)
        check(one["q"], dense[:2], dense[:2], cu_seqlens_q=one["cu_seqlens_q"])
        with pytest.raises(ArgumentError, match=r"k: .* batch 3"):
            runtime.flash_attn_varlen(one["q"], dense, dense, cu_seqlens_q=one["cu_seqlens_q"], return_lse=True)


def test_new_totals_are_checked(backend: FakeBackend, registry: Path, monkeypatch):
    given = packed((3, 7), (4, 9))
    out = torch.zeros(10, 4, 64, dtype=BF16)
    bad = [
        ({"v": given["v"][:-1]}, "v", "shape"), ({"k": given["k"][:-1]}, "v", "shape"),
        ({"out": torch.zeros(9, 4, 64, dtype=BF16)}, "out", "shape"), ({"q": given["q"][:-1]}, "out", "shape"),
        ({"max_seqlen_q": -1}, "max_seqlen_q", "value"), ({"max_seqlen_k": ints(3, 4)}, "max_seqlen_k", "value"),
        ({"max_seqlen_k": 3.5}, "max_seqlen_k", "value"),
        ({"q": torch.zeros(40, 4, 64, dtype=BF16), "out": torch.zeros(40, 4, 64, dtype=BF16)}, "q", "too_large"),
    ]  # fmt: skip
    monkeypatch.setattr(forward, "MAX_TOKENS", 52)
    hints = {"max_seqlen_q": 3, "max_seqlen_k": 3}
    for _ in range(2):
        check(**given, out=out, hints=(3, 3))
        for changes, argument, reason in bad:
            with pytest.raises(ArgumentError) as error:
                runtime.flash_attn_varlen(**given | hints | {"out": out} | changes, return_lse=True)
            assert (error.value.argument, error.value.reason) == (argument, reason), error.value
            check(**given, out=out, hints=(3, 3))
    monkeypatch.setattr(launch, "MAX_BLOCKS", backend.driver.launches[-1]["grid"][0])
    for _ in range(2):
        with pytest.raises(ArgumentError, match="split it"):
            runtime.flash_attn_varlen(**packed((30, 9), (4, 8)), return_lse=True)
        check(**given)


def test_new_totals_with_memory_of_out(backend: FakeBackend, registry: Path):
    one, two = packed((3, 7), (4, 9), heads_kv=4), packed((3, 9), (4, 9), heads_kv=4)
    memory = torch.zeros(20 * 4 * 64, dtype=BF16)
    steps = (64, 10 * 64, 1)  # heads lie 10 tokens apart: more would overlap
    tail = torch.zeros(24 * 4 * 64, dtype=BF16)
    behind = tail[11 * 4 * 64 :][: one["k"].numel()].view(one["k"].shape)  # after 11 tokens
    for _ in range(2):
        check(**one, out=memory.as_strided((10, 4, 64), steps))
        with pytest.raises(ArgumentError, match="elements share memory"):
            runtime.flash_attn_varlen(**two, out=memory.as_strided((12, 4, 64), steps), return_lse=True)
        check(**one | {"k": behind}, out=tail[: 10 * 4 * 64].view(10, 4, 64))
        with pytest.raises(ArgumentError, match="shares memory with k"):
            runtime.flash_attn_varlen(**two | {"k": behind}, out=tail[: 12 * 4 * 64].view(12, 4, 64), return_lse=True)


def test_one_token_has_no_stride_that_others_could_inherit(backend: FakeBackend, registry: Path):
    memory = torch.zeros(4000, dtype=BF16)
    k = torch.zeros(4, 4, 64, dtype=BF16)
    for tokens in (1, 0, 1):
        q = memory.as_strided((tokens, 4, 64), (260, 64, 1))
        out = runtime.flash_attn_varlen(q, k, k, cu_seqlens_q=ints(0, tokens), cu_seqlens_k=ints(0, 4))
        assert out.shape == q.shape
    with pytest.raises(ArgumentError, match="q: stride 260"):
        runtime.flash_attn_varlen(memory.as_strided((2, 4, 64), (260, 64, 1)), k, k, cu_seqlens_q=ints(0, 2),
                                  cu_seqlens_k=ints(0, 4))  # fmt: skip
    assert len(backend.driver.launches) == 2


def test_what_fails_between_two_totals_leaves_no_mixture(backend: FakeBackend, registry: Path, monkeypatch):
    one, two = packed((3, 7), (4, 9)), packed((30, 40), (4, 90))
    check(**one)
    with monkeypatch.context() as patch:
        patch.setattr(forward, "outputs", None)  # after the plan has been changed
        with pytest.raises(TypeError):
            runtime.flash_attn_varlen(**two, return_lse=True)
    check(**one)
    check(**two)


def test_new_totals_may_need_a_kernel_that_is_not_there(backend: FakeBackend, tmp_path: Path):
    write_registry(tmp_path / "r.db", only="m64")
    runtime.configure(registry=tmp_path / "r.db")
    short, long = packed((3, 7), (4, 9)), packed((300, 70), (4, 9))
    for _ in range(2):
        check(**short)
        with pytest.raises(NoKernelError, match="not in the index"):
            runtime.flash_attn_varlen(**long, return_lse=True)
    write_registry(tmp_path / "all.db")
    runtime.configure(registry=tmp_path / "all.db")
    check(**short)
    backend.capturing = True
    check(**packed((2, 7), (4, 9)))
    with pytest.raises(CaptureError):
        runtime.flash_attn_varlen(**long, return_lse=True)
    backend.capturing = False
    check(**long)


def test_a_warm_call_only_launches(backend: FakeBackend, registry: Path, monkeypatch):
    given = packed() | {"seqused_k": ints(1, 1, 1, 1), "alibi_slopes": torch.rand(4), "sink": torch.rand(4)}
    check(**given)
    monkeypatch.setattr(attention, "prepare", None)
    check(**{name: tensor.clone() for name, tensor in given.items()})
    check(**given | {"seqused_k": ints(0, 1, 8, 2)})  # other values, same plan
    assert len(backend.driver.launches) == 3


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


LOW = {"dtype": BF16}
CASES = {
    "dense q": ({"q": zeros(2, 5, 4, 64, **LOW)}, "q", "rank"),
    "dense k": ({"k": zeros(2, 5, 2, 64, **LOW)}, "k", "rank"),
    "packed q alone": ({"cu_seqlens_q": None}, "q", "rank"),
    "packed k alone": ({"cu_seqlens_k": None}, "k", "rank"),
    "total_k": ({"v": zeros(19, 2, 64, **LOW)}, "v", "shape"),
    "out shape": ({"out": zeros(77, 4, 64, **LOW)}, "out", "shape"),
    "out dense": ({"out": zeros(1, 78, 4, 64, **LOW)}, "out", "rank"),
    "head_dim 60": ({"q": zeros(78, 4, 60, **LOW), "k": zeros(20, 2, 60, **LOW)}, "q", "head_dim"),
    "heads": ({"q": zeros(78, 3, 64, **LOW)}, "q", "heads"),
    "stride": ({"q": zeros(78, 5, 68, **LOW)[:, :4, :64]}, "q", "stride"),
    "cu_seqlens list": ({"cu_seqlens_q": [0, 3, 3, 73, 78]}, "cu_seqlens_q", "type"),
    "cu_seqlens int64": ({"cu_seqlens_q": zeros(5, dtype=torch.int64)}, "cu_seqlens_q", "dtype"),
    "cu_seqlens 2-d": ({"cu_seqlens_k": zeros(1, 5)}, "cu_seqlens_k", "rank"),
    "cu_seqlens empty": ({"cu_seqlens_q": zeros(0)}, "cu_seqlens_q", "shape"),
    "batches": ({"cu_seqlens_k": zeros(4)}, "cu_seqlens_k", "shape"),
    "cu_seqlens strided": ({"cu_seqlens_q": zeros(10)[::2]}, "cu_seqlens_q", "contiguity"),
    "cu_seqlens meta": ({"cu_seqlens_q": zeros(5).to("meta")}, "cu_seqlens_q", "device"),
    "cu_seqlens freed": ({"cu_seqlens_q": zeros(5)}, "cu_seqlens_q", "storage"),
    "seqused_q float": ({"seqused_q": zeros(4, dtype=torch.float32)}, "seqused_q", "dtype"),
    "seqused_q shape": ({"seqused_q": zeros(5)}, "seqused_q", "shape"),
    "seqused_k shape": ({"seqused_k": zeros(3)}, "seqused_k", "shape"),
    "seqused_k strided": ({"seqused_k": zeros(8)[::2]}, "seqused_k", "contiguity"),
    "sink shape": ({"sink": zeros(2, dtype=torch.float32)}, "sink", "shape"),
    "sink i32": ({"sink": zeros(4, dtype=torch.int32)}, "sink", "dtype"),
    "sink fp64": ({"sink": zeros(4, dtype=torch.float64)}, "sink", "dtype"),
    "sink number": ({"sink": 1.0}, "sink", "type"),
    "sink strided": ({"sink": zeros(8, dtype=torch.float32)[::2]}, "sink", "contiguity"),
    "sink 2-d": ({"sink": zeros(1, 4, dtype=torch.float32)}, "sink", "rank"),
    "slopes bf16": ({"alibi_slopes": zeros(4, **LOW)}, "alibi_slopes", "dtype"),
    "slopes shape": ({"alibi_slopes": zeros(2, dtype=torch.float32)}, "alibi_slopes", "shape"),
    "slopes batch": ({"alibi_slopes": zeros(3, 4, dtype=torch.float32)}, "alibi_slopes", "shape"),
    "slopes strided": ({"alibi_slopes": zeros(4, 8, dtype=torch.float32)[:, ::2]}, "alibi_slopes", "contiguity"),
    "max_seqlen_q negative": ({"max_seqlen_q": -1}, "max_seqlen_q", "value"),
    "max_seqlen_q of several": ({"max_seqlen_q": ints(70, 9)}, "max_seqlen_q", "value"),
    "max_seqlen_k float": ({"max_seqlen_k": 9.5}, "max_seqlen_k", "value"),
    "pack_gqa": ({"pack_gqa": 2}, "pack_gqa", "type"),
    "softcap": ({"softcap": -1.0}, "softcap", "value"),
    "window": ({"window": (-1, 0)}, "window", "value"),
}  # fmt: skip
CASES["cu_seqlens freed"][0]["cu_seqlens_q"].untyped_storage().resize_(0)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(backend: FakeBackend, registry: Path, name):
    changes, argument, reason = CASES[name]
    given = packed() | changes
    for warm in (False, True):
        if warm and name == "cu_seqlens meta":  # whose index is the CPU's, -1
            reason = "storage"
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_varlen(**given)
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
        assert error.value.__context__ is None
        if not warm:
            assert not backend.driver.calls
            runtime.flash_attn_varlen(**packed())
            runtime.flash_attn_varlen(**packed(), seqused_q=ints(1, 1, 1, 1), sink=torch.zeros(4))


def test_slopes_span_less_than_2_to_the_31(backend: FakeBackend, registry: Path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_I32", 204)
    check(**packed(), alibi_slopes=torch.rand(4, 50)[:, :4])
    for columns, reason in ((51, "too_large"), (205, "stride")):
        with pytest.raises(ArgumentError, match=f"stride (of )?{columns}") as error:
            runtime.flash_attn_varlen(**packed(), alibi_slopes=torch.rand(4, columns)[:, :4])
        assert (error.value.argument, error.value.reason) == ("alibi_slopes", reason)


def test_what_the_key_leaves_open_is_checked_on_warm_calls(backend: FakeBackend, registry: Path):
    given = packed() | {"seqused_k": ints(1, 1, 1, 1), "alibi_slopes": torch.rand(4), "sink": torch.rand(4).to(BF16)}
    crooked = torch.zeros(64, dtype=torch.uint8)
    freed = {name: given[name].clone() for name in ("cu_seqlens_k", "sink")}
    for tensor in freed.values():
        tensor.untyped_storage().resize_(0)
    bad = [
        ({"cu_seqlens_q": crooked[2:22]}, "cu_seqlens_q", "alignment"),
        ({"alibi_slopes": crooked[2:18]}, "alibi_slopes", "alignment"),
        ({"sink": crooked[1:9]}, "sink", "alignment"),
        ({"cu_seqlens_k": freed["cu_seqlens_k"]}, "cu_seqlens_k", "storage"),
        ({"sink": freed["sink"]}, "sink", "storage"),
    ]
    for _ in range(2):  # first and warm
        for changes, argument, reason in bad:
            for name, tensor in changes.items():
                if reason == "alignment":
                    changes = {name: tensor_at(tensor, given[name].dtype)}
            with pytest.raises(ArgumentError) as error:
                runtime.flash_attn_varlen(**given | changes)
            assert (error.value.argument, error.value.reason) == (argument, reason), error.value
        with fwAD.dual_level(), pytest.raises(ArgumentError, match="tangent") as error:
            sink = given["sink"]
            runtime.flash_attn_varlen(**given | {"sink": fwAD.make_dual(sink, sink)})
        assert error.value.argument == "sink"
        runtime.flash_attn_varlen(**given)


def test_out_stays_apart_from_every_input(backend: FakeBackend, registry: Path):
    given = packed((4, 4), (4, 4), heads_kv=4)
    memory = torch.zeros(given["q"].numel() + 64, dtype=BF16)
    out = memory[: given["q"].numel()].view(given["q"].shape)
    ends = memory[32:38].view(torch.int32)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="cu_seqlens_q") as error:
            runtime.flash_attn_varlen(**given | {"cu_seqlens_q": ends}, out=out)
        assert (error.value.argument, error.value.reason) == ("out", "overlap")
        with pytest.raises(ArgumentError, match="shares memory with k"):
            runtime.flash_attn_varlen(**given, out=given["k"])
        check(**given, out=torch.empty_like(given["q"]))
        check(**given | {"cu_seqlens_q": torch.stack([given["cu_seqlens_q"]])[0]}, out=out)
    rows = torch.randn(8, 4, 4, 64).to(BF16)  # q, k, v, out of one packed buffer
    check(rows[:, 0], rows[:, 1], rows[:, 2], given["cu_seqlens_q"], given["cu_seqlens_k"], out=rows[:, 3])
