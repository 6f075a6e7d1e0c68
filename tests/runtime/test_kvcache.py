"""`flash_attn_with_kvcache` on the CPU: fake kernels read pages, lengths and splits from a kernel's own parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import runtime
from registry.contract import WINDOW_OPEN, fast_divmod
from runtime.api import attention
from runtime.call import launch, plan
from runtime.errors import ArgumentError, CaptureError, DriverError
from runtime.load import kernel, plans, select, session
from tests.runtime.fakes import FakeBackend
from tests.support.abis import FWD_PAGED
from tests.support.attention import BF16, reference
from tests.support.kvcache import E4M3, NOWHERE, Cache, queries, rotated
from tests.support.varlen import ints

pytestmark = pytest.mark.usefixtures("cache_registry")


def check(q, cache, *, num_splits=0, options=None, **arguments):
    """Against the reference, entry by entry. options: of the reference; arguments: as the function calls them."""
    out, lse = runtime.flash_attn_with_kvcache(
        q, cache.k, cache.v, cache_seqlens=cache.lengths, block_table=cache.table, num_splits=num_splits,
        return_softmax_lse=True, **arguments,
    )  # fmt: skip
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    for b, n in enumerate(cache.lengths.tolist()):
        want, want_lse = cache.wanted(q, b, n, **options or {})
        torch.testing.assert_close(out[b : b + 1].double(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[b : b + 1], want_lse.float(), atol=1e-3, rtol=1e-4)
    return out


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("num_splits", [0, 1, 2, 5])
def test_pages_and_splits(backend: FakeBackend, page_size, num_splits):
    cache = Cache((page_size - 1, page_size, page_size + 1, 0, 40), page_size, max_pages=-(-40 // page_size) + 2)
    for _ in range(2):
        check(queries(5), cache, num_splits=num_splits)
        check(queries(5, 3), cache, num_splits=num_splits, causal=True, options={"causal": True})


@pytest.mark.parametrize(("arguments", "options"), [
    ({"window_size": (3, 1)}, {"window": (3, 1)}), ({"window_size": (4, -1)}, {"window": (4, None)}),
    ({"softcap": 0.8, "softmax_scale": 0.4}, {"softcap": 0.8, "softmax_scale": 0.4}),
    ({"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0]), "causal": True},
     {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0]), "causal": True}),
    ({"sink": torch.tensor([1.0, -2, 0, 5])}, {"sink": torch.tensor([1.0, -2, 0, 5])}),
    ({"sink": torch.tensor([1.0, -2, 0, 5]).to(BF16)}, {"sink": torch.tensor([1.0, -2, 0, 5]).to(BF16)}),
], ids=lambda options: " ".join(options))  # fmt: skip
@pytest.mark.parametrize("num_splits", [1, 3])
def test_masks_and_scores(backend: FakeBackend, arguments, options, num_splits):
    check(queries(seqlen_q=2), Cache((5, 0, 70), max_pages=20), num_splits=num_splits, options=options, **arguments)


@pytest.mark.parametrize(("heads", "dims", "dtype"), [
    ((4, 4), (64, 64), torch.float16), ((8, 1), (72, 40), BF16), ((6, 3), (128, 64), torch.float16),
], ids=str)  # fmt: skip
def test_heads_and_head_dims(backend: FakeBackend, heads, dims, dtype):
    cache = Cache(heads_kv=heads[1], head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    for num_splits in (1, 2):
        out = check(queries(heads_q=heads[0], head_dim=dims[0], dtype=dtype), cache, num_splits=num_splits)
        assert out.shape == (3, 1, heads[0], dims[1]) and out.is_contiguous()


def test_a_contiguous_cache(backend: FakeBackend):
    cache = Cache((5, 9, 12), page_size=12, max_pages=1)
    rows = cache.table[:, 0]
    for lengths, tokens in ((cache.lengths, (5, 9, 12)), (5, (5, 5, 5)), (None, ())):
        out = runtime.flash_attn_with_kvcache(queries(), cache.k, cache.v, cache_seqlens=lengths, cache_batch_idx=rows)
        inorder = [x[rows.long()].contiguous() for x in (cache.k, cache.v)]
        plain = runtime.flash_attn_with_kvcache(queries(), *inorder, cache_seqlens=lengths)
        assert torch.equal(out.nan_to_num(), plain.nan_to_num())
        for b, n in enumerate(tokens):
            want, _ = cache.wanted(queries(), b, n)
            torch.testing.assert_close(out[b : b + 1].double(), want, atol=2e-2, rtol=2e-2)
    p = backend.driver.launches[-1]["params"]
    assert (p["page_table"], p["page_size"], p["seqlen_k"], p["seqused_k"]) == (0, 12, 12, 0)


def test_two_halves_of_one_array_and_shared_pages(backend: FakeBackend):
    cache = Cache((8, 3))
    both = torch.stack((cache.k, cache.v), 1)
    cache.k, cache.v = both[:, 0], both[:, 1]
    cache.table[1] = cache.table[0]
    check(queries(2), cache)
    wide = torch.full((2, 20), NOWHERE, dtype=torch.int32)
    wide[:, :6] = cache.table
    cache.table = wide[:, :6]
    check(queries(2), cache)
    assert backend.driver.launches[-1]["params"]["page_table_stride"] == 20
    cache.table = cache.table[:1].expand(2, 6)
    check(queries(2), cache)


def test_the_parameter_buffers(backend: FakeBackend):
    cache, q = Cache((5, 0, 70), max_pages=20, dtype=E4M3), queries(seqlen_q=2)
    slopes, descale = torch.rand(3, 4), torch.rand(3, 2)
    out, lse = runtime.flash_attn_with_kvcache(
        q, cache.k, cache.v, cache_seqlens=cache.lengths, block_table=cache.table, num_splits=3, causal=True,
        alibi_slopes=slopes, k_descale=descale, v_descale=descale[0], return_softmax_lse=True,
    )  # fmt: skip
    forward, combine = backend.driver.launches
    p = forward["params"]
    assert list(p) == [param.name for param in FWD_PAGED.params]
    assert forward["variant"] == "fwd_paged-bf16-d64-dv64-m16-n32-w1-s2-q8-e4m3kv"
    assert forward["grid"] == (1 * 2 * 3 * 3, 1, 1)  # a tile of 2 tokens of 2 heads, 2 tile heads, 3 entries, 3 splits
    assert [p[n] for n in ("q", "k", "v", "seqused_k", "page_table", "alibi_slopes", "k_descale", "v_descale")] == [
        t.data_ptr() for t in (q, cache.k, cache.v, cache.lengths, cache.table, slopes, descale, descale)]  # fmt: skip
    assert (p["cu_seqlens_q"], p["seqused_q"], p["sink"]) == (0, 0, 0)
    assert (p["page_size"], p["page_table_stride"], p["num_splits"]) == (4, 20, 3)
    assert (p["page_magic"], p["page_shift"]) == fast_divmod(4) and (p["pack_magic"], p["pack_shift"]) == fast_divmod(2)
    assert (p["seqlen_k"], p["seqlen_k_new"], p["seqlen_q"]) == (80, 0, 2)
    assert (p["k_descale_stride_b"], p["v_descale_stride_b"], p["alibi_stride_b"]) == (2, 0, 4)
    assert (p["k_stride_b"], p["k_stride_s"], p["k_stride_h"]) == (4 * 2 * 64, 2 * 64, 64)
    assert (p["o_stride_split"], p["o_stride_b"], p["o_stride_s"], p["o_stride_h"]) == (3 * 512, 512, 256, 64)
    assert (p["lse_stride_split"], p["lse_stride_b"], p["lse_stride_h"]) == (24, 8, 2)
    assert (p["window_left"], p["window_right"]) == (WINDOW_OPEN, 0)
    c = combine["params"]
    assert combine["variant"] == "fwd_combine-bf16-d256-dv256-m4" and combine["grid"] == (6, 1, 1)
    assert (c["o_partial"], c["lse_partial"]) == (p["o"], p["lse"]) and p["lse"] - p["o"] == 3 * 3 * 512 * 4
    assert (c["o"], c["lse"]) == (out.data_ptr(), lse.data_ptr())
    assert (c["num_splits"], c["rows"], c["seqlen"], c["heads"], c["head_dim_v"]) == (3, 24, 2, 4, 64)
    assert (c["o_partial_stride_split"], c["lse_partial_stride_split"]) == (3 * 512, 24)
    for name in ("lse_partial", "lse"):
        assert [c[f"{name}_stride_{axis}"] for axis in "bsh"] == [8, 1, 2]
    assert [c[f"o_stride_{axis}"] for axis in "bsh"] == [512, 256, 64]


# -- append -----------------------------------------------------------------------------------------------------------


def test_rows_too_many_are_refused(backend: FakeBackend, monkeypatch):
    """Of K, V and a rotated q together; the kernel counts them in 32 bits, and a block's behind the last as well."""
    assert launch.MAX_ROWS == 2**31 - 32
    cache, new = Cache((5, 0, 17), max_pages=9, room=6), torch.zeros(3, 1, 2, 64, dtype=BF16)
    monkeypatch.setattr(launch, "MAX_ROWS", 2 * 3 * 2 - 1)
    with pytest.raises(ArgumentError, match="12 rows") as error:
        runtime.flash_attn_with_kvcache(queries(), cache.k, cache.v, new, new, None, None, cache.lengths,
                                        block_table=cache.table)  # fmt: skip
    assert error.value.reason == "too_large"


@pytest.mark.parametrize("seqlen_new", [1, 6])
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize(("rotary_dim", "interleaved", "causal"), [
    (0, True, False), (64, True, True), (32, False, True), (32, True, False), (64, False, False),
])  # fmt: skip
def test_append(backend: FakeBackend, seqlen_new, num_splits, rotary_dim, interleaved, causal):
    cache, q = Cache((5, 0, 17), max_pages=9, room=6), queries(seqlen_q=seqlen_new)
    new = [torch.randn(3, seqlen_new, 2, 64).to(BF16) for _ in range(2)]
    angles = torch.rand(40, rotary_dim // 2) * 6
    tables = (angles.cos().to(BF16), angles.sin().to(BF16)) if rotary_dim else (None, None)
    versions, before = [x._version for x in (cache.k, cache.v)], (cache.k.clone(), cache.v.clone())
    out = runtime.flash_attn_with_kvcache(
        q, cache.k, cache.v, *new, *tables, cache.lengths, block_table=cache.table, causal=causal,
        rotary_interleaved=interleaved, num_splits=num_splits,
    )  # fmt: skip
    assert [x._version for x in (cache.k, cache.v)] == [n + 1 for n in versions]
    changed = 0
    for b, n in enumerate(cache.lengths.tolist()):
        positions = torch.arange(n, n + seqlen_new)
        k, of_q = new[0][b].double(), q[b].double()
        if rotary_dim:
            k = rotated(k, *tables, positions, interleaved)
            of_q = rotated(of_q, *tables, positions if causal else torch.full_like(positions, n), interleaved)
        total = n + seqlen_new
        torch.testing.assert_close(cache.entry(cache.k, b, total)[0, n:].double(), k, atol=2e-2, rtol=2e-2)
        assert torch.equal(cache.entry(cache.v, b, total)[0, n:], new[1][b].float())
        want, _ = reference(of_q[None], cache.entry(cache.k, b, total), cache.entry(cache.v, b, total), causal=causal)
        torch.testing.assert_close(out[b : b + 1].double(), want, atol=3e-2, rtol=3e-2)
        changed += seqlen_new
    for x, old in zip((cache.k, cache.v), before, strict=True):
        assert ((x != old) & ~(x.isnan() & old.isnan())).flatten(2).any(2).sum() == changed
    ops = [made["variant"].split("-")[0] for made in backend.driver.launches]
    assert ops == ["kv_append", "fwd_paged"] + ["fwd_combine"] * (num_splits > 1)
    p = backend.driver.launches[0]["params"]
    assert (p["q"] != 0) == (p["q_out"] != 0) == bool(rotary_dim) and p["seqlen_q"] == (seqlen_new if rotary_dim else 0)
    rows = 2 * 3 * seqlen_new * 2 + (3 * seqlen_new * 4 if rotary_dim else 0)
    assert backend.driver.launches[0]["grid"] == (-(-rows // 4), 1, 1)


@pytest.mark.parametrize("paged", [False, True])
def test_append_more_than_is_asked(backend: FakeBackend, paged):
    """One query behind three new tokens, in a contiguous cache of which the last does not fit, and in pages alike."""
    torch.manual_seed(7)
    k_cache, v_cache = (torch.randn(4, 12, 2, 64).to(BF16) for _ in range(2))
    entries, q, new = ints(2, 0), queries(2), [torch.randn(2, 3, 2, 64).to(BF16) for _ in range(2)]
    angle = torch.rand(12, 32)
    tables = angle.cos().to(BF16), angle.sin().to(BF16)
    want = [x.clone() for x in (k_cache, v_cache)]
    for n, tokens in ((4, 3), (10, 2)):
        where = {"block_table": entries[:, None]} if paged else {"cache_batch_idx": entries}
        out = runtime.flash_attn_with_kvcache(q, k_cache, v_cache, *new, *tables, n, **where, causal=True)
        for b, entry in enumerate(entries.tolist()):
            positions = torch.arange(n, n + 3).clamp(max=11)
            want[0][entry, n : n + 3] = rotated(new[0][b], *tables, positions, True)[:tokens].to(BF16)
            want[1][entry, n : n + 3] = new[1][b][:tokens]
            of_q = rotated(q[b], *tables, torch.tensor([n]), True)[None]
            found, _ = reference(of_q, *(x[entry : entry + 1, : n + tokens] for x in want))
            torch.testing.assert_close(out[b : b + 1].double(), found, atol=3e-2, rtol=3e-2)
        for x, y in zip((k_cache, v_cache), want, strict=True):
            torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


def test_an_fp8_cache(backend: FakeBackend):
    """Descales of each head, or of each entry's heads; what is appended is divided by them and saturates."""
    cache, q = Cache((5, 0, 17), max_pages=9, room=2, dtype=E4M3), queries()
    new = [300 * torch.randn(3, 2, 2, 64).to(BF16) for _ in range(2)]
    k_descale, v_descale = torch.tensor([0.5, 2.0]), torch.tensor([[1.0, 0.25], [4.0, 0.5], [1.0, 1.0]])
    for num_splits in (1, 2):
        out = runtime.flash_attn_with_kvcache(
            q, cache.k, cache.v, *new, cache_seqlens=cache.lengths, block_table=cache.table, softmax_scale=0.01,
            k_descale=k_descale, v_descale=v_descale, num_splits=num_splits,
        )  # fmt: skip
        for b, n in enumerate(cache.lengths.tolist()):
            for array, x, factor in ((cache.k, new[0], k_descale), (cache.v, new[1], v_descale[b])):
                want = (x[b].float() / factor[:, None]).clamp(-448, 448).to(E4M3)
                assert torch.equal(cache.entry(array, b, n + 2)[0, n:], want.float())
            k = cache.entry(cache.k, b, n + 2) * k_descale[:, None]
            v = cache.entry(cache.v, b, n + 2) * v_descale[b][:, None]
            want, _ = reference(q[b : b + 1], k, v, softmax_scale=0.01)
            torch.testing.assert_close(out[b : b + 1].double(), want, atol=0.5, rtol=2e-2)
    assert [m["variant"].endswith("e4m3kv") for m in backend.driver.launches] == [True, True, True, True, False]


def test_nothing_to_read_or_to_write(backend: FakeBackend):
    cache = Cache((5, 0, 17), max_pages=9, room=2)
    options = {"cache_seqlens": cache.lengths, "block_table": cache.table, "return_softmax_lse": True}
    for _ in range(2):
        out, lse = runtime.flash_attn_with_kvcache(queries(seqlen_q=0), cache.k, cache.v, **options, num_splits=3)
        assert out.shape == (3, 0, 4, 64) and lse.shape == (3, 4, 0)
    assert not backend.driver.launches
    new = torch.ones(3, 2, 2, 64, dtype=BF16)
    for _ in range(2):
        runtime.flash_attn_with_kvcache(queries(seqlen_q=0), cache.k, cache.v, new, new, **options)
    assert [m["variant"].split("-")[0] for m in backend.driver.launches] == ["kv_append"] * 2
    assert (cache.entry(cache.k, 0, 7)[0, 5:] == 1).all()
    backend.driver.launches.clear()
    nothing = torch.empty(3, 0, 2, 64, dtype=BF16)
    versions = cache.k._version
    runtime.flash_attn_with_kvcache(queries(), cache.k, cache.v, nothing, nothing, **options)
    assert [m["variant"].split("-")[0] for m in backend.driver.launches] == ["fwd_paged"]
    assert cache.k._version == versions
    empty = cache.k[:0], cache.v[:0], cache.table[:, :0]
    out, lse = runtime.flash_attn_with_kvcache(queries(), *empty[:2], block_table=empty[2], return_softmax_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    assert runtime.flash_attn_with_kvcache(queries(0), *empty[:2], block_table=cache.table[:0]).shape == (0, 1, 4, 64)


def test_out_is_written_in_place_and_stays_apart(backend: FakeBackend):
    cache, q = Cache((5, 9), max_pages=9, room=1), queries(2)
    for num_splits in (1, 3):
        buffer = torch.full((2, 1, 8, 64), 9.0, dtype=BF16)
        out = buffer[:, :, ::2]
        version = out._version
        assert check(q, cache, out=out, num_splits=num_splits) is out
        assert out._version == version + 1 and (buffer[:, :, 1::2] == 9).all()
    new = torch.zeros(2, 1, 4, 64, dtype=BF16)
    for _ in range(2):
        for shared in ({"out": q}, {"k": new[:, :, :2], "v": new[:, :, 2:], "out": new}):
            with pytest.raises(ArgumentError, match="shares memory with") as error:
                runtime.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=cache.lengths,
                                                block_table=cache.table, **shared)  # fmt: skip
            assert (error.value.argument, error.value.reason) == ("out", "overlap")


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_warm_call_only_launches(backend: FakeBackend, monkeypatch):
    """Also when the contents of lengths, table and cache have changed: they are the device's."""
    cache, q = Cache((5, 0, 17), max_pages=9, room=8), queries()
    new = torch.randn(3, 1, 2, 64).to(BF16)
    angle = torch.rand(40, 32).to(BF16)

    def calls():
        for num_splits in (0, 1, 3):
            check(q, cache, num_splits=num_splits)
        runtime.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=4, block_table=cache.table)
        runtime.flash_attn_with_kvcache(q, cache.k, cache.v, new, new, angle, angle, cache.lengths,
                                        block_table=cache.table, num_splits=2)  # fmt: skip

    calls()
    asked, kept, made = list(backend.driver.calls), len(plans.plans.by_call), len(backend.driver.launches)

    def forbidden(*_, **__):
        raise AssertionError("a warm call must not come here")

    for module, name in ((select, "select"), (session, "current"), (attention, "prepare"), (plan, "prepare")):
        monkeypatch.setattr(module, name, forbidden)
    for _ in range(3):
        cache.lengths += 1
        calls()
    cache.table.copy_(cache.table.flip(0).clone())
    cache.lengths.copy_(cache.lengths.flip(0).clone())
    calls()
    runtime.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=7, block_table=cache.table)
    assert backend.driver.calls == asked and len(plans.plans.by_call) == kept
    assert len(backend.driver.launches) == 5 * made + 1


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_num_splits_whose_hash_is_not_of_its_value(backend: FakeBackend, kind):
    """An array has none, and a tensor's is that of the object, which may change: each number has its plan."""
    cache, q, num_splits = Cache(), queries(), kind(3)
    for n in (3, 2, 1):
        num_splits.fill(n) if kind is np.array else num_splits.fill_(n)
        runtime.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=ints(0, 0, 0), block_table=cache.table,
                                        num_splits=num_splits)  # fmt: skip
        assert backend.driver.launched("fwd_paged")[-1]["params"]["num_splits"] == n
    assert len(plans.plans.by_call) == 3


def test_tables_of_other_widths_need_no_plan(backend: FakeBackend):
    """As a server cuts a large table to the longest sequence of a step; the choice of splits goes with it."""
    cache, q = Cache((5, 1, 130), page_size=2, max_pages=400), queries()
    whole, seen, made = cache.table, [], []
    for width in (65, 66, 80, 300, 400, 65):
        cache.table = whole[:, :width]
        made.append(len(backend.driver.launches))
        check(q, cache)
        p = backend.driver.launches[made[-1]]["params"]
        assert (p["seqlen_k"], p["page_table_stride"]) == (2 * width, 400)
        assert backend.driver.launches[made[-1]]["grid"][0] == 2 * 3 * p["num_splits"]
        seen.append(p["num_splits"])
    assert len(plans.plans.families) == 1 and seen[0] == seen[-1] < seen[4]
    assert backend.driver.calls.count("load_library") == 2


def test_a_window_leaves_nothing_to_split(backend: FakeBackend):
    cache = Cache((5, 9, 100), page_size=16, max_pages=512)
    check(queries(), cache, window_size=(20, 0), options={"window": (20, 0)})
    assert backend.driver.launches[-1]["params"]["num_splits"] == 1
    check(queries(), cache, window_size=(-1, 0), options={"window": (None, 0)})
    assert "combine" in backend.driver.launches[-1]["variant"]


def test_the_heuristic_sees_the_device_s_slots(backend: FakeBackend, monkeypatch):
    cache, wide = Cache((5, 9, 100), page_size=16, max_pages=512), queries(3)
    for resident, splits in (((1, 1), False), ((6, 1), False), ((132, 1), True)):
        runtime.configure(registry=session.current().config.registry)
        backend.driver.resident = resident
        check(wide, cache)
        assert any("combine" in made["variant"] for made in backend.driver.launches) == splits
        backend.driver.launches.clear()
    asked = []
    monkeypatch.setattr(backend.driver, "resident_blocks", lambda *arguments: asked.append(arguments) or (132, 1))
    monkeypatch.setattr(kernel, "SMEM_PADDING", lambda artifact: 10_000)
    runtime.configure(registry=session.current().config.registry)
    check(wide, cache)
    ((device, _, threads, smem),) = asked
    assert (device, threads, smem) == (-1, 32, 75_536)


@pytest.mark.parametrize("warm", ["fwd_paged", "fwd_combine", "kv_append"])
def test_capture_needs_every_kernel_of_the_call(backend: FakeBackend, warm):
    cache, q = Cache((5, 0, 17), max_pages=9, room=2), queries()
    new = torch.zeros(3, 1, 2, 64, dtype=BF16)
    options = {"cache_seqlens": cache.lengths, "block_table": cache.table}
    runtime.flash_attn_with_kvcache(q, cache.k, cache.v, **options, num_splits=1)
    if warm != "fwd_paged":
        runtime.flash_attn_with_kvcache(q, cache.k, cache.v, **options, num_splits=2)
    if warm == "kv_append":
        runtime.flash_attn_with_kvcache(q, cache.k, cache.v, new, new, **options, num_splits=2)
    backend.driver.launches.clear()
    backend.capturing = True
    if warm == "fwd_paged":
        with pytest.raises(CaptureError, match="fwd_combine"):
            runtime.flash_attn_with_kvcache(q, cache.k, cache.v, **options, num_splits=2)
        assert not backend.driver.launches
    if warm != "kv_append":
        with pytest.raises(CaptureError, match="kv_append"):
            runtime.flash_attn_with_kvcache(q, cache.k, cache.v, new, new, **options, num_splits=1)
        assert not backend.driver.launches
    else:
        runtime.flash_attn_with_kvcache(q, cache.k, cache.v, new, new, **options, num_splits=3)
        assert len(backend.driver.launches) == 3


def test_every_fact_of_a_call_is_in_its_key(backend: FakeBackend):
    """Each change must give its own result, though the call before it differs in nothing else."""
    cache, q = Cache((5, 0, 40), max_pages=20), queries(seqlen_q=2)
    slopes, sink = torch.rand(4), torch.rand(4)
    for num_splits in (1, 3, 1):
        for options in ({}, {"causal": True}, {"softmax_scale": 0.9}, {"softcap": 0.5}, {"sink": sink}, {}, {
            "sink": sink.to(BF16)}, {"alibi_slopes": slopes}, {"alibi_slopes": slopes.expand(3, 4)}):  # fmt: skip
            wanted = {"alibi_slopes": slopes} if "alibi_slopes" in options else options
            check(q, cache, num_splits=num_splits, options=wanted, **options)


def test_another_device_than_the_current_one_is_guarded(backend: FakeBackend):
    cache = Cache()
    check(queries(), cache, num_splits=2)
    backend.guarded.clear()
    backend.current = 3
    check(queries(), cache, num_splits=2)
    assert backend.guarded == [-1] and backend.current == 3


def test_a_failed_launch_is_an_error(backend: FakeBackend):
    backend.driver.status = 700
    with pytest.raises(DriverError) as error:
        runtime.flash_attn_with_kvcache(queries(), Cache().k, Cache().v, block_table=Cache().table, num_splits=2)
    assert error.value.status == 700
