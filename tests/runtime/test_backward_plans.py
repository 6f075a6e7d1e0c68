"""What a warm backward keeps must follow whatever may differ between two backwards of one forward's plan, or graph."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import runtime
from runtime.api import attention
from runtime.call import autograd, launch, plan
from runtime.errors import ArgumentError, NoKernelError
from runtime.load import plans
from tests.runtime.fakes import FakeBackend
from tests.support.attention import BF16, inputs
from tests.support.backward import SINK, assert_close, attention64, leaves
from tests.support.varlen import ints

pytestmark = pytest.mark.usefixtures("backward_registry")


def graph(**options):
    """q, k and v that require grad, and a graph over them whose backward has run once."""
    given = leaves(*inputs(seqlen_q=6, seqlen_k=9, heads_q=4, heads_kv=2))
    out = runtime.flash_attn(*given, **options)
    dout = torch.randn(out.shape).to(BF16)
    gradients(out, given, dout)
    return given, out, dout


def gradients(out, given, dout):
    return torch.autograd.grad(out, given, dout, retain_graph=True)


def exact(given, dout, **options):
    """In fp64."""
    tensors = leaves(*given, dtype=torch.float64)
    return torch.autograd.grad(attention64(*tensors, **options)[0], tensors, dout.double())


def heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def only_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no plan is made or changed."""
    for module, name in ((plan, "prepare"), (attention, "prepare"), (launch, "Launch"), (autograd, "recorded")):
        monkeypatch.setattr(module, name, None)


def test_gradients_of_every_layout_alternate_over_one_graph(backend: FakeBackend, monkeypatch):
    given, out, dout = graph()
    buffer = torch.zeros(dout.numel() + 8, dtype=BF16)
    changes = {
        "as it was": lambda t: t,
        "heads first": heads_first,
        "expanded": lambda t: t[:, :1].expand(t.shape),
        "misaligned": lambda t: buffer[4:-4].view(t.shape).copy_(t),
        "negated": torch._neg_view,
    }
    for warm in (False, True):
        if warm:
            only_launches(monkeypatch)
        for name, change in changes.items():
            changed = change(dout)
            assert_close(gradients(out, given, changed), exact(given, changed))
            read = backend.driver.launched("bwd")[-1]["params"]
            steps = (read["dout_stride_s"], read["dout_stride_h"])
            assert steps == ((64, 6 * 64) if name == "heads first" else (4 * 64, 64)), name
            assert (read["dout"] == changed.data_ptr()) == (name in ("as it was", "heads first")), name


@pytest.mark.parametrize("extra", [(), (SINK, torch.rand(4))], ids=["plain", "sink and slopes"])
def test_what_is_needed_alternates_over_one_plan(backend: FakeBackend, monkeypatch, extra):
    """Twice through every subset of the tensors; each gets what it gets when all do."""
    names = ("q", "k", "v", "sink", "alibi_slopes")[: 3 + len(extra)]
    values = dict(zip(names, (*inputs(seqlen_q=6, seqlen_k=9, heads_q=4, heads_kv=2), *extra), strict=True))
    dout = torch.randn(values["q"].shape).to(BF16)

    def of(needed):
        given = {name: t.clone().requires_grad_(name in needed) for name, t in values.items()}
        before = len(backend.driver.launched("bwd_postprocess"))
        found = torch.autograd.grad(runtime.flash_attn(**given), [given[name] for name in needed], dout)
        assert len(backend.driver.launched("bwd_postprocess")) - before == ("q" in needed)
        return dict(zip(needed, found, strict=True))

    every = of(names)
    for warm in (False, True):
        if warm:
            only_launches(monkeypatch)
        for mask in range(1, 1 << len(names)):
            needed = [name for i, name in enumerate(names) if mask >> i & 1]
            for name, grad in of(needed).items():
                assert torch.equal(grad, every[name]), (name, needed)


def test_hooks_may_swap_what_a_warm_backward_reads(backend: FakeBackend):
    given, out, dout = graph(causal=True)
    want = gradients(out, given, dout)

    def hooked(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            swapped = runtime.flash_attn(*given, causal=True)
        return gradients(swapped, given, dout)

    for unpack in (torch.clone, lambda t: heads_first(t) if t.dim() == 4 else t, lambda t: t.mT.contiguous().mT
                   if t.dtype == torch.float32 else t):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(hooked(unpack), want, strict=True))
    for unpack, argument, reason in (
        (lambda t: t.half() if t.shape == given[1].shape else t, "k", "dtype"),
        (lambda t: t.double() if t.dtype == torch.float32 else t, "lse", "dtype"),
        (lambda t: t[:, :8] if t.shape == given[1].shape else t, "q", "shape"),
        (lambda t: t[..., :32] if t.shape == given[0].shape else t, "k", "shape"),
        (lambda t: torch.zeros(t.numel() + 4, dtype=t.dtype)[4:].view(t.shape) if t.dtype == BF16 else t, "q",
         "alignment"),
    ):  # fmt: skip
        launched = len(backend.driver.launches)
        with pytest.raises(ArgumentError) as error:
            hooked(unpack)
        assert (error.value.argument, error.value.reason) == (argument, reason)
        assert len(backend.driver.launches) == launched + 1  # the forward
    assert all(torch.equal(a, b) for a, b in zip(gradients(out, given, dout), want, strict=True))


def test_a_saved_tensor_whose_data_are_replaced_is_read_where_they_are(backend: FakeBackend):
    given, out, dout = graph()
    want = gradients(out, given, dout)
    given[0].data = heads_first(given[0].data)
    assert all(torch.equal(a, b) for a, b in zip(gradients(out, given, dout), want, strict=True))
    read = backend.driver.launched("bwd")[-1]["params"]
    assert (read["q"], read["q_stride_s"], read["q_stride_h"]) == (given[0].data_ptr(), 64, 6 * 64)


def test_the_settings_in_force_at_the_backward_count(backend: FakeBackend, backward_registry: Path, registry: Path):
    runtime.configure(registry=backward_registry)
    given, out, dout = graph()
    want = gradients(out, given, dout)
    runtime.configure(registry=registry)  # of forwards only
    with pytest.raises(NoKernelError):
        gradients(out, given, dout)
    runtime.configure(registry=backward_registry)
    loaded = backend.driver.calls.count("load_library")
    assert all(torch.equal(a, b) for a, b in zip(gradients(out, given, dout), want, strict=True))
    assert backend.driver.calls.count("load_library") > loaded


def test_each_thread_launches_from_its_own_plan(backend: FakeBackend):
    given, out, dout = graph()
    want, found, used = gradients(out, given, dout), [], []

    def again():
        found.append(gradients(out, given, dout))
        used.append([one for key, one in plans.plans.by_call.items() if key[0] == "bwd"])

    again()
    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    (mine,), (theirs,) = used
    buffers = [{one.params for one in made.chain.launches} for made in (mine, theirs)]
    assert len(buffers[0]) == 4 and buffers[0].isdisjoint(buffers[1])
    assert all(torch.equal(a, b) for grads in found for a, b in zip(grads, want, strict=True))


def test_the_deterministic_switch_is_read_at_each_backward(backend: FakeBackend, monkeypatch):
    given, out, dout = graph()
    by_argument = runtime.flash_attn(*given, deterministic=True)

    def ordered(of):
        gradients(of, given, dout)
        return bool(backend.driver.launched("bwd")[-1]["params"]["semaphores"])

    for warm in (False, True):
        if warm:
            only_launches(monkeypatch)
        try:
            for switch in (True, False, True):
                torch.use_deterministic_algorithms(switch)
                assert ordered(out) == switch and ordered(by_argument)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not ordered(runtime.flash_attn(*given, deterministic=0))
        assert ordered(runtime.flash_attn(*given, deterministic=1))


def test_a_recorded_backward_between_two_plain_ones(backend: FakeBackend):
    given, out, dout = graph()
    want = gradients(out, given, dout)
    for needs_grad in (False, True):
        above = dout.clone().requires_grad_(needs_grad)
        recorded = torch.autograd.grad(out, given, above, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(recorded, want, strict=True))
        assert all(grad.requires_grad == needs_grad for grad in recorded)
        assert not any(grad.requires_grad for grad in gradients(out, given, dout))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        recorded[1].sum().backward()


def test_a_forwards_plan_may_serve_another_length_before_its_backward(backend: FakeBackend, monkeypatch):
    monkeypatch.setattr(plans, "MAX_SIZES", 1)
    lengths = (40, 90, 40, 200)
    graphs = []
    for n in lengths:
        given = leaves(*inputs(seqlen_q=n, seqlen_k=n + 3))
        graphs.append((given, runtime.flash_attn(*given, causal=True)))
    assert len(plans.plans.by_call) == 1
    for given, out in reversed(graphs):
        dout = torch.randn(out.shape).to(BF16)
        for _ in range(2):  # with a new plan, and a warm one
            assert_close(gradients(out, given, dout), exact(given, dout, causal=True))
            assert backend.driver.launched("bwd")[-1]["params"]["seqlen_q"] == out.shape[1]


def test_both_outputs_gradients_come_and_go(backend: FakeBackend, monkeypatch):
    given = leaves(*inputs(seqlen_q=6, seqlen_k=9))
    out, lse = runtime.flash_attn(*given, return_lse=True)
    dout, dlse = torch.randn(out.shape).to(BF16), torch.randn(lse.shape)
    tensors = leaves(*given, dtype=torch.float64)
    right_out, right_lse = attention64(*tensors)
    cases = (
        ([out, lse], [dout, dlse], [right_out, right_lse]),
        ([out], [dout], [right_out]),
        ([lse], [dlse], [right_lse]),
        ([out, lse], [dout, torch._neg_view(dlse)], [right_out, right_lse]),
        ([out, lse], [dout, dlse[..., :1].expand(dlse.shape)], [right_out, right_lse]),
    )
    for warm in (False, True):
        if warm:
            only_launches(monkeypatch)
        for outputs, douts, right in cases:
            found = torch.autograd.grad(outputs, given, douts, retain_graph=True)
            want = torch.autograd.grad(right, tensors, [t.double() for t in douts], retain_graph=True,
                                       materialize_grads=True)  # fmt: skip
            assert_close(found, want)
            read = backend.driver.launched("bwd_preprocess")[-1]["params"]
            assert bool(read["dlse"]) == any(output is lse for output in outputs)


def test_tensors_that_lie_alike_are_told_apart(backend: FakeBackend):
    """Lengths of queries and of keys, sinks and slopes: of one shape and dtype."""
    q, k, v = inputs(seqlen_q=6, seqlen_k=6)
    for name, other in (("seqused_q", "seqused_k"), ("seqused_k", "leftpad_k"), ("sink", "alibi_slopes")):
        for which in (name, other, name):
            value = torch.rand(4) if name == "sink" else ints(3, 4)
            runtime.flash_attn_varlen(*leaves(q, k, v), **{which: value}).sum().backward()
            read = backend.driver.launched("bwd")[-1]["params"]
            for parameter in ("seqused_q", "seqused_k", "leftpad_k", "alibi_slopes"):
                assert read[parameter] == (value.data_ptr() if parameter == which else 0)
