"""What the sanitizers watch of the backward, without a sanitizer: its small calls, planted races, poisoned memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import bwd_small_calls, dut, plant_race, sanitize, small_calls
from tests.gpu.bwd_stand_in import BwdStand
from tests.gpu.harness import made
from tests.gpu.sanitize import Run, judge
from tests.support.sanitize import PTX, scripted
from tests.support.threads import one_thread

__all__ = ["one_thread"]  # fixtures

KEY, PRE = "bwd-bf16-d64-dv64-m64-n64-w4-s1", "bwd_preprocess-fp16-d256-dv256-m128"
SUM = "bwd_sum-bf16-d256-dv256-m8"


class Recorder:
    """Keeps what it is asked for, and answers with anything that depends on all of it."""

    def __init__(self):
        self.asked = []

    def poison(self):
        pass

    def attn(self, q, k, v, *, return_lse=False, **options):
        self.asked.append({"q": q, "k": k, "v": v, "return_lse": return_lse, **options})
        parts = [x.sum().float() for x in (k, v, options.get("sink"), options.get("alibi_slopes")) if x is not None]
        lse = q.sum(-1).float() + sum(parts)
        out = lse[..., None].to(q.dtype).expand(*q.shape[:-1], v.shape[-1])
        return (out, lse.transpose(-1, -2)) if return_lse else out

    varlen = attn


@pytest.mark.parametrize("key", [KEY, PRE, SUM])
def test_the_small_calls_take_every_path(key):
    """Each optional input is given at least once, and at least once not; memcheck sees the end of each tensor."""
    recorder = Recorder()
    small_calls.launch(recorder, key, device="cpu")
    asked = [{name: x for name, x in given.items() if x is not False} for given in recorder.asked]
    optional = {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "sink", "alibi_slopes",
                "softcap", "window", "deterministic", "return_lse"}  # fmt: skip
    assert all(0 < sum(name in given for given in asked) < len(asked) for name in optional)
    assert {given["q"].shape[-2] // given["k"].shape[-2] for given in asked} == {1, 2, 3, 6}
    tensors = [x for given in asked for x in given.values() if hasattr(x, "untyped_storage")]
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)


def test_the_small_calls_are_served_rightly():
    stand = BwdStand()
    stand.force(KEY)
    for call in bwd_small_calls.calls(KEY):
        run = made(call, "cpu")
        assert run.problems(*run(stand)) == []


FORWARD, BACKWARD = "cubinery_planted0_fwd_a_0", "cubinery_planted0_bwd_a_0"
RACES = {FORWARD: "fwd", "cubinery_planted1_bwd_a_0": "bwd", BACKWARD: "bwd"}


def test_a_race_of_each_op_must_be_seen():
    blind = judge(scripted(Run(ended={"a"}, named={FORWARD}))[0], {"a": "cubinery_a_0"}, "racecheck", RACES)
    assert not blind.passed and blind.blind.startswith("racecheck did not see the planted fault of bwd")
    seeing = judge(scripted(Run(ended={"a"}, named={FORWARD, BACKWARD}))[0], {"a": "cubinery_a_0"}, "racecheck", RACES)
    assert seeing.passed == ["a"] and not seeing.blind


def test_a_forward_and_a_backward_are_planted(tmp_path, monkeypatch):
    from benchmarks.derived import read_index
    from registry.contract import DispatchRow, Grid, Index, Variant, sha256_hex
    from registry.store import Store
    from tests.runtime.fakes import toy_artifact
    from tests.support.abis import ABIS

    variants = [Variant.parse(key) for key in (KEY, PRE, "bwd-fp16-d64-dv64-m64-n64-w4-s1",
                                               "fwd-bf16-d64-dv64-m64-n64-w4-s1")]  # fmt: skip
    made = [
        toy_artifact(v, "sm_90", abi=ABIS[v.op], grid=Grid("rows", 64), threads=32, symbol=f"cubinery_{v.key}")
        for v in variants
    ]
    rows = tuple(DispatchRow(v.op, (), v.key) for v in variants)
    with Store(tmp_path / "r.db") as store:
        for artifact, frame in made:
            store.put_artifact(sha256_hex(artifact.symbol.encode()), artifact, frame)
        abis = tuple(ABIS[op] for op in ("fwd", "bwd_preprocess", "bwd"))
        store.put_index(Index("sm_90", "0.1", tuple(a for a, _ in made), rows, abis), "stable")
    monkeypatch.setattr(plant_race.Store, "ptx_text", lambda store, digest: PTX)
    monkeypatch.setattr(plant_race.nvjitlink, "assemble", lambda ptx, arch: SimpleNamespace(cubin=ptx.encode()))
    planted = tmp_path / "planted.db"
    assert plant_race.main(["--registry", str(tmp_path / "r.db"), "--out", str(planted)]) == 0
    assert sanitize.channels(planted) == [f"planted{i}" for i in range(4)]
    assert list(sanitize.planted_symbols(planted, "sm_90").values()) == ["fwd", "fwd", "bwd", "bwd"]
    backward = read_index(planted, "sm_90", "planted3")
    assert {row.op for row in backward.rows} == {"fwd", "bwd_preprocess", "bwd"}
    assert [row.variant for row in backward.rows if row.op == "bwd"] == [KEY]


def test_free_memory_of_the_calls_stream_is_found():
    def segment(address, blocks, **more):
        listed = [{"size": size, "state": state} for size, state in blocks]
        return {"device": 0, "stream": 5, "address": address, "blocks": listed, **more}

    blocks = [(512, "active_allocated"), (1024, "inactive"), (256, "active_pending_free"), (2048, "inactive")]
    segments = [
        segment(4096, blocks, segment_pool_id=(0, 0)),
        segment(8192, [(64, "inactive")]),
        segment(1 << 20, blocks, stream=6),
        segment(1 << 21, blocks, device=1),
        segment(1 << 22, blocks, segment_pool_id=(0, 1)),
    ]
    assert list(dut.free_blocks(segments, 0, 5)) == [(4096 + 512, 1024), (4096 + 1792, 2048), (8192, 64)]


def test_gradients_are_not_asked_for_under_deterministic_algorithms(monkeypatch):
    """The switch behind `poisoned_allocations` would have every backward in order: memory is poisoned otherwise."""
    gpu = object.__new__(dut.Gpu)
    gpu.device, poisoned = "cpu", []
    monkeypatch.setattr(dut.Gpu, "poison", lambda self: poisoned.append(1))
    switch = torch.are_deterministic_algorithms_enabled
    gpu._runtime = SimpleNamespace(
        flash_attn=lambda *given, **more: switch(), flash_attn_varlen=lambda *a, **b: switch()
    )
    q = torch.zeros(2, requires_grad=True)
    for function in (gpu.attn, gpu.varlen):
        assert function(q.detach(), q.detach(), q.detach()) and not poisoned
        assert not function(q.detach(), q.detach(), q.detach(), sink=q) and poisoned.pop()
        with torch.no_grad():
            assert function(q, q, q)
