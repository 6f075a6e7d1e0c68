"""FlashAttention's signatures: names, order, defaults, results, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import runtime
from registry.contract import WINDOW_OPEN
from runtime import fa4
from runtime.errors import ArgumentError
from tests.runtime.fakes import FakeBackend
from tests.support.attention import inputs, reference
from tests.support.varlen import ints, packed

FA2 = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
FA2_VARLEN = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
    "alibi_slopes deterministic return_attn_probs block_table"
)
FA4 = (
    "q k v qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
    "deterministic score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors "
    "block_sparse_tensors_bwd return_lse"
)
FA4_VARLEN = (
    "q k v qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q seqused_k gather_kv_indices "
    "page_table softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic score_mod "
    "score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse scheduler_metadata "
    "seqlen_k_per_split disable_scheduler_metadata"
)
FA2_QKV = FA2.replace("q k v", "qkv")
FA2_KV = FA2.replace("q k v", "q kv")
FA2_VARLEN_QKV = FA2_QKV.replace("qkv", "qkv cu_seqlens max_seqlen")
FA2_VARLEN_KV = FA2_KV.replace("q kv", "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k")
COMBINE = "out_partial lse_partial out out_dtype cu_seqlens seqused virtual_batch_idx return_lse"
SLOPES, SINK = torch.tensor([0.5, 0.1, 0.0, 2.0]), torch.tensor([1.0, -2, 0, 5])


def close(found, want):
    torch.testing.assert_close(found.double(), want.double(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("function", "names"), [
    (runtime.flash_attn_func, FA2), (runtime.flash_attn_varlen_func, FA2_VARLEN),
    (runtime.flash_attn_qkvpacked_func, FA2_QKV), (runtime.flash_attn_kvpacked_func, FA2_KV),
    (runtime.flash_attn_varlen_qkvpacked_func, FA2_VARLEN_QKV),
    (runtime.flash_attn_varlen_kvpacked_func, FA2_VARLEN_KV),
    (fa4.flash_attn_func, FA4), (fa4.flash_attn_varlen_func, FA4_VARLEN), (fa4.flash_attn_combine, COMBINE),
], ids=lambda given: getattr(given, "__name__", ""))  # fmt: skip
def test_positional_order_is_upstream_s(function, names):
    """Flash-attention 0251105a, flash_attn_interface.py and cute/interface.py."""
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()


def test_fa2_by_position(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    out, lse, probs = runtime.flash_attn_func(q, k, v, 0.0, 0.3, True, (2, -1), 0.9, SLOPES, False, True)
    options = {"softmax_scale": 0.3, "causal": True, "window": (2, None), "softcap": 0.9, "alibi_slopes": SLOPES}
    want, want_lse = reference(q, k, v, **options)
    close(out, want)
    close(lse, want_lse)
    assert probs.numel() == 0 and probs.dtype == q.dtype
    close(runtime.flash_attn_func(q, k, v), reference(q, k, v)[0])


def test_fa2_with_fa4_s_keywords(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    out, lse = runtime.flash_attn_func(q, k, v, learnable_sink=SINK, pack_gqa=True, num_splits=1, return_lse=True,
                                       deterministic=True, qv=None, mask_mod=None)  # fmt: skip
    want, want_lse = reference(q, k, v, sink=SINK)
    close(out, want)
    close(lse, want_lse)
    assert backend.driver.launches[-1]["params"]["pack"] == 2
    runtime.flash_attn_func(q, k, v, pack_gqa=False)
    assert backend.driver.launches[-1]["params"]["pack"] == 1
    given = packed((2, 3), (4, 4))
    out, lse = runtime.flash_attn_varlen_func(**given, learnable_sink=SINK, seqused_k=ints(1, 2), return_lse=True,
                                              disable_scheduler_metadata=True)  # fmt: skip
    want = runtime.flash_attn_varlen(**given, sink=SINK, seqused_k=ints(1, 2), return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_fa2_varlen_by_position(backend: FakeBackend, registry: Path):
    given = packed((2, 3), (4, 4))
    ours = runtime.flash_attn_varlen(**given, softmax_scale=0.3, causal=True, window=(2, None), softcap=0.9,
                                     alibi_slopes=SLOPES, return_lse=True)  # fmt: skip
    tensors = [given[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    out, lse, probs = runtime.flash_attn_varlen_func(*tensors, 3, 4, 0.0, 0.3, True, (2, -1), 0.9, SLOPES, False, True,
                                                     None)  # fmt: skip
    assert torch.equal(out, ours[0]) and torch.equal(lse, ours[1]) and probs.numel() == 0
    assert isinstance(runtime.flash_attn_varlen_func(*tensors, 3, 4), torch.Tensor)


def test_fa4_by_position(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    nothing = (None,) * 7
    out, lse = fa4.flash_attn_func(q, k, v, None, None, 0.3, True, (2, None), SINK, 0.9, 1, True, False, *nothing, True)
    want, want_lse = reference(q, k, v, softmax_scale=0.3, causal=True, window=(2, None), sink=SINK, softcap=0.9)
    close(out, want)
    close(lse, want_lse)
    out, lse = fa4.flash_attn_func(q, k, v, softcap=None)
    assert lse is None
    close(out, reference(q, k, v)[0])


def test_fa4_varlen_by_position(backend: FakeBackend, registry: Path):
    given, used_q, used_k = packed((2, 3), (4, 4)), ints(1, 3), ints(4, 2)
    ours, ours_lse = runtime.flash_attn_varlen(**given, seqused_q=used_q, seqused_k=used_k, softmax_scale=0.3,
                                               causal=True, sink=SINK, softcap=0.9, return_lse=True)  # fmt: skip
    out, lse = fa4.flash_attn_varlen_func(
        given["q"], given["k"], given["v"], None, given["cu_seqlens_q"], given["cu_seqlens_k"], 3, 4, None, used_q,
        used_k, None, None, 0.3, True, (None, None), SINK, 0.9, 1, None, False, *(None,) * 6, True, None, None, False,
    )  # fmt: skip
    for mine, theirs in ((ours, out), (ours_lse.T, lse.T)):
        assert torch.equal(mine[:1], theirs[:1]) and torch.equal(mine[2:5], theirs[2:5])
    assert fa4.flash_attn_varlen_func(**given)[1] is None


OPEN = WINDOW_OPEN
BOTH = (OPEN, OPEN)


@pytest.mark.parametrize(("function", "causal", "window_size", "bounds"), [
    ("fa2", False, (-1, -1), BOTH), ("fa2", False, (None, None), BOTH), ("fa2", False, None, BOTH),
    ("fa2", False, [-1, None], BOTH), ("fa2", False, (-1, 0), (OPEN, 0)), ("fa2", False, (3, -1), (3, OPEN)),
    ("fa2", False, (-2, 0), (OPEN, 0)), ("fa2", False, (None, 2), (OPEN, 2)), ("fa2", True, (-1, -1), (OPEN, 0)),
    ("fa2", True, (4, 7), (4, 0)),
    ("fa4", False, (None, None), BOTH), ("fa4", False, (-1, -1), BOTH), ("fa4", True, (-1, -1), (OPEN, 0)),
    ("fa4", False, (-1, 0), (OPEN, OPEN)), ("fa4", False, (None, 0), (OPEN, 0)), ("fa4", False, (3, None), (3, OPEN)),
    ("fa4", True, (3, None), (3, 0)), ("fa4", True, (3, -1), (3, 0)), ("fa4", False, (2, -3), (OPEN, OPEN)),
    ("fa4", True, (-1, 5), (OPEN, 0)),
])  # fmt: skip
def test_window_spellings(backend: FakeBackend, registry: Path, function, causal, window_size, bounds):
    q, k, v = inputs()
    given = packed((2, 3), (4, 4))
    dense, varlen = {
        "fa2": (runtime.flash_attn_func, runtime.flash_attn_varlen_func),
        "fa4": (fa4.flash_attn_func, fa4.flash_attn_varlen_func),
    }[function]
    dense(q, k, v, causal=causal, window_size=window_size)
    varlen(**given, causal=causal, window_size=window_size)
    for made in backend.driver.launches:
        assert (made["params"]["window_left"], made["params"]["window_right"]) == bounds


@pytest.mark.parametrize(("functions", "window_size"), [
    ("fa2", 3), ("fa2", (1, 2, 3)), ("fa2", (1.5, 0)), ("fa2", ("1", 0)),
    ("fa4", (3, -1)), ("fa4", (None, -1)), ("fa4", (-1, 5)), ("fa4", (-1, None)), ("fa4", 3), ("fa4", (1.5, 0)),
])  # fmt: skip
def test_windows_that_are_refused(backend: FakeBackend, registry: Path, functions, window_size):
    function = runtime.flash_attn_func if functions == "fa2" else fa4.flash_attn_func
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            function(*inputs(), window_size=window_size)
        assert error.value.argument == "window_size" and str(error.value).startswith("window_size: ")
    assert not backend.driver.launches


SOME = object()
UNSUPPORTED = [
    ("fa2", "dropout_p", 0.1), ("fa2", "dropout_p", None), ("fa2", "num_splits", 257), ("fa2", "deterministic", "no"),
    ("fa2", "return_attn_probs", 3), ("fa2", "page_table", ints(0)), ("fa2", "block_sparse_tensors", SOME),
    ("fa2", "block_sparse_tensors_bwd", SOME), ("fa2", "learnable_sink", torch.zeros(3)), ("fa2", "qv", SOME),
    ("fa2", "k_descale", SOME), ("fa2", "pack_gqa", 7), ("fa2", "return_lse", "yes"), ("fa2", "alibi_slopes", 0.5),
    ("fa2 varlen", "page_table", SOME), ("fa2 varlen", "seqlen_k_per_split", 64), ("fa2 varlen", "dropout_p", 0.5),
    ("fa2 varlen", "scheduler_metadata", SOME), ("fa2 varlen", "seqused_k", ints(1)), ("fa2 varlen", "mask_mod", SOME),
    ("fa2 varlen", "learnable_sink", 3.0), ("fa2 varlen", "max_seqlen_q", ints(3, 4)),
    ("fa2 varlen", "disable_scheduler_metadata", SOME), ("fa2 varlen", "num_splits", -1),
    *(("fa4", name, SOME) for name in FA4.split() if name in (
        "qv", "gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars",
        "block_sparse_tensors", "block_sparse_tensors_bwd")),
    *(("fa4 varlen", name, SOME) for name in FA4_VARLEN.split() if name in (
        "qv", "gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars",
        "block_sparse_tensors", "page_table", "seqlen_k_per_split")),
    ("fa4", "num_splits", 2.5), ("fa4", "return_lse", "yes"), ("fa4 varlen", "return_lse", None),
    ("fa4", "num_splits", None), ("fa4", "pack_gqa", "no"), ("fa4", "softcap", "2"),
    ("fa4", "deterministic", None), ("fa4 varlen", "num_splits", None),
    ("fa4 varlen", "learnable_sink", torch.zeros(3)), ("fa4 varlen", "disable_scheduler_metadata", None),
]  # fmt: skip


@pytest.mark.parametrize(("function", "name", "value"), UNSUPPORTED, ids=[f"{f} {n}" for f, n, _ in UNSUPPORTED])
def test_what_is_not_supported_names_itself(backend: FakeBackend, registry: Path, function, name, value):
    module = runtime if function.startswith("fa2") else fa4
    dense = dict(zip("qkv", inputs(), strict=True))
    call, given = (module.flash_attn_varlen_func, packed((2, 3), (4, 4))) if "varlen" in function else (
        module.flash_attn_func, dense)  # fmt: skip
    call(**given)
    backend.driver.launches.clear()
    with pytest.raises(ArgumentError) as error:
        call(**given | {name: value})
    assert error.value.argument == name and str(error.value).startswith(f"{name}: ")
    assert not backend.driver.launches


def test_names_of_nobody_and_contradictions(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    for call in (runtime.flash_attn_func, fa4.flash_attn_func):
        with pytest.raises(TypeError, match="softmaxscale"):
            call(q, k, v, softmaxscale=0.1)
    with pytest.raises(TypeError, match="sink"):
        runtime.flash_attn_varlen_func(**packed(), sink=SINK)
    with pytest.raises(ArgumentError, match="ask for one") as error:
        runtime.flash_attn_func(q, k, v, return_attn_probs=True, return_lse=True)
    assert error.value.argument == "return_lse"


def test_empty_batches_and_sequences(backend: FakeBackend, registry: Path):
    for shape in ({"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}):
        q, k, v = inputs(**shape)
        out, lse, _ = runtime.flash_attn_func(q, k, v, return_attn_probs=True)
        assert out.shape == q.shape and lse.shape == (q.shape[0], 4, q.shape[1]) and not out.any()
        out, lse = fa4.flash_attn_func(q, k, v, return_lse=True)
        assert out.shape == q.shape and (lse == -torch.inf).all()
    assert runtime.flash_attn_varlen_func(**packed((), ())).shape == (0, 4, 64)
