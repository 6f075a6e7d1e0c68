"""Left padding: the keys before an entry's first one are neither read nor attended to, and masks stay aligned with the
end. Padding is NaN here, and pages of nothing else are not even in the table.
"""

from __future__ import annotations

import pytest
import torch

import runtime
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, reference
from tests.support.backward import SINK, Side, assert_close, attention64, grads, leaves
from tests.support.kvcache import NOWHERE, Cache, queries, rotated
from tests.support.varlen import ints

LENGTHS = (5, 0, 70, 3), (9, 4, 150, 6)  # of queries, of keys
FIRST = (2, -3, 131, 9)  # clamped to what there is
SIDES = [(False, False, False), (False, False, True), (True, True, False), (True, True, True), (True, False, False),
         (False, True, False)]  # fmt: skip
OPTIONS = [{}, {"causal": True}, {"window": (3, 1)}, {"alibi_slopes": torch.rand(4, 4)}, {"softcap": 0.8},
           {"alibi_slopes": torch.rand(4), "causal": True, "window": (20, None)}]  # fmt: skip


class Call:
    """q, k and v of entries that begin with padding; `of_q` and `of_k` say where they lie."""

    def __init__(self, packed_q: bool, packed_k: bool, used: bool, first=FIRST):
        torch.manual_seed(5)
        self.of_q, self.of_k = Side(LENGTHS[0], packed_q, used), Side(LENGTHS[1], packed_k, used)
        if not packed_k and not used:
            self.of_k.seqused, self.of_k.alive = None, [150] * 4  # a dense k without lengths: only padding tells
        self.first = [min(max(n, 0), alive) for n, alive in zip(first, self.of_k.alive, strict=True)]
        self.given = [self.of_q.tensor(4), self.of_k.tensor(2), self.of_k.tensor(2)]
        self.leftpad = ints(*first)
        with torch.no_grad():
            for b, n in enumerate(self.first):
                for t in self.given[1:]:
                    self.of_k.entry(b, t)[:, :n] = torch.nan

    def run(self, **options):
        return runtime.flash_attn_varlen(
            *self.given, cu_seqlens_q=self.of_q.ends, cu_seqlens_k=self.of_k.ends, seqused_q=self.of_q.seqused,
            seqused_k=self.of_k.seqused, leftpad_k=self.leftpad, return_lse=True, **options,
        )  # fmt: skip

    def entries(self, tensors=None):
        """(number, q, k, v) of each entry that has queries; keys from the first one on."""
        for b, first in enumerate(self.first):
            if self.of_q.alive[b]:
                q, k, v = tensors or self.given
                yield b, self.of_q.entry(b, q), *(self.of_k.entry(b, t)[:, first:] for t in (k, v))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize(("packed_q", "packed_k", "used"), SIDES)
def test_forward(backend: FakeBackend, packed_q, packed_k, used, options):
    made = Call(packed_q, packed_k, used)
    for _ in range(2):
        with torch.no_grad():
            out, lse = made.run(**options)
        assert backend.driver.launches[-1]["params"]["leftpad_k"] == made.leftpad.data_ptr()
        for b, q, k, v in made.entries():
            slopes = options.get("alibi_slopes")
            ours = options | ({"alibi_slopes": slopes[b : b + 1]} if slopes is not None and slopes.dim() == 2 else {})
            want, want_lse = reference(q.detach(), k.detach(), v.detach(), **ours)
            torch.testing.assert_close(made.of_q.entry(b, out).double(), want, atol=2e-2, rtol=2e-2)
            of_b = made.of_q.entry(b, lse.transpose(-1, -2)).transpose(1, 2)
            torch.testing.assert_close(of_b, want_lse.float(), atol=1e-3, rtol=1e-4)


@pytest.mark.usefixtures("registry")
def test_contents_may_change_under_a_plan(backend: FakeBackend):
    made = Call(True, True, False, first=(8, 0, 149, 5))
    with torch.no_grad():
        many, _ = made.run()
        kept = len(plans.plans.by_call)
        for t in made.given[1:]:
            t.nan_to_num_(2)
        made.leftpad.zero_()
        made.first = [0, 0, 0, 0]
        none, _ = made.run()
    assert len(plans.plans.by_call) == kept and not torch.equal(many, none)
    for b, q, k, v in made.entries():
        want, _ = reference(q.detach(), k.detach(), v.detach())
        torch.testing.assert_close(made.of_q.entry(b, none).double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("backward_registry")
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize(("packed_q", "packed_k", "used"), SIDES)
@pytest.mark.parametrize("resident", [(1, 1), (132, 1)], ids=str)
def test_gradients(backend: FakeBackend, packed_q, packed_k, used, options, resident):
    """Those of padding are zeros, as are those of all that belongs to no sequence."""
    backend.driver.resident = resident
    made = Call(packed_q, packed_k, used)
    slopes, sink = leaves(options.get("alibi_slopes"), SINK)
    options = options | {"sink": sink, "alibi_slopes": slopes}
    out, lse = made.run(**options)
    dout, dlse = torch.randn(out.shape).to(BF16), torch.randn(lse.shape)
    torch.autograd.backward((out, lse), (dout, dlse))
    exact = leaves(*(t.detach().nan_to_num() for t in made.given), sink, slopes, dtype=torch.float64)
    for b, q, k, v in made.entries(exact[:3]):
        of_b = None if slopes is None else exact[4] if slopes.dim() == 1 else exact[4][b : b + 1]
        want = attention64(q, k, v, **options | {"sink": exact[3], "alibi_slopes": of_b})
        by_row = made.of_q.entry(b, dlse.transpose(-1, -2)).transpose(1, 2)
        torch.autograd.backward(want, (made.of_q.entry(b, dout).double(), by_row.double()))
    assert_close(grads([*made.given, sink, slopes]), grads(exact))
    for found, want in zip(made.given, exact, strict=False):
        assert not found.grad[(want.grad == 0).all(-1)].any()
    for b, n in enumerate(made.first):
        for t in made.given[1:]:
            assert not made.of_k.entry(b, t.grad)[:, :n].any()
    assert {m["params"]["leftpad_k"] for m in backend.driver.launched("bwd")} == {made.leftpad.data_ptr()}
    splits = {m["params"]["splits"] for m in backend.driver.launched("bwd")}
    assert (splits != {1}) == bool(backend.driver.launched("bwd_sum")) == (resident == (132, 1))


# -- over a cache -----------------------------------------------------------------------------------------------------


def padded(lengths, first, **options) -> Cache:
    """NaN where padding is, and no page that holds nothing else."""
    cache = Cache(lengths, **options)
    for b, n in enumerate(first):
        for j in range(n):
            page = cache.table[b, j // cache.page_size].item()
            if page != NOWHERE:
                cache.k[page, j % cache.page_size] = cache.v[page, j % cache.page_size] = torch.nan
        cache.table[b, : n // cache.page_size] = NOWHERE
    return cache


def keys_of(cache: Cache, array, b: int, first: int, n: int):
    """(1, n − first, heads_kv, dim): without the table's places before."""
    j = torch.arange(first, n)
    return array.float()[cache.table[b, j // cache.page_size].long(), j % cache.page_size][None]


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize(("arguments", "options"), [
    ({}, {}), ({"causal": True}, {"causal": True}), ({"window_size": (9, 0)}, {"window": (9, 0)}),
    ({"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])}, {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])}),
], ids=["none", "causal", "window", "slopes"])  # fmt: skip
def test_pages(backend: FakeBackend, num_splits, arguments, options):
    lengths, first = (5, 30, 70, 6), (0, 9, 64, 6)
    cache, q, leftpad = padded(lengths, first, max_pages=20), queries(4, 2), ints(*first)
    for _ in range(2):
        out, lse = runtime.flash_attn_with_kvcache(
            q, cache.k, cache.v, cache_seqlens=cache.lengths, cache_leftpad=leftpad, block_table=cache.table,
            num_splits=num_splits, return_softmax_lse=True, **arguments,
        )  # fmt: skip
        assert backend.driver.launched("fwd_paged")[-1]["params"]["leftpad_k"] == leftpad.data_ptr()
        for b, (n, start) in enumerate(zip(lengths, first, strict=True)):
            k, v = (keys_of(cache, x, b, start, n) for x in (cache.k, cache.v))
            want, want_lse = reference(q[b : b + 1], k, v, **options)
            torch.testing.assert_close(out[b : b + 1].double(), want, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(lse[b : b + 1], want_lse.float(), atol=1e-3, rtol=1e-4)
    assert not out[3].any() and (lse[3] == -torch.inf).all()


@pytest.mark.usefixtures("cache_registry")
def test_a_contiguous_cache(backend: FakeBackend):
    torch.manual_seed(2)
    k, v, q = torch.randn(3, 12, 2, 64).to(BF16), torch.randn(3, 12, 2, 64).to(BF16), queries()
    first, lengths = (3, 0, 7), (12, 5, 9)
    for b, n in enumerate(first):
        k[b, :n] = v[b, :n] = torch.nan
    for seqlens, entry in ((ints(*lengths), None), (None, None), (ints(*lengths), ints(0, 1, 2))):
        out = runtime.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens, cache_leftpad=ints(*first),
                                              cache_batch_idx=entry)  # fmt: skip
        for b, n in enumerate(lengths if seqlens is not None else (12, 12, 12)):
            want, _ = reference(q[b : b + 1], k[b : b + 1, first[b] : n], v[b : b + 1, first[b] : n])
            torch.testing.assert_close(out[b : b + 1].double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("cache_registry")
@pytest.mark.parametrize("rotary_dim", [0, 32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_appended_tokens_keep_their_positions(backend: FakeBackend, rotary_dim, causal, num_splits):
    """Where they go, and by how much they and the queries are turned, is counted from the row's start."""
    lengths, first = (5, 9, 17), (2, 9, 8)
    cache, q = padded(lengths, first, max_pages=9, room=6), queries(seqlen_q=3)
    new = [torch.randn(3, 3, 2, 64).to(BF16) for _ in range(2)]
    angles = torch.rand(40, rotary_dim // 2) * 6
    tables = (angles.cos().to(BF16), angles.sin().to(BF16)) if rotary_dim else (None, None)
    out = runtime.flash_attn_with_kvcache(
        q, cache.k, cache.v, *new, *tables, cache.lengths, cache_leftpad=ints(*first), block_table=cache.table,
        causal=causal, num_splits=num_splits,
    )  # fmt: skip
    for b, (n, start) in enumerate(zip(lengths, first, strict=True)):
        positions = torch.arange(n, n + 3)
        of_k, of_q = new[0][b].double(), q[b].double()
        if rotary_dim:
            of_k = rotated(of_k, *tables, positions, True)
            of_q = rotated(of_q, *tables, positions if causal else torch.full_like(positions, n), True)
        k, v = (keys_of(cache, x, b, start, n + 3) for x in (cache.k, cache.v))
        torch.testing.assert_close(k[0, n - start :].double(), of_k, atol=2e-2, rtol=2e-2)
        assert torch.equal(v[0, n - start :], new[1][b].float())
        want, _ = reference(of_q[None], k, v, causal=causal)
        torch.testing.assert_close(out[b : b + 1].double(), want, atol=3e-2, rtol=3e-2)
