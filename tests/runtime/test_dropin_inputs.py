"""What FlashAttention's functions take beyond ours: packed arrays, tensors that are copied, padded or converted first,
splits, and the LSE that comes with gradients. Each with its gradients, against ours of plain inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import runtime
from runtime import fa4
from runtime.errors import ArgumentError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, inputs, reference
from tests.support.backward import SINK, leaves
from tests.support.varlen import ints, packed

pytestmark = pytest.mark.usefixtures("backward_registry")

FP16 = torch.float16
SLOPES = torch.tensor([0.5, 0.1, 0.0, 2.0])


def dout_of(out):
    torch.manual_seed(5)
    return torch.randn(out.shape).to(out.dtype)


def gradients(out, *given):
    return torch.autograd.grad(out, given, dout_of(out))


def equal(found, want):
    return all(torch.equal(*pair) for pair in zip(found, want, strict=True))


# -- packed arrays ----------------------------------------------------------------------------------------------------

OPTIONS = (0.0, 0.3, True, (2, -1), 0.9, SLOPES, False, True)  # from dropout_p to return_attn_probs
OURS = {"softmax_scale": 0.3, "causal": True, "window": (2, None), "softcap": 0.9, "alibi_slopes": SLOPES,
        "return_lse": True}  # fmt: skip


def test_qkv_in_one(backend: FakeBackend):
    torch.manual_seed(1)
    (qkv,) = leaves(torch.randn(2, 5, 3, 4, 64).to(BF16))
    parts = leaves(*(qkv[:, :, i] for i in range(3)))
    out, lse, probs = runtime.flash_attn_qkvpacked_func(qkv, *OPTIONS)
    want, want_lse = runtime.flash_attn(*parts, **OURS)
    assert equal((out, lse), (want, want_lse)) and probs.numel() == 0
    (found,) = gradients(out, qkv)
    assert torch.equal(found, torch.stack(gradients(want, *parts), 2)) and found.is_contiguous()
    assert torch.equal(runtime.flash_attn_qkvpacked_func(qkv), runtime.flash_attn(*parts))


def test_kv_in_one(backend: FakeBackend):
    q, k, v = leaves(*inputs())
    (kv,) = leaves(torch.stack((k, v), 2))
    out, lse, probs = runtime.flash_attn_kvpacked_func(q, kv, *OPTIONS)
    want, want_lse = runtime.flash_attn(q, k, v, **OURS)
    assert equal((out, lse), (want, want_lse)) and probs.numel() == 0
    dq, dkv = gradients(out, q, kv)
    assert equal((dq, *dkv.unbind(2)), gradients(want, q, k, v)) and dkv.is_contiguous()
    assert torch.equal(runtime.flash_attn_kvpacked_func(q, kv), runtime.flash_attn(q, k, v))


def test_varlen_qkv_in_one(backend: FakeBackend):
    torch.manual_seed(1)
    (qkv,), starts = leaves(torch.randn(9, 3, 4, 64).to(BF16)), ints(0, 3, 3, 9)
    parts = leaves(*qkv.unbind(1))
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    out, lse, probs = runtime.flash_attn_varlen_qkvpacked_func(qkv, starts, 6, *OPTIONS)
    want, want_lse = runtime.flash_attn_varlen(*parts, **lengths, **OURS)
    assert equal((out, lse), (want, want_lse)) and probs.numel() == 0
    (found,) = gradients(out, qkv)
    assert torch.equal(found, torch.stack(gradients(want, *parts), 1)) and found.is_contiguous()
    assert torch.equal(
        runtime.flash_attn_varlen_qkvpacked_func(qkv, starts, 6), runtime.flash_attn_varlen(*parts, **lengths)
    )


def test_varlen_kv_in_one(backend: FakeBackend):
    given = packed((2, 3), (4, 5))
    q, k, v = leaves(given["q"], given["k"], given["v"])
    (kv,), lengths = leaves(torch.stack((k, v), 1)), {name: given[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    out, lse, probs = runtime.flash_attn_varlen_kvpacked_func(q, kv, *lengths.values(), 3, 5, *OPTIONS)
    want, want_lse = runtime.flash_attn_varlen(q, k, v, **lengths, **OURS)
    assert equal((out, lse), (want, want_lse)) and probs.numel() == 0
    dq, dkv = gradients(out, q, kv)
    assert equal((dq, *dkv.unbind(1)), gradients(want, q, k, v)) and dkv.is_contiguous()
    assert torch.equal(runtime.flash_attn_varlen_kvpacked_func(q, kv, *lengths.values(), 3, 5),
                       runtime.flash_attn_varlen(q, k, v, **lengths))  # fmt: skip


def test_a_warm_call_of_packed_arrays_makes_no_plan(backend: FakeBackend):
    qkv, starts = torch.randn(2, 5, 3, 4, 64).to(BF16), ints(0, 4, 10)
    for _ in range(2):
        runtime.flash_attn_qkvpacked_func(qkv)
        runtime.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), starts, 6)
        runtime.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), starts, torch.tensor(6))
        assert len(plans.plans.by_call) == 2


QKV, KV, STARTS = torch.zeros(2, 5, 3, 4, 64, dtype=BF16), torch.zeros(2, 5, 2, 4, 64, dtype=BF16), ints(0, 5, 10)
PACKED_CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str, str]] = {
    "qkv kind": (runtime.flash_attn_qkvpacked_func, ([1],), {}, "qkv", "type"),
    "qkv rank": (runtime.flash_attn_qkvpacked_func, (QKV[0],), {}, "qkv", "rank"),
    "qkv of two": (runtime.flash_attn_qkvpacked_func, (KV,), {}, "qkv", "shape"),
    "qkv dtype": (runtime.flash_attn_qkvpacked_func, (QKV.float(),), {}, "qkv", "dtype"),
    "qkv device": (runtime.flash_attn_qkvpacked_func, (QKV.to("meta"),), {}, "qkv", "device"),
    "qkv dropout": (runtime.flash_attn_qkvpacked_func, (QKV, 0.1), {}, "dropout_p", "unsupported"),
    "qkv window": (runtime.flash_attn_qkvpacked_func, (QKV,), {"window_size": 3}, "window_size", "type"),
    "kv kind": (runtime.flash_attn_kvpacked_func, (QKV[:, :, 0], None), {}, "kv", "type"),
    "kv of three": (runtime.flash_attn_kvpacked_func, (QKV[:, :, 0], QKV), {}, "kv", "shape"),
    "kv dtype": (runtime.flash_attn_kvpacked_func, (QKV[:, :, 0], KV.half()), {}, "kv", "dtype"),
    "q of kv": (runtime.flash_attn_kvpacked_func, (QKV[:, :, 0].float(), KV), {}, "q", "dtype"),
    "varlen qkv rank": (runtime.flash_attn_varlen_qkvpacked_func, (QKV, STARTS, 5), {}, "qkv", "rank"),
    "varlen qkv lengths": (
        runtime.flash_attn_varlen_qkvpacked_func, (QKV.flatten(0, 1), STARTS.long(), 5), {}, "cu_seqlens", "dtype"
    ),
    "varlen qkv hint": (
        runtime.flash_attn_varlen_qkvpacked_func, (QKV.flatten(0, 1), STARTS, "5"), {}, "max_seqlen", "value"
    ),
    "varlen kv lengths": (
        runtime.flash_attn_varlen_kvpacked_func, (QKV[0, :, 0], KV.flatten(0, 1), STARTS[:2], STARTS.half(), 5, 5), {},
        "cu_seqlens_k", "dtype",
    ),
    "varlen kv flag": (
        runtime.flash_attn_varlen_kvpacked_func, (QKV.flatten(0, 1)[:, 0], KV.flatten(0, 1), STARTS, STARTS, 5, 5),
        {"return_attn_probs": "yes"}, "return_attn_probs", "type",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "given", "options", "argument", "reason"), PACKED_CASES.values(), ids=PACKED_CASES
)
def test_refusals_have_the_names_of_packed_arrays(backend: FakeBackend, function, given, options, argument, reason):
    with pytest.raises(ArgumentError) as error:
        function(*given, **options)
    assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    assert not backend.driver.launches


# -- copies -----------------------------------------------------------------------------------------------------------


def by_columns(tensor):
    """The last dimension not contiguous."""
    return tensor.mT.contiguous().mT


def every_other(tensor):
    return torch.stack((tensor, tensor), -1)[..., 0]


def misaligned(tensor):
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


def odd_rows(tensor):
    """Heads whose stride is no multiple of 16 bytes."""
    return torch.nn.functional.pad(tensor, (0, 4))[..., :-4]


ARRANGED = [by_columns, every_other, misaligned, odd_rows]
DENSE = [runtime.flash_attn_func, fa4.flash_attn_func]
VARLEN = [runtime.flash_attn_varlen_func, fa4.flash_attn_varlen_func]


def out_of(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("function", DENSE, ids=["fa2", "fa4"])
def test_dense_inputs_that_the_kernels_cannot_read_are_copied(backend: FakeBackend, function, arranged):
    given = leaves(*inputs())
    want = runtime.flash_attn(*given, causal=True)
    wanted = gradients(want, *given)
    for places in ((0,), (1,), (2,), (0, 1, 2)):
        made = [arranged(t) if place in places else t for place, t in enumerate(given)]
        for _ in range(2):
            out = out_of(function(*made, causal=True))
            assert torch.equal(out, want)
        assert equal(gradients(out, *given), wanted)


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("function", VARLEN, ids=["fa2", "fa4"])
def test_packed_inputs_that_the_kernels_cannot_read_are_copied(backend: FakeBackend, function, arranged):
    plain = packed((2, 3), (4, 5))
    tensors = [plain.pop(name) for name in "qkv"]
    mine, given = leaves(*tensors), leaves(*tensors)
    want = runtime.flash_attn_varlen(*mine, **plain)
    lengths = {name: every_other(starts) for name, starts in plain.items()}
    out = out_of(function(*map(arranged, given), **lengths))
    assert torch.equal(out, want)
    assert equal(gradients(out, *given), gradients(want, *mine))


@pytest.mark.parametrize("arranged", [by_columns, every_other, misaligned])
def test_ours_are_not_copied(backend: FakeBackend, arranged):
    """A copy that nobody asked for is time and memory that nobody sees."""
    q, k, v = inputs()
    with pytest.raises(ArgumentError) as error:
        runtime.flash_attn(q, arranged(k), v)
    assert error.value.argument == "k" and error.value.reason in ("contiguity", "alignment")


def test_sinks_and_slopes_are_copied_too(backend: FakeBackend):
    q, k, v = inputs()
    want = runtime.flash_attn(q, k, v, sink=SINK, alibi_slopes=SLOPES)
    found = runtime.flash_attn_func(q, k, v, learnable_sink=every_other(SINK), alibi_slopes=every_other(SLOPES))
    assert torch.equal(found, want)
    qkv = torch.stack((q, q, q), 2)
    assert torch.equal(runtime.flash_attn_qkvpacked_func(by_columns(qkv)), runtime.flash_attn_qkvpacked_func(qkv))


# -- head dims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", DENSE, ids=["fa2", "fa4"])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(60, 60), (60, 64), (64, 33), (7, 120)])
def test_head_dims_are_padded(backend: FakeBackend, function, head_dim, head_dim_v):
    """To multiples of 8. The scale is that of the head as it was given, and so are the gradients' shapes."""
    given = leaves(*inputs(head_dim=head_dim, head_dim_v=head_dim_v))
    whole = leaves(*(torch.nn.functional.pad(t, (0, -t.shape[-1] % 8)) for t in given))
    out = out_of(function(*given, causal=True))
    ours = runtime.flash_attn(*whole, causal=True, softmax_scale=head_dim**-0.5)[..., :head_dim_v]
    assert out.shape == (2, 5, 4, head_dim_v) and torch.equal(out, ours)
    want, _ = reference(*[t.detach() for t in given], causal=True)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    found = gradients(out, *given)
    assert equal(found, [g[..., : t.shape[-1]] for g, t in zip(gradients(ours, *whole), given, strict=True)])
    scaled = out_of(function(*given, softmax_scale=0.3))
    assert torch.equal(scaled, runtime.flash_attn(*whole, softmax_scale=0.3)[..., :head_dim_v])


def test_head_dims_of_packed_arrays_are_padded(backend: FakeBackend):
    given = packed((2, 3), (4, 5), head_dim=60, head_dim_v=60)
    for function in VARLEN:
        out = out_of(function(**given, causal=True))
        wide = {name: torch.nn.functional.pad(given[name], (0, 4)) for name in "qkv"}
        assert torch.equal(
            out, runtime.flash_attn_varlen(**given | wide, causal=True, softmax_scale=60**-0.5)[..., :60]
        )
    out, lse, _ = runtime.flash_attn_func(*inputs(head_dim=60), return_attn_probs=True)
    assert out.shape[-1] == 60 and lse.shape == (2, 4, 5)


@pytest.mark.parametrize("head_dim", [0, 257, 264])
def test_head_dims_that_no_padding_serves_are_refused(backend: FakeBackend, head_dim):
    for function in DENSE:
        with pytest.raises(ArgumentError) as error:
            function(*inputs(head_dim=head_dim))
        assert error.value.reason == "head_dim"


# -- sinks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(BF16, FP16), (FP16, BF16)])
def test_a_sink_of_the_other_16_bits_is_converted(backend: FakeBackend, dtypes):
    """Its gradient is of its own dtype."""
    of_q, of_sink = dtypes
    given = leaves(*inputs(dtype=of_q))
    (sink,) = leaves(SINK.to(of_sink))
    exact = leaves(*given, SINK)
    want = runtime.flash_attn(*exact[:3], sink=exact[3])
    wanted = gradients(want, *exact)
    calls = [
        lambda: runtime.flash_attn(*given, sink=sink),
        lambda: runtime.flash_attn_varlen(*given, sink=sink),
        lambda: runtime.flash_attn_func(*given, learnable_sink=sink),
        lambda: fa4.flash_attn_func(*given, learnable_sink=sink)[0],
        lambda: fa4.flash_attn_varlen_func(*given, learnable_sink=sink)[0],
    ]
    for call in calls:
        kept = []
        for _ in range(2):
            out = call()
            kept.append(len(plans.plans.by_call))
            assert torch.equal(out, want)
            *found, of = gradients(out, *given, sink)
            assert equal(found, wanted[:3]) and of.dtype == of_sink and torch.equal(of, wanted[3].to(of_sink))
        assert kept[0] == kept[1]


# -- LSE and splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanting", ["q", "k", "v", "learnable_sink"])
def test_fa4_returns_the_lse_where_an_input_requires_grad(backend: FakeBackend, wanting):
    """Upstream asks for requires_grad alone, not whether autograd records."""
    q, k, v = inputs()
    dense = {"q": q, "k": k, "v": v, "learnable_sink": SINK}
    for function, given in (
        (fa4.flash_attn_func, dense),
        (fa4.flash_attn_varlen_func, packed() | {"learnable_sink": SINK}),
    ):
        assert function(**given)[1] is None
        _, want = function(**given, return_lse=True)
        given[wanting] = given[wanting].clone().requires_grad_()
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                out, lse = function(**given)
            assert torch.equal(lse, want) and out.requires_grad is lse.requires_grad is enabled
    with pytest.raises(ArgumentError) as error:
        fa4.flash_attn_func(q.requires_grad_(), k, v, return_lse="yes")
    assert error.value.argument == "return_lse"


@pytest.fixture
def caches(backward_registry, cache_template):
    """A registry with a cache's kernels in place of the backward's."""
    runtime.configure(registry=cache_template)


def splits_of(backend):
    made = backend.driver.launched("fwd_paged")
    return made[-1]["params"]["num_splits"] if made else 1


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("function", [*DENSE, *VARLEN], ids=["fa2", "fa4", "fa2 varlen", "fa4 varlen"])
def test_splits_of_dense_keys(backend: FakeBackend, function):
    q, k, v = inputs(seqlen_k=70)
    want, want_lse = runtime.flash_attn(q, k, v, causal=True, return_lse=True)
    for num_splits in (3, torch.tensor(3)):
        out, lse = function(q, k, v, causal=True, num_splits=num_splits, return_lse=True)
        assert splits_of(backend) == 3 and len(backend.driver.launched("fwd_combine"))
        torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)
    crooked = function(by_columns(q), by_columns(k), v, causal=True, num_splits=3, return_lse=True)
    assert equal(crooked, (out, lse))
    made = len(backend.driver.launches)
    for num_splits in (0, 1):
        function(q, k, v, num_splits=num_splits)
    assert len(backend.driver.launches) == made + 2


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("function", VARLEN, ids=["fa2", "fa4"])
def test_splits_of_keys_that_cannot_be_split(backend: FakeBackend, function):
    """They change no result: the keys stay together."""
    for given in (packed(), dict(zip("qkv", inputs(), strict=True)) | {"seqused_q": ints(5, 5)}):
        want = out_of(function(**given))
        assert torch.equal(out_of(function(**given, num_splits=7)), want)
        assert not backend.driver.launched("fwd_paged")
        with pytest.raises(ArgumentError) as error:
            function(**given, num_splits=300)
        assert error.value.argument == "num_splits"


@pytest.mark.parametrize("function", [*DENSE, *VARLEN, runtime.flash_attn_varlen],
                         ids=["fa2", "fa4", "fa2 varlen", "fa4 varlen", "ours"])  # fmt: skip
def test_splits_are_left_out_where_an_input_requires_grad(backend: FakeBackend, function):
    """Upstream's backward does not know of splits: the gradients are those of the whole."""
    given = leaves(*inputs(seqlen_k=70))
    out, want = out_of(function(*given, num_splits=3)), runtime.flash_attn(*given)
    assert torch.equal(out, want) and equal(gradients(out, *given), gradients(want, *given))
    with pytest.raises(ArgumentError) as error:
        function(*given, num_splits=300)
    assert error.value.argument == "num_splits"


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("function", VARLEN, ids=["fa2", "fa4"])
@pytest.mark.parametrize("wanting", ["q", "k", "learnable_sink"])
def test_a_gradient_through_pages_is_refused_when_it_is_asked_for(backend: FakeBackend, function, wanting):
    """Upstream's forward runs, too; its backward takes no table, and fails at the shapes of k and v."""
    q, k, v = inputs(seqlen_k=16)
    table = {"block_table" if function is runtime.flash_attn_varlen_func else "page_table": ints(0, 1).view(2, 1)}
    given = {"q": q, "k": k, "v": v, "learnable_sink": SINK, "seqused_k": ints(9, 16)} | table
    want = out_of(function(**given))
    given[wanting] = given[wanting].clone().requires_grad_()
    for crooked in (False, True):
        out = out_of(function(**given | ({"v": by_columns(v)} if crooked else {})))
        assert torch.equal(out, want) and out.requires_grad
        with pytest.raises(ArgumentError, match="not implemented over a cache") as error:
            out.sum().backward()
        assert (error.value.argument, error.value.reason) == (wanting, "requires_grad")
    with torch.no_grad():
        assert not out_of(function(**given)).requires_grad


@pytest.mark.usefixtures("caches")
def test_padding_hides_no_rotation_and_loses_no_out(backend: FakeBackend):
    q, k, v = (torch.zeros(1, n, 2, 60, dtype=torch.bfloat16) for n in (1, 64, 64))
    new = torch.zeros(1, 1, 2, 60, dtype=torch.bfloat16)
    table = torch.zeros(64, 32, dtype=torch.bfloat16)
    lengths = torch.ones(1, dtype=torch.int32)
    for name, more in (("rotary_cos", (new, new, table, table)), ("out", ())):
        given = {"out": torch.empty_like(q)} if name == "out" else {}
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_with_kvcache(q, k, v, *more, cache_seqlens=lengths, causal=True, **given)
        assert error.value.argument == name and "60" in str(error.value)


def test_what_padding_cannot_serve_is_refused_as_it_was_given(backend: FakeBackend):
    q = torch.zeros(1, 4, 2, 257, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="257"):
        runtime.flash_attn_func(q, q, q)


def test_odd_kinds_of_tensors_are_refused_by_their_layout(backend: FakeBackend):
    nested = torch.nested.nested_tensor([torch.zeros(4, 3, 2, 64), torch.zeros(3, 3, 2, 64)], dtype=torch.bfloat16)
    with pytest.raises(ArgumentError) as error:
        runtime.flash_attn_qkvpacked_func(nested)
    assert (error.value.argument, error.value.reason) == ("qkv", "layout")
    q, cache = torch.zeros(4, 2, 64, dtype=torch.bfloat16), torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)
    table, starts = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    for odd in (torch.tensor(4, dtype=torch.int32), starts[None], starts.to_sparse(), [0, 4]):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_varlen_func(q, cache, cache, starts, odd, 4, 4, block_table=table)
        assert error.value.argument == "cu_seqlens_k"
