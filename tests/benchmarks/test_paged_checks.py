"""The checks of calls over KV caches themselves, on the CPU and in small: the right pass, every fault is caught."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from tests.gpu import checks, ledger
from tests.gpu.paged_inputs import E4M3, Pages
from tests.gpu.paged_stand_in import PagedStand
from tests.gpu.rotary import misrounded, rotated
from tests.gpu.sanitize import TOOLS
from tests.support.call import Cache
from tests.support.threads import graphs, one_thread

__all__ = ["graphs", "one_thread"]  # fixtures

PAGED = "fwd_paged-bf16-d64-dv64-m16-n32-w1-s2-q4"
LOW = "fwd_paged-fp16-d64-dv32-m16-n32-w1-s2-q4-e4m3kv"
COMBINE, COMBINE_BF16 = "fwd_combine-fp32-d256-dv256-m4", "fwd_combine-bf16-d256-dv256-m4"
APPEND, APPEND_LOW = "kv_append-bf16-d256-dv256-m4", "kv_append-fp16-d256-dv256-m4-e4m3kv"
KEYS = (PAGED, LOW, COMBINE, COMBINE_BF16, APPEND, APPEND_LOW)
CAUGHT = {
    (PAGED, "one key too many"): "yardstick",
    (PAGED, "table ignored"): "yardstick",
    (PAGED, "page sizes are powers of 2"): "yardstick",
    (PAGED, "cache_batch_idx ignored"): "yardstick",
    (PAGED, "causal flag dropped"): "yardstick",
    (PAGED, "window one too wide"): "yardstick",
    (PAGED, "scale 0.5 % off"): "yardstick",
    (PAGED, "partials weighted alike"): "yardstick",
    (PAGED, "lse of the last split"): "yardstick",
    (PAGED, "writes past the end"): "yardstick",
    (LOW, "k_descale ignored"): "yardstick",
    (LOW, "v_descale ignored"): "yardstick",
    (LOW, "descales of the first entry"): "yardstick",
    (PAGED, "the last split loses a key"): "splits",
    (PAGED, "an empty split counts"): "splits",
    (PAGED, "a sink in every split"): "splits",
    (PAGED, "seqused_q with splits accepted"): "varlen",
    (PAGED, "slopes ignored"): "varlen",
    (PAGED, "softcap ignored"): "score_mods",
    (PAGED, "slope's sign"): "score_mods",
    (PAGED, "low sink ignored"): "score_mods",
    (PAGED, "packed rows taken for tokens"): "pack_gqa",
    (PAGED, "packed heads share a slope"): "pack_gqa",
    (PAGED, "scale of the variant's head_dim"): "head_dims",
    (PAGED, "misaligned head_dim accepted"): "head_dims",
    (LOW, "misaligned head_dim accepted"): "head_dims",
    (PAGED, "output not returned"): "strided",
    (PAGED, "empty rows are NaN"): "empty",
    (PAGED, "32-bit offsets"): "beyond_2g",
    (PAGED, "appended a row late"): "append_and_attend",
    (PAGED, "q always rotated by its row"): "append_and_attend",
    (PAGED, "q not rotated"): "append_and_attend",
    (LOW, "not saturated"): "append_and_attend",
    (PAGED, "table ignored "): "drawn",
    (PAGED, "not deterministic"): "determinism",
    (PAGED, "a graph keeps the lengths"): "graph_capture",
    (PAGED, "a graph keeps the table"): "graph_capture",
    (PAGED, "a cold capture"): "graph_capture",
    (PAGED, "a plan keeps its first lengths"): "streams",
    (PAGED, "leftpad ignored"): "leftpad",
    (LOW, "one key of the padding too many"): "leftpad",
    (PAGED, "padding that ends behind the keys ignored"): "leftpad",
    (PAGED, "heads · heads_kv in 32 bits"): "largest",
    (PAGED, "32-bit offsets "): "largest",
    (LOW, "32-bit rows of pages"): "largest",
    (COMBINE, "partials weighted alike"): "combine",
    (COMBINE, "lse of the last split"): "combine",
    (COMBINE, "weights without their maximum"): "combine",
    (COMBINE, "an empty part's NaN counts"): "combine",
    (COMBINE, "strides of the LSE ignored"): "combine",
    (COMBINE, "truncated"): "combine",
    (COMBINE_BF16, "truncated"): "combine",
    (COMBINE, "output not returned"): "into_given",
    (COMBINE_BF16, "writes columns beyond head_dim_v"): "into_given",
    (COMBINE, "not deterministic"): "determinism",
    (COMBINE, "32-bit offsets"): "largest",
    (COMBINE_BF16, "lse of the last split"): "largest",
    (APPEND, "appended a row late"): "append_rows",
    (APPEND, "a row beside is cleared"): "append_rows",
    (APPEND, "no room ignored"): "append_rows",
    (APPEND_LOW, "rounded up"): "append_rows",
    (APPEND, "rotary the other way"): "rotary",
    (APPEND, "a position too far"): "rotary",
    (APPEND, "32-bit rows"): "beyond_2g",
    (APPEND, "not deterministic"): "determinism",
    (APPEND, "lost pages are written"): "lost_pages",
    (APPEND_LOW, "appended a row late"): "lost_pages",
    (APPEND, "appended a row late "): "largest",
    (APPEND_LOW, "heads in 16 bits"): "largest",
}


def run(name, stand, key):
    stand.force(key)
    checks.OPS[key.split("-")[0]][name](stand, key, checks.TINY)


@pytest.mark.parametrize(("key", "name"), [(key, name) for key in KEYS for name in checks.OPS[key.split("-")[0]]])
def test_a_right_implementation_passes(key, name):
    run(name, PagedStand(), key)


@pytest.mark.parametrize(("key", "fault"), CAUGHT)
def test_a_planted_fault_is_caught(key, fault):
    with pytest.raises(AssertionError, match="failures:"):
        run(CAUGHT[key, fault], PagedStand(fault.strip()), key)


@pytest.mark.parametrize("op", ["fwd_paged", "fwd_combine", "kv_append"])
def test_every_check_can_fail_and_is_listed(op):
    named = list(checks.OPS[op])
    assert {name for (key, _), name in CAUGHT.items() if key.split("-")[0] == op} == set(named)
    assert ledger.CONFORMANCE["ops"][op] == [*named, *TOOLS]


@pytest.mark.parametrize("order", ["in order", "permuted", "shared"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_are_each_entrys_own_but_for_what_is_shared(order, page_size):
    rooms = torch.tensor([20, 0, 7, 33, 33])
    pages = Pages(rooms, rooms, Cache(page_size, order), "cpu", 1)
    (entry, token), (page, row) = pages.places(torch.zeros_like(rooms), rooms)
    places = list(zip(page.tolist(), row.tolist(), strict=True))
    assert entry.numel() == rooms.sum() and int(page.min()) >= 0 and int(page.max()) < pages.pages
    assert (len(set(places)) == len(places)) == (order != "shared")
    alike = token < pages.common[entry]
    first = {int(t): at for t, e, at in zip(token, entry, places, strict=True) if e == pages.first}
    assert all(at == first[int(t)] for t, shared, at in zip(token, alike, places, strict=True) if shared)
    assert len({page for page, _ in places}) < pages.pages  # some are nobody's
    beyond = torch.arange(pages.table.shape[1]) >= -(-rooms // page_size)[:, None]
    assert not bool(((pages.table >= 0) & (pages.table < pages.pages))[beyond].any())


def test_rotary_is_a_rotation_of_pairs():
    x = torch.randn(1, 2, 1, 8).bfloat16()
    angle = torch.tensor([[0.3, 1.0], [0.6, 2.0]])
    for interleaved, pairs in ((True, ((0, 1), (2, 3))), (False, ((0, 2), (1, 3)))):
        out, size = rotated(x, angle.cos(), angle.sin(), torch.tensor([[1, 7]]), interleaved)
        for i, (a, b) in enumerate(pairs):
            turn = torch.polar(torch.tensor(1.0).double(), angle[1, i].double())
            turned = torch.complex(x[..., a].double(), x[..., b].double()) * turn
            torch.testing.assert_close(torch.complex(out[..., a], out[..., b]), turned, rtol=1e-6, atol=1e-6)
        assert torch.equal(out[..., 4:], x[..., 4:].double()) and size[..., :4].all()


def test_a_rounding_is_right_or_wrong():
    exact = torch.tensor([1.0, 1.0 + 2**-8, 300.0, 1000.0]).double()
    right = exact.to(torch.bfloat16)
    assert not misrounded(right, exact, exact, torch.bfloat16, 2**-20).any()
    assert misrounded(right * 1.02, exact, exact, torch.bfloat16, 2**-20).all()
    assert misrounded(right * float("nan"), exact, exact, torch.bfloat16, 2**-20).all()
    low = exact.float().clamp(max=448).to(E4M3)
    assert not misrounded(low, exact.clamp(max=448), exact, E4M3, 2**-20).any()
