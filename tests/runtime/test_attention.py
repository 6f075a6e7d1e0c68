"""Whole calls on the CPU: FakeDriver computes attention from the very parameters that a kernel would get."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import runtime
from registry.contract import WINDOW_OPEN, Index, OpenIndex, fast_divmod, parts
from registry.contract import index as index_file
from runtime import stages
from runtime.api import attention
from runtime.call import launch
from runtime.errors import ArgumentError, CaptureError, DriverError, IntegrityError, NoKernelError, SourceError
from runtime.load import kernel, plans, select, session
from tests.runtime.fakes import TABLE, FakeBackend, rows, toy_artifact, toy_cubin, write_registry
from tests.support.abis import FWD
from tests.support.attention import BF16, check, inputs


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_dtype_and_head_dim_gets_its_kernel(backend: FakeBackend, registry: Path, head_dim, dtype):
    out = check(*inputs(head_dim=head_dim, dtype=dtype))
    assert out.is_contiguous()
    name = "bf16" if dtype is BF16 else "fp16"
    assert backend.driver.launches[0]["variant"].startswith(f"fwd-{name}-d{head_dim}-")


@pytest.mark.parametrize("options", [
    {"causal": True}, {"softmax_scale": 0.3}, {"softmax_scale": 2}, {"window": (2, 1)}, {"window": (None, 0)},
    {"window": (1, None)}, {"window": [0, 0]}, {"window": (2, 5), "causal": True}, {"window": (10**12, 10**12)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5), (1, 9), (6, 6)])
def test_masks_and_scale(backend: FakeBackend, registry: Path, options, seqlens):
    check(*inputs(seqlen_q=seqlens[0], seqlen_k=seqlens[1]), **options)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (6, 3)])
def test_head_ratios(backend: FakeBackend, registry: Path, heads):
    check(*inputs(heads_q=heads[0], heads_kv=heads[1]), causal=True)


@pytest.mark.parametrize(("dims", "variant"), [
    ((72, 72), 96), ((8, 8), 64), ((128, 64), 128), ((64, 128), 128), ((104, 40), 128), ((64, 72), 96),
], ids=str)  # fmt: skip
def test_head_dims_of_their_own(backend: FakeBackend, registry: Path, dims, variant):
    q, k, v = inputs(head_dim=dims[0], head_dim_v=dims[1])
    for _ in range(2):
        assert check(q, k, v, causal=True).is_contiguous()
    made = backend.driver.launches[-1]
    assert made["variant"].startswith(f"fwd-bf16-d{variant}-dv{variant}-")
    p = made["params"]
    assert (p["head_dim"], p["head_dim_v"]) == dims
    assert (p["o_stride_b"], p["o_stride_s"], p["o_stride_h"]) == (5 * 4 * dims[1], 4 * dims[1], dims[1])
    assert p["scale_log2"] == pytest.approx(dims[0] ** -0.5 * math.log2(math.e))
    out = torch.full((2, 5, 8, dims[1]), 9.0, dtype=BF16)[:, :, ::2]
    assert check(q, k, v, out=out) is out


@pytest.mark.parametrize("options", [
    {"softcap": 0.7}, {"softcap": 30, "softmax_scale": 1.5, "causal": True},
    {"sink": torch.tensor([1.0, -2, 0, 5])}, {"sink": torch.tensor([1.0, -2, 0, 5]).to(BF16), "window": (1, 1)},
    {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])}, {"alibi_slopes": torch.rand(2, 4), "causal": True},
    {"alibi_slopes": torch.rand(2, 9)[:, 5:], "softcap": 2.0, "sink": torch.zeros(4)},
    {"alibi_slopes": torch.rand(1, 4).expand(2, 4)},
], ids=lambda options: " ".join(options))  # fmt: skip
@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5), (3, 0)])
def test_score_options(backend: FakeBackend, registry: Path, options, seqlens):
    q, k, v = inputs(seqlen_q=seqlens[0], seqlen_k=seqlens[1])
    for _ in range(2):
        check(q, k, v, **options)


def test_score_options_in_the_parameter_buffer(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    sink, slopes = torch.zeros(4, dtype=BF16), torch.zeros(2, 12)[:, 4:8]
    runtime.flash_attn(q, k, v, softcap=20.0, softmax_scale=0.5, sink=sink, alibi_slopes=slopes)
    p = backend.driver.launches[-1]["params"]
    assert (p["sink"], p["alibi_slopes"]) == (sink.data_ptr(), slopes.data_ptr())
    assert (p["sink_low"], p["alibi_stride_b"]) == (1, 12)
    assert p["scale_log2"] == pytest.approx(20 * math.log2(math.e))
    assert p["softcap_scale"] == pytest.approx(2 * math.log2(math.e) * 0.5 / 20)
    other, flat = torch.zeros(4), torch.zeros(4)
    runtime.flash_attn(q, k, v, sink=other, alibi_slopes=flat)
    p = backend.driver.launches[-1]["params"]
    assert (p["sink"], p["alibi_slopes"]) == (other.data_ptr(), flat.data_ptr())
    assert (p["sink_low"], p["alibi_stride_b"], p["softcap_scale"]) == (0, 0, 0)
    runtime.flash_attn(q, k, v)
    assert backend.driver.launches[-1]["params"]["sink"] == 0


@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (6, 3), (9, 3), (4, 4)])
def test_the_table_packs_heads_of_short_queries(backend: FakeBackend, registry: Path, heads):
    group = heads[0] // heads[1]
    for seqlen_q in (1, 64 // group, 64 // group + 1):
        check(*inputs(seqlen_q=seqlen_q, seqlen_k=3, heads_q=heads[0], heads_kv=heads[1]), causal=True)
        made = backend.driver.launches[-1]
        pack = group if group > 1 and seqlen_q * group <= 64 else 1
        p = made["params"]
        assert (p["pack"], p["pack_magic"], p["pack_shift"]) == (pack, *fast_divmod(pack))
        tile_m = 64 if seqlen_q <= 64 else 128
        assert made["grid"][0] == -(-seqlen_q * pack // tile_m) * (heads[0] // pack) * 2


def test_strided_inputs(backend: FakeBackend, registry: Path):
    q, k, v = inputs(batch=2, seqlen_q=6, seqlen_k=6, heads_q=2, heads_kv=2)
    packed = torch.stack((q, k, v), dim=2)  # (batch, seqlen, 3, heads, head_dim)
    out = check(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], causal=True)
    assert out.is_contiguous()
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert check(*heads_first).is_contiguous()
    check(q[:1].expand(2, -1, -1, -1), k, v)
    odd = torch.as_strided(q, (1, 6, 1, 64), (3, 128, 5, 1))  # strides of single entries mean nothing
    check(odd, k[:1, :, :1], v[:1, :, :1])
    assert backend.driver.launches[-1]["params"]["q_stride_b"] == 0


def test_no_keys_give_zeros_and_minus_infinity_through_the_kernel(backend: FakeBackend, registry: Path):
    q, k, v = inputs(seqlen_k=0)
    out, lse = runtime.flash_attn(q, k, v, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()
    assert len(backend.driver.launches) == 1


@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen_q": 0}, {"heads_q": 0, "heads_kv": 0}, {"heads_q": 0}])
def test_no_queries_need_no_kernel_and_no_registry(backend: FakeBackend, empty):
    q, k, v = inputs(**empty)
    for _ in range(2):
        out, lse = runtime.flash_attn(q, k, v, return_lse=True)
        assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert not backend.driver.calls and not backend.driver.launches


def test_out_is_written_in_place(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    buffer = torch.full((2, 5, 2, 4, 64), 9.0, dtype=BF16)
    out = buffer[:, :, 1]
    assert check(q, k, v, out=out) is out
    assert (buffer[:, :, 0] == 9).all()
    runtime.flash_attn(q, k, v, out=buffer[:, :, 0])
    assert torch.equal(buffer[:, :, 0], out)


def test_autograd_sees_that_out_was_overwritten(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    for _ in range(2):  # first and warm
        out, weight = torch.ones_like(q), torch.ones(q.shape, dtype=BF16, requires_grad=True)
        loss = (weight * out).sum()  # keeps out for its backward
        runtime.flash_attn(q, k, v, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    before = [tensor._version for tensor in (q, k, v)]
    runtime.flash_attn(q, k, v)
    assert [tensor._version for tensor in (q, k, v)] == before
    with torch.inference_mode():  # whose tensors count no versions
        runtime.flash_attn(q, k, v, out=torch.empty(q.shape, dtype=BF16))


def test_out_may_be_a_part_of_the_inputs_own_buffer(backend: FakeBackend, registry: Path):
    packed = torch.randn(2, 6, 4, 2, 64).to(BF16)
    before = packed.clone()
    want = runtime.flash_attn(before[:, :, 0], before[:, :, 1], before[:, :, 2])
    runtime.flash_attn(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], out=packed[:, :, 3])
    assert torch.equal(packed[:, :, 3], want) and torch.equal(packed[:, :, :3], before[:, :, :3])


@pytest.mark.parametrize("which", ["q", "k", "shifted"])
def test_out_must_not_share_memory_with_inputs(backend: FakeBackend, registry: Path, which):
    q, k, v = inputs(seqlen_k=5, heads_kv=4)
    storage = torch.zeros(q.numel() + 64, dtype=BF16)
    shifted = {"q": storage[: q.numel()].view(q.shape), "out": storage[64:].view(q.shape)}
    q, out = (shifted["q"], shifted["out"]) if which == "shifted" else (q, {"q": q, "k": k}[which])
    for _ in range(2):  # first and warm
        with pytest.raises(ArgumentError) as error:
            runtime.flash_attn(q, k, v, out=out)
        assert error.value.argument == "out" and error.value.reason == "overlap"
    assert not backend.driver.launches


def test_the_parameter_buffer_is_the_abi_s(backend: FakeBackend, registry: Path):
    q, k, v = inputs(batch=2, seqlen_q=70, seqlen_k=9, heads_q=4, heads_kv=2)
    out, lse = runtime.flash_attn(q, k, v, causal=True, softmax_scale=0.5, window=(3, 8), return_lse=True)
    (made,) = backend.driver.launches
    assert made["variant"] == "fwd-bf16-d64-dv64-m128-n64-w4-s1"
    assert made["grid"] == (1 * 4 * 2, 1, 1) and made["block"] == (128, 1, 1)
    assert made["smem"] == 65_536 and made["stream"] == 0x5EA and made["extra"] == 0
    p = made["params"]
    assert list(p) == [param.name for param in FWD.params]
    assert [p[n] for n in ("q", "k", "v", "o", "lse")] == [t.data_ptr() for t in (q, k, v, out, lse)]
    assert (p["q_stride_b"], p["q_stride_s"], p["q_stride_h"]) == (70 * 4 * 64, 4 * 64, 64)
    assert (p["k_stride_b"], p["v_stride_s"], p["o_stride_h"]) == (9 * 2 * 64, 2 * 64, 64)
    assert (p["lse_stride_b"], p["lse_stride_h"]) == (4 * 70, 70)
    assert (p["batch"], p["heads_q"], p["heads_kv"], p["seqlen_q"], p["seqlen_k"]) == (2, 4, 2, 70, 9)
    assert (p["window_left"], p["window_right"]) == (3, 0)
    assert (p["head_dim"], p["head_dim_v"], p["pack"], p["pack_magic"], p["pack_shift"]) == (64, 64, 1, 2**31, 31)
    assert (p["sink_low"], p["alibi_stride_b"], p["softcap_scale"]) == (0, 0, 0.0)
    assert p["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))
    null = [
        n
        for n, kind in ((x.name, x.type) for x in FWD.params)
        if kind == "ptr" and n not in ("q", "k", "v", "o", "lse")
    ]
    assert len(null) == 7 and not any(p[n] for n in null)
    runtime.flash_attn(q, k, v)
    p = backend.driver.launches[-1]["params"]
    assert p["lse"] == 0 and (p["window_left"], p["window_right"]) == (WINDOW_OPEN, WINDOW_OPEN)


def test_a_warm_call_only_launches(backend: FakeBackend, registry: Path, monkeypatch):
    q, k, v = inputs()
    first = runtime.flash_attn(q, k, v)
    calls = list(backend.driver.calls)
    assert calls.count("load_library") == 1

    def forbidden(*_, **__):
        raise AssertionError("a warm call must not come here")

    monkeypatch.setattr(select, "select", forbidden)
    monkeypatch.setattr(session, "current", forbidden)
    monkeypatch.setattr(attention, "prepare", forbidden)
    assert torch.equal(runtime.flash_attn(q.clone(), k.clone(), v.clone()), first)
    assert backend.driver.calls == calls and len(backend.driver.launches) == 2


def test_calls_of_one_variant_load_it_once(backend: FakeBackend, registry: Path):
    for seqlen_k in range(1, 6):
        runtime.flash_attn(*inputs(seqlen_k=seqlen_k))
    assert backend.driver.calls.count("load_library") == 1


def test_every_fact_of_a_call_is_in_its_key(backend: FakeBackend, registry: Path):
    """Each change must give its own result, though the call before it differs in nothing else."""
    q, k, v = inputs(seqlen_q=4, seqlen_k=4, heads_q=2, heads_kv=2)
    slopes, sink = torch.tensor([0.5, 0.1]), torch.tensor([1.0, -2])
    calls = [{}, {"causal": True}, {}, {"softmax_scale": 0.9}, {"window": (1, None)}, {"window": (None, 1)}, {},
             {"softcap": 0.5}, {"softcap": 0.6}, {"sink": sink}, {"sink": sink.to(BF16)}, {"alibi_slopes": slopes},
             {"alibi_slopes": slopes.expand(2, 2)}, {"alibi_slopes": torch.rand(2, 2)},
             {"alibi_slopes": torch.rand(2, 3)[:, 1:]}, {"sink": sink, "alibi_slopes": slopes}, {"sink": sink + 1},
             {"sink": sink, "softcap": 0.5}, {"sink": sink, "window": (1, None)}, {}]  # fmt: skip
    for options in calls:
        check(q, k, v, **options)
    check(q, k, v[..., :32])
    check(q[:, :3], k, v)
    check(q, k[:, :3], v[:, :3])
    check(q, k, v.transpose(1, 2).contiguous().transpose(1, 2))
    check(q.half(), k.half(), v.half())


def test_the_plan_cache_is_bounded(backend: FakeBackend, registry: Path, monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    for seqlen_k in (1, 2, 3, 4, 5, 1):
        check(*inputs(seqlen_k=seqlen_k))
    assert len(plans.plans.by_call) == 3


def test_another_device_than_the_current_one_is_guarded(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    backend.guarded.clear()
    runtime.flash_attn(q, k, v)
    assert backend.guarded == []
    backend.current = 3
    runtime.flash_attn(q, k, v)
    assert backend.guarded == [-1] and backend.current == 3


def test_capture_refuses_a_load_before_touching_the_driver(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    backend.capturing = True
    with pytest.raises(CaptureError, match="once before it"):
        runtime.flash_attn(q, k, v)
    assert not backend.driver.calls and not backend.driver.launches
    backend.capturing = False
    runtime.flash_attn(q, k, v)
    backend.capturing = True
    runtime.flash_attn(q, k, v)  # warm
    runtime.flash_attn(*inputs(seqlen_k=3))  # a new plan of a loaded kernel
    with pytest.raises(CaptureError):
        runtime.flash_attn(*inputs(head_dim=128))


def test_capture_refuses_before_disk_and_network(backend: FakeBackend, tmp_path: Path):
    runtime.configure(registry=tmp_path / "nothing.db")
    backend.capturing = True
    with pytest.raises(CaptureError, match="no kernel is loaded yet"):
        runtime.flash_attn(*inputs())
    assert not backend.driver.calls
    backend.capturing = False
    with pytest.raises(SourceError):
        runtime.flash_attn(*inputs())


def test_capture_refuses_before_a_part_of_the_index_is_read(
    backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(index_file, "MAX_WHOLE", 2)
    monkeypatch.setattr(parts, "PART_ROWS", 2)
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    write_registry(folder / "r.db", "sm_120")
    runtime.configure(registry=folder / "r.db")
    runtime.flash_attn(*inputs())
    asked: list[str] = []
    read = session.current().source.index
    monkeypatch.setattr(session.current().source, "index", lambda digest: asked.append(digest) or read(digest))
    backend.capturing = True
    runtime.flash_attn(*inputs(seqlen_k=3))  # its part has been read
    with pytest.raises(CaptureError, match="part of the index"):
        runtime.flash_attn(*inputs(dtype=torch.float16, head_dim=128))
    assert asked == []
    backend.capturing = False
    assert session.current().index_for_arch("sm_120").rows("fwd", {}) and asked  # nothing of the capture is left
    runtime.flash_attn(*inputs(dtype=torch.float16, head_dim=128))


def test_a_capture_on_the_current_device_forbids_a_load_on_another(
    backend: FakeBackend, registry: Path, monkeypatch: pytest.MonkeyPatch
):
    """And the other way round: either side of the device guard may be the one that is capturing."""
    for captured in (3, -1):
        backend.current = 3
        monkeypatch.setattr(backend, "is_capturing", lambda captured=captured: backend.current == captured)
        with pytest.raises(CaptureError):
            runtime.flash_attn(*inputs())
        assert backend.current == 3 and not backend.driver.calls


def test_misalignment_is_refused_first_and_warm(backend: FakeBackend, registry: Path):
    q, k, v = inputs()
    crooked = torch.zeros(q.numel() + 8, dtype=BF16)[4:-4].view(q.shape)
    for _ in range(2):
        for arguments, name in ((((crooked, k, v), {}), "q"), (((q, k, v), {"out": crooked}), "out")):
            with pytest.raises(ArgumentError) as error:
                runtime.flash_attn(*arguments[0], **arguments[1])
            assert (error.value.argument, error.value.reason) == (name, "alignment")
        runtime.flash_attn(q, k, v)
        runtime.flash_attn(q, k, v, out=torch.empty_like(q))


def test_a_failed_launch_is_an_error(backend: FakeBackend, registry: Path):
    backend.driver.status = 700
    with pytest.raises(DriverError) as error:
        runtime.flash_attn(*inputs())
    assert error.value.status == 700


def test_a_grid_too_large_is_refused(backend: FakeBackend, registry: Path, monkeypatch):
    monkeypatch.setattr(launch, "MAX_BLOCKS", 3)
    with pytest.raises(ArgumentError, match="4 blocks") as error:
        runtime.flash_attn(*inputs())
    assert error.value.reason == "too_large"


def test_configure_forgets_what_was_loaded(backend: FakeBackend, registry: Path, tmp_path: Path):
    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    write_registry(tmp_path / "other.db", only="fp16")
    runtime.configure(registry=tmp_path / "other.db")
    with pytest.raises(NoKernelError, match="not in the index"):
        runtime.flash_attn(q, k, v)


@pytest.mark.parametrize(("capability", "archs", "loads"), [
    ((12, 0), ("sm_120", "sm_90"), "sm_120"), ((12, 1), ("sm_120",), "sm_120"), ((9, 0), ("sm_120", "sm_90"), "sm_90"),
])  # fmt: skip
def test_the_gpu_chooses_the_index(backend: FakeBackend, tmp_path: Path, capability, archs, loads):
    write_registry(tmp_path / "r.db", *archs, only="bf16-d64")
    runtime.configure(registry=tmp_path / "r.db")
    backend.capability_of_all = capability
    check(*inputs())
    assert next(iter(session.current()._indexes.values())).arch == loads


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (9, 0), (11, 0)])
def test_no_index_for_this_gpu(backend: FakeBackend, registry: Path, capability):
    backend.capability_of_all = capability
    arch = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(NoKernelError, match=f"python -m builder --arch {arch}") as error:
        runtime.flash_attn(*inputs())
    assert error.value.reason == "arch" and "sm_120" in str(error.value)
    assert not backend.driver.calls


def test_padding_emulates_another_chip_s_occupancy(backend: FakeBackend, registry: Path, monkeypatch):
    monkeypatch.setattr(kernel, "SMEM_PADDING", lambda artifact: 10_000 if artifact.arch == "sm_120" else 0)
    runtime.flash_attn(*inputs())
    assert backend.driver.launches[0]["smem"] == 75_536
    assert "allow_dynamic_smem 75536" in backend.driver.calls


def test_small_shared_memory_needs_no_permission(backend: FakeBackend, tmp_path: Path):
    write_registry(tmp_path / "r.db", only="bf16-d64", smem=48 << 10)
    runtime.configure(registry=tmp_path / "r.db")
    runtime.flash_attn(*inputs())
    assert not any(call.startswith("allow") for call in backend.driver.calls)


def test_static_shared_memory_counts_towards_the_permission(backend: FakeBackend, tmp_path: Path):
    write_registry(tmp_path / "r.db", only="bf16-d64", smem=48 << 10, static_smem=16)
    runtime.configure(registry=tmp_path / "r.db")
    runtime.flash_attn(*inputs())
    assert f"allow_dynamic_smem {48 << 10}" in backend.driver.calls
    assert backend.driver.launches[0]["smem"] == 48 << 10


def test_variants_of_one_cubin_keep_their_own_launch_facts(backend: FakeBackend, registry: Path, monkeypatch):
    short, long = (variant for dtype, d, _, variant in TABLE if (dtype, d) == ("bf16", 64))
    shared = toy_cubin(short, "sm_120")
    made = [toy_artifact(v, "sm_120", cubin=shared, symbol=short.key) for v in (short, long)]
    index = Index("sm_120", "0.1", tuple(artifact for artifact, _ in made), rows(), (FWD,))
    now = session.current()
    monkeypatch.setattr(now, "index_for_device", lambda capability: OpenIndex(index.to_bytes(), index.digest))
    monkeypatch.setattr(now, "cubin", lambda artifact: shared)
    for seqlen_q in (64, 65):  # one tile of 64 rows, one of 128
        runtime.flash_attn(*inputs(batch=1, seqlen_q=seqlen_q, heads_q=2))
    assert [made["grid"][0] for made in backend.driver.launches] == [2, 2]


def test_the_ledger_tells_each_stage(backend: FakeBackend, tmp_path: Path):
    write_registry(tmp_path / "r.db", only="bf16-d64")
    runtime.configure(registry=tmp_path / "r.db")
    stages._records.clear()  # other tests may have filled it
    before = len(runtime.ledger())
    q, k, v = inputs()
    runtime.flash_attn(q, k, v)
    names = [record["stage"] for record in runtime.ledger()[before:]]
    assert names == ["resolve", "index", "select", "fetch", "verify", "load", "plan", "first launch"]
    assert all(record["ms"] >= 0 for record in runtime.ledger())
    runtime.flash_attn(q, k, v)
    runtime.flash_attn(q, k[:, :3], v[:, :3])
    assert len(runtime.ledger()) == before + len(names)


def test_an_abi_from_the_future_is_refused(backend: FakeBackend, tmp_path: Path):

    from registry.contract import Param

    for n, params in enumerate([
        (*FWD.params, Param("dropout", "f32")),
        tuple(Param("softcap_scale", "i32") if p.name == "softcap_scale" else p for p in FWD.params),
        (FWD.params[1], FWD.params[0], *FWD.params[2:]),
        tuple(p for p in FWD.params if p.name != "window_left"),
    ]):  # fmt: skip
        write_registry(tmp_path / f"{n}.db", only="bf16-d64", abi=FWD.replace(version=2, params=params))
        runtime.configure(registry=tmp_path / f"{n}.db")
        with pytest.raises(IntegrityError, match=r"update the client|rebuild") as error:
            runtime.flash_attn(*inputs())
        assert error.value.reason == "abi"
        assert not backend.driver.launches
