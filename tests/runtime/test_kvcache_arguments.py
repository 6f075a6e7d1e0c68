"""`flash_attn_with_kvcache`: FlashAttention-2's signature, and what is refused under its names."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.autograd.forward_ad as fwAD

import runtime
from runtime.errors import ArgumentError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16
from tests.support.varlen import ints, tensor_at

FA2 = (
    "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale "
    "causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
)
E4M3 = torch.float8_e4m3fn
SOME = object()


def t(*shape, dtype=BF16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def call(**changes):
    """A call that appends with rotary embedding, changed."""
    new, angle = t(2, 1, 2, 64), t(9, 16)
    given = {"q": t(2, 1, 4, 64), "k_cache": t(6, 4, 2, 64), "v_cache": t(6, 4, 2, 64), "k": new, "v": new.clone(),
             "rotary_cos": angle, "rotary_sin": angle, "cache_seqlens": ints(3, 5),
             "block_table": ints(0, 1, 2, 3).view(2, 2)}  # fmt: skip
    return given | changes


def fp8(**changes):
    return call(k_cache=t(6, 4, 2, 64, dtype=E4M3), v_cache=t(6, 4, 2, 64, dtype=E4M3), **changes)


def test_positional_order_is_upstream_s():
    """Flash-attention 0251105a, flash_attn_interface.py."""
    parameters = inspect.signature(runtime.flash_attn_with_kvcache).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == FA2.split()
    defaults = {p.name: p.default for p in parameters}
    assert (defaults["window_size"], defaults["rotary_interleaved"], defaults["num_splits"]) == ((-1, -1), True, 0)


CASES = {
    "leftpad dtype": (call(cache_leftpad=ints(0, 0).long()), "cache_leftpad", "dtype"),
    "leftpad shape": (call(cache_leftpad=ints(0)), "cache_leftpad", "shape"),
    "q kind": (call(q=[[1.0]]), "q", "type"),
    "q kind and an int": (call(q=None, cache_seqlens=3), "q", "type"),
    "q packed": (call(q=t(2, 4, 64)), "q", "rank"),
    "cache kind": (call(k_cache=None), "k_cache", "type"),
    "cache rank": (call(v_cache=t(6, 4, 64)), "v_cache", "rank"),
    "cache dtype": (call(k_cache=t(6, 4, 2, 64, dtype=torch.float16)), "k_cache", "dtype"),
    "caches of two dtypes": (call(v_cache=t(6, 4, 2, 64, dtype=E4M3)), "v_cache", "dtype"),
    "caches of two shapes": (call(v_cache=t(5, 4, 2, 64)), "v_cache", "shape"),
    "cache head_dim": (call(k_cache=t(6, 4, 2, 32)), "k_cache", "shape"),
    "cache heads": (call(q=t(2, 1, 5, 64)), "q", "heads"),
    "cache stride": (call(k_cache=t(6, 4, 2, 68)[..., :64]), "k_cache", "stride"),
    "fp8 cache stride": (fp8() | {"k_cache": t(6, 4, 2, 72, dtype=E4M3)[..., :64]}, "k_cache", "stride"),
    "fp8 head_dim": (
        fp8() | {"q": t(2, 1, 4, 72), "k_cache": t(6, 4, 2, 72, dtype=E4M3), "k": t(2, 1, 2, 72)}, "q", "head_dim",
    ),
    "expanded cache": (call(v_cache=t(1, 4, 2, 64).expand(6, 4, 2, 64)), "v_cache", "overlap"),
    "entries": (call(block_table=None, k_cache=t(1, 4, 2, 64), v_cache=t(1, 4, 2, 64)), "k_cache", "shape"),
    "k alone": (call(v=None), "v", "value"),
    "v alone": (call(k=None), "k", "value"),
    "k shape": (call(k=t(2, 1, 4, 64)), "k", "shape"),
    "k batch": (call(k=t(1, 1, 2, 64)), "k", "shape"),
    "v length": (call(v=t(2, 2, 2, 64)), "v", "shape"),
    "k dtype": (call(k=t(2, 1, 2, 64, dtype=torch.float16)), "k", "dtype"),
    "no lengths": (call(cache_seqlens=None), "cache_seqlens", "value"),
    "lengths dtype": (call(cache_seqlens=torch.tensor([3, 5])), "cache_seqlens", "dtype"),
    "lengths shape": (call(cache_seqlens=ints(3)), "cache_seqlens", "shape"),
    "negative length": (call(cache_seqlens=-1), "cache_seqlens", "value"),
    "lengths kind": (call(cache_seqlens=[3, 5]), "cache_seqlens", "type"),
    "cos alone": (call(rotary_sin=None), "rotary_sin", "value"),
    "sin alone": (call(rotary_cos=None), "rotary_cos", "value"),
    "rotary alone": (call(k=None, v=None), "rotary_cos", "value"),
    "rotary_dim": (call(rotary_cos=t(9, 12), rotary_sin=t(9, 12)), "rotary_cos", "shape"),
    "rotary_dim beyond": (call(rotary_cos=t(9, 40), rotary_sin=t(9, 40)), "rotary_cos", "shape"),
    "no positions": (call(rotary_cos=t(0, 16), rotary_sin=t(0, 16)), "rotary_cos", "shape"),
    "sin shape": (call(rotary_sin=t(8, 16)), "rotary_sin", "shape"),
    "cos dtype": (call(rotary_cos=t(9, 16, dtype=torch.float32)), "rotary_cos", "dtype"),
    "interleaved": (call(rotary_interleaved="yes"), "rotary_interleaved", "type"),
    "table rank": (call(block_table=ints(0, 1)), "block_table", "rank"),
    "table dtype": (call(block_table=torch.zeros(2, 2, dtype=torch.int64)), "block_table", "dtype"),
    "table batch": (call(block_table=ints(0, 1).view(1, 2)), "block_table", "shape"),
    "table and index": (call(cache_batch_idx=ints(0, 1)), "cache_batch_idx", "value"),
    "index kind": (call(block_table=None, cache_batch_idx=[0, 1]), "cache_batch_idx", "type"),
    "index dtype": (call(block_table=None, cache_batch_idx=torch.tensor([0, 1])), "cache_batch_idx", "dtype"),
    "index shape": (call(block_table=None, cache_batch_idx=ints(0)), "cache_batch_idx", "shape"),
    "descale of bf16": (call(v_descale=torch.ones(2)), "v_descale", "unsupported"),
    "descale shape": (fp8(v_descale=torch.ones(4)), "v_descale", "shape"),
    "descale dtype": (fp8(k_descale=torch.ones(2, dtype=BF16)), "k_descale", "dtype"),
    "window": (call(window_size=3), "window_size", "type"),
    "window of no integer": (call(window_size=(1.5, 0)), "window_size", "value"),
    "splits": (call(num_splits=1000), "num_splits", "value"),
    "lse": (call(return_softmax_lse="yes"), "return_softmax_lse", "type"),
    "out": (call(out=t(2, 1, 4, 32)), "out", "shape"),
    "sink": (call(sink=t(3)), "sink", "shape"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "argument", "reason"), CASES.values(), ids=CASES)
def test_refusals(backend: FakeBackend, given, argument, reason):
    with pytest.raises(ArgumentError) as error:
        runtime.flash_attn_with_kvcache(**given)
    assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    assert str(error.value).startswith(f"{argument}: ")
    assert not backend.driver.calls and not plans.plans.by_call


@pytest.mark.usefixtures("cache_registry")
def test_what_a_key_leaves_open_is_refused_warm(backend: FakeBackend):
    runtime.flash_attn_with_kvcache(**call())
    launches = len(backend.driver.launches)
    crooked, bare = t(6 * 4 * 2 * 64 + 8)[4:-4], t(2, 1, 2, 64)
    bare.untyped_storage().resize_(0)
    for changes, argument, reason in (
        ({"k_cache": crooked.view(6, 4, 2, 64)}, "k_cache", "alignment"),
        ({"v": bare}, "v", "storage"),
    ):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_with_kvcache(**call(**changes))
        assert (error.value.argument, error.value.reason) == (argument, reason), error.value
    with fwAD.dual_level(), pytest.raises(ArgumentError, match="tangent") as error:
        runtime.flash_attn_with_kvcache(**call(k=fwAD.make_dual(t(2, 1, 2, 64), t(2, 1, 2, 64))))
    assert error.value.argument == "k" and len(backend.driver.launches) == launches


def filled():
    """A call with all that may require grad, of numbers that are not 0."""
    torch.manual_seed(3)
    given = call(sink=torch.zeros(4), alibi_slopes=torch.zeros(4))
    for name, tensor in given.items():
        if tensor.is_floating_point():
            given[name] = torch.randn_like(tensor)
    return given


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("wanting", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "sink", "alibi_slopes"])
def test_a_gradient_is_refused_when_it_is_asked_for(backend: FakeBackend, wanting):
    """FlashAttention-2's function "does not support backward pass": it is no autograd Function, its output requires no
    grad, and what leads through it is missing from a gradient without a word."""
    want, want_lse = runtime.flash_attn_with_kvcache(**filled(), return_softmax_lse=True)
    for _ in range(2):
        given = filled()
        given[wanting].requires_grad_()
        out, lse = runtime.flash_attn_with_kvcache(**given, return_softmax_lse=True)
        assert torch.equal(out, want) and torch.equal(lse, want_lse) and out.requires_grad and lse.requires_grad
        for asked in (out, lse):
            with pytest.raises(ArgumentError, match="not implemented over a cache") as error:
                asked.sum().backward()
            assert (error.value.argument, error.value.reason) == (wanting, "requires_grad")
        with torch.no_grad():
            assert not runtime.flash_attn_with_kvcache(**given).requires_grad
        with pytest.raises(ArgumentError, match="leave it out") as error:
            runtime.flash_attn_with_kvcache(**given, out=torch.empty_like(want))
        assert error.value.argument == "out"


@pytest.mark.usefixtures("cache_registry")
def test_an_out_of_another_call_keeps_that_one_s_names(backend: FakeBackend):
    given = filled()
    given["k_cache"].requires_grad_()
    out = runtime.flash_attn_with_kvcache(**given)
    with torch.no_grad():
        assert runtime.flash_attn_with_kvcache(**filled(), out=out) is out
    with pytest.raises(ArgumentError) as error:
        out.sum().backward()
    assert error.value.argument == "k_cache"


def misplaced(tensor):
    """The same numbers where the kernels cannot read them: the last dimension not contiguous, then an odd address."""
    yield tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack((tensor, tensor), 1)[:, 0]
    size = tensor.element_size()
    buffer = torch.zeros(tensor.numel() * size + 2 * 16, dtype=torch.uint8)
    offset = -buffer.data_ptr() % 16 + 2
    yield tensor_at(buffer[offset : offset + tensor.numel() * size], tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("name", ["q", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "sink", "alibi_slopes"])
def test_what_the_kernels_cannot_read_is_copied(backend: FakeBackend, name):
    """The last dimension as upstream does it, whose kernels need no aligned address. A cache is not copied there."""
    first = filled()
    want = runtime.flash_attn_with_kvcache(**first)
    for _ in range(2):
        for crooked in misplaced(filled()[name]):
            given = filled() | {name: crooked}
            assert torch.equal(runtime.flash_attn_with_kvcache(**given), want)
            assert torch.equal(given["k_cache"], first["k_cache"]) and torch.equal(given["v_cache"], first["v_cache"])


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("appends", [True, False])
def test_head_dims_of_a_cache_are_padded(backend: FakeBackend, appends):
    """As upstream does it: the whole cache is copied in each call, and back again where something was appended."""
    narrow = filled() if appends else filled() | dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin"))
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        if narrow[name] is not None:
            narrow[name] = narrow[name][..., :60].clone()
    wide = dict(narrow)
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        if wide[name] is not None:
            wide[name] = torch.nn.functional.pad(wide[name], (0, 4))
    want, want_lse = runtime.flash_attn_with_kvcache(**wide, softmax_scale=60**-0.5, return_softmax_lse=True)
    before = narrow["k_cache"].clone()
    for _ in range(2):
        out, lse = runtime.flash_attn_with_kvcache(**narrow, return_softmax_lse=True)
        assert out.shape[-1] == 60 and torch.equal(out, want[..., :60]) and torch.equal(lse, want_lse)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(narrow[name], wide[name][..., :60])
    assert torch.equal(narrow["k_cache"], before) is not appends
    out = runtime.flash_attn_with_kvcache(**narrow | {"q": narrow["q"].requires_grad_()})
    with pytest.raises(ArgumentError, match="not implemented over a cache") as error:
        out.sum().backward()
    assert error.value.argument == "q"


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("name", ["k_cache", "v_cache", "out"])
def test_what_is_written_or_large_is_not_copied(backend: FakeBackend, name):
    given = filled() | {"out": t(2, 1, 4, 64)}
    for crooked, reason in zip(misplaced(given[name]), ("contiguity", "alignment"), strict=True):
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn_with_kvcache(**given | {name: crooked})
        assert (error.value.argument, error.value.reason) == (name, reason)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_tokens_too_far_apart_are_refused(backend: FakeBackend, name: str):
    far = torch.empty(2**31 + 2 * 64, dtype=BF16).as_strided((1, 2, 2, 64), (2**32, 2**31, 64, 1))  # never touched
    given = {"k_cache": t(1, 2, 2, 64), "v_cache": t(1, 2, 2, 64)} | {name: far}
    with pytest.raises(ArgumentError, match=r"below 2\*\*31") as error:
        runtime.flash_attn_with_kvcache(t(1, 1, 4, 64), **given)
    assert (error.value.argument, error.value.reason) == (name, "stride")
