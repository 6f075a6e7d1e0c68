"""The backward: from a forward's call and tensors to gradients. Imported with `runtime.call.autograd`.

`bwd_preprocess` makes the sums over rows that each query needs and clears dQ's fp32 accumulator, `bwd` makes dK and dV
and adds to the accumulator, `bwd_sum` adds up what splits of `bwd` made, `bwd_postprocess` makes dQ. What little is
left is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from registry import ops
from registry.contract import Variant
from registry.ops.bwd_sum import UNIT
from registry.ops.workspaces import ROWS
from runtime.call import plan, splits, tensors
from runtime.call.forward import LOG2E, backward_facts, stride_of_slopes
from runtime.call.launch import Launch, Loaded, Maker, Settled
from runtime.call.plan import Chain, Outputs, Plan, Workspace
from runtime.call.request import Call, Options, Request
from runtime.call.tensors import Checked, Numbers
from runtime.errors import ArgumentError
from runtime.load import plans

PARTIAL_MULTIPLE = 64  # floats to whose multiples partial sums are rounded: 256 bytes
SEMAPHORE_ROWS = 16
# Workspace -> the argument whose gradient it adds up to.
GRADIENT_OF = {t.name: t.gradient_of for t in ops.get("bwd").tensors if t.gradient_of}
WORKSPACE_OF = {argument: name for name, argument in GRADIENT_OF.items()}
NO_OUTPUTS = Outputs(*(lambda *_: None,) * 4)
KNOWN = tensors.described("bwd")  # imports the ops' descriptions with this module, and not in a first backward
SHAPE_AND_DTYPE, STRIDE, DEVICE = attrgetter("shape", "dtype"), torch.Tensor.stride, torch.Tensor.get_device
# With any of these, rows may belong to no sequence.
LEAVES_ROWS = frozenset(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k"))


class Backward(NamedTuple):
    """What a backward's calls look like, beside their tensors: a role of `runtime.call.plan`.

    call: the forward's. steps: the ops that are needed. needs: names of the tensors whose gradients are wanted.
    """

    call: Call
    steps: tuple[str, ...]
    needs: frozenset[str]
    deterministic: bool

    def fixed(self, request: Request) -> Any:
        scores = tuple(self.call.numbers[name] for name in ("scale_log2", "softcap_scale"))
        return self.call.window, scores, self.steps, self.needs, self.deterministic

    def check(self, request: Request, checked: Checked) -> Call:
        """Of tensors that hooks of saved tensors may have changed."""
        given, forward, sizes = request.tensors, self.call, checked.sizes
        _check_unchanged(sizes, forward.sizes)
        found = forward.numbers | checked.strides
        found |= {"heads_kv": sizes["heads_kv"], "rows": _workspace_rows(sizes)}
        found["alibi_stride_b"] = stride_of_slopes(given.get("alibi_slopes"), sizes["batch"])
        facts = forward.facts | {"heads_kv": sizes["heads_kv"], "group": sizes["heads_q"] // max(sizes["heads_kv"], 1)}
        facts = backward_facts(facts, sizes.get("total_k"))
        return forward._replace(op="bwd", facts=facts, numbers=found, sizes=sizes, given=tuple(given))

    def chain(self, call: Call, request: Request, maker: Maker) -> Chain:
        found, sizes, steps = dict(call.numbers), call.sizes, self.steps
        shared = 1

        def of_main(loaded: Loaded) -> Settled:
            nonlocal shared
            artifact, facts = loaded.kernel.artifact, call.facts
            found["head_dim_accum"] = Variant.parse(artifact.variant).head_dim
            blocks = artifact.grid.blocks(facts)
            shared = splits.group_splits(blocks, facts["group"], *loaded.resident, bool(facts["causal"]))
            stride = _room(sizes, "head_dim") + _room(sizes, "head_dim_v") if shared > 1 else 0
            found.update(splits=shared, dk_partial_stride_split=stride, dv_partial_stride_split=stride)
            return Settled(found, splits=shared)

        # `bwd` is prepared first, even where it is not launched: the other ops need its head_dim.
        main = maker.prepared("bwd", call.facts, of_main)
        launches = [maker.prepared("bwd_preprocess", call.facts, lambda _: Settled(found))]
        spaces = self._workspaces(call, main, shared if "bwd" in steps else 1)
        if "bwd" in steps:
            launches.append(main)
            main.rename({} if shared == 1 else {"dk": "", "dv": ""})
            if shared > 1:
                launches.append(_sum(call, found, maker))
        if "bwd_postprocess" in steps:
            launches.append(maker.prepared("bwd_postprocess", call.facts, lambda _: Settled(found)))
        return Chain(tuple(launches), spaces)

    def _workspaces(self, call: Call, main: Launch, shared: int) -> tuple[Workspace, ...]:
        sizes, rows = call.sizes, int(call.numbers["rows"])
        n = sizes["heads_q"] * rows
        found = [
            Workspace("dq_accum", 4 * n * Variant.parse(main.kernel.artifact.variant).head_dim),
            Workspace("lse_log2", 4 * n),
            Workspace("delta", 4 * n),
        ]
        if self.deterministic:
            found.append(Workspace("semaphores", 4 * n // SEMAPHORE_ROWS))
        if shared > 1:
            of_k, of_v = 4 * _room(sizes, "head_dim"), 4 * _room(sizes, "head_dim_v")
            varied = not LEAVES_ROWS.isdisjoint(call.given)
            found.append(Workspace("dk_partial", shared * (of_k + of_v), zeros=varied))
            found.append(Workspace("dv_partial", 0, inside=("dk_partial", of_k)))
        for name, argument in GRADIENT_OF.items():
            if argument in self.needs and "bwd" in self.steps:
                found.append(Workspace(name, 4 * _key_tiles(call, main) * sizes["heads_q"], zeros=True))
        return tuple(found)

    def outputs(self, call: Call, request: Request, torch: Any) -> Outputs:
        """Gradients that the kernels write, and zeros for those that nothing depends on; sums over rows come later."""
        launched, given = "bwd" in self.steps, request.tensors
        zeros = not launched or not LEAVES_ROWS.isdisjoint(call.given)
        made = [name for name in "qkv" if name in self.needs or (launched and name != "q")]
        if not launched:
            made += [name for name in GRADIENT_OF.values() if name in self.needs]
        return NO_OUTPUTS._replace(gradients=tuple([(name, f"d{name}", _maker(given[name], zeros)) for name in made]))


def _check_unchanged(sizes: Mapping[str, int], before: Mapping[str, int]) -> None:
    """ArgumentError where a hook of saved tensors gave one of another size than it took."""
    for name, n in before.items():
        if name != "heads_kv" and sizes.get(name, n) != n:  # expanded heads are one in the forward
            message = f"a saved tensor has {name} {sizes[name]}, in the forward it had {n}; its hook must keep sizes"
            raise ArgumentError("q", message, reason="shape")


def gradients(call: Call, saved: Mapping[str, Any], dout: Any, dlse: Any, needs: frozenset[str],
              deterministic: bool) -> dict[str, Any]:  # fmt: skip
    """{name: gradient} of the tensors that `needs` names.

    saved: the forward's tensors, out and lse among them, by name. dout, dlse: of out and lse, with their shapes and
    dtypes; None: nothing depends on it. Raises what flash_attn raises.
    """
    given = {**saved, "dout": _readable(torch.zeros_like(saved["out"]) if dout is None else dout)}
    given["lse"] = saved["lse"].contiguous()  # which a hook of saved tensors may have changed
    if dlse is not None:
        given["dlse"] = dlse.resolve_neg()
    numbers, facts, every = call.numbers, call.facts, given.values()
    key = ("bwd", needs, deterministic, call.window, numbers["scale_log2"], numbers["softcap_scale"],
           facts["seqlen_q"], facts["seqlen_k"],
           *given, *map(SHAPE_AND_DTYPE, every), *map(STRIDE, every), *map(DEVICE, every))  # fmt: skip
    kept: Plan | None = plans.plans.by_call.get(key)
    if kept is None:
        steps = _steps(saved, needs)
        if not steps:
            return {name: _maker(saved[name], True)(saved[name]) for name in needs}
        request = Request("bwd", {name: tensor for name, tensor in given.items() if name in KNOWN}, Options())
        kept = plan.prepare(Backward(call, steps, needs, deterministic), request, key)
    return _run(kept, needs, given)


def _steps(saved: Mapping[str, Any], needs: frozenset[str]) -> tuple[str, ...]:
    """The ops that are needed: without dq no postprocess, with the sink alone the preprocess only."""
    if saved["q"].numel() == 0 or saved["lse"].numel() == 0:
        return ()
    if any(saved[name].shape[0] < 2 for name in ("cu_seqlens_q", "cu_seqlens_k") if name in saved):  # no entries
        return ()
    if saved["k"].numel() == 0 or needs == {"sink"}:
        return ("bwd_preprocess",) if "sink" in needs else ()
    return ("bwd_preprocess", "bwd", *(("bwd_postprocess",) if "q" in needs else ()))


def _run(kept: Plan, needs: frozenset[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Allocate, launch, and sum up what is left to be summed; {name: gradient}."""
    at, made = plan.addresses(kept, given), {}
    for argument, name, new in kept.gradients:
        gradient = made[argument] = new(given[argument])
        at[name] = gradient.data_ptr()
    space = plan.allocate(kept, at)
    plan.fire(kept, at)
    return {name: made[name] if name in made else _summed(name, kept, space, given) for name in needs}


def _summed(name: str, kept: Plan, space: Any, given: Mapping[str, Any]) -> Any:
    """The gradient of what every row has a part in. space: of the workspaces."""
    heads = kept.call.sizes["heads_q"]
    if name == "sink":
        lse_log2, delta = (plan.floats(kept, space, part).view(heads, -1) for part in ("lse_log2", "delta"))
        return _of_sink(given[name], lse_log2, delta)
    by_tile = plan.floats(kept, space, WORKSPACE_OF[name]).view(-1, heads)
    return _over_tiles(kept, given[name], given.get("cu_seqlens_k"), by_tile)


def _of_sink(sink: Any, lse_log2: Any, delta: Any) -> Any:
    """A row's sink has the weight exp(sink - lse), and no value. lse_log2 is +inf for rows that do not exist."""
    weights = (sink.float()[:, None] * LOG2E - lse_log2).exp2_()
    return weights.mul_(delta).sum(1).neg_().to(sink.dtype)


def _over_tiles(kept: Plan, argument: Any, starts: Any, by_tile: Any) -> Any:
    """The gradient of an argument (heads_q,) or (batch, heads_q), of its parts by tiles of keys; the sums' order does
    not change from run to run. starts: cu_seqlens_k, None for dense keys."""
    if argument.dim() == 1:
        return by_tile.sum(0)
    batch, heads = argument.shape
    if starts is None:
        return by_tile.view(batch, -1, heads).sum(1)
    tile = next(one for one in kept.chain.launches if one.kernel.abi.op == "bwd").kernel.artifact.grid.tile_m
    firsts = starts // tile + torch.arange(batch + 1, device=argument.device)
    firsts = firsts.clamp_(0, by_tile.shape[0]).cummax(0).values  # whatever the lengths say, inside by_tile
    return torch.segment_reduce(by_tile, "sum", offsets=firsts, axis=0, initial=0, unsafe=True)


def _maker(tensor: Any, zeros: bool) -> Callable[[Any], Any]:
    """What makes a contiguous tensor of a tensor's shape and dtype; zeros: of zeros."""
    make = torch.zeros_like if zeros else torch.empty_like
    return make if tensor.is_contiguous() else partial(make, memory_format=torch.contiguous_format)


def _readable(dout: Any) -> Any:
    """A contiguous copy, unless the kernels can read dout 16 bytes at a time."""
    if dout.is_contiguous() and not dout.data_ptr() % tensors.ALIGNMENT and not dout.is_neg():
        return dout  # as nearly always; its strides are multiples of a head_dim that the forward took
    dout = dout.resolve_neg()
    *strides, last = dout.stride()
    odd = any(n > 1 and (step % tensors.STRIDE or step == 0) for n, step in zip(dout.shape, strides, strict=False))
    if last != 1 or odd or dout.data_ptr() % tensors.ALIGNMENT:
        return dout.clone(memory_format=torch.contiguous_format)
    return dout


# -- numbers ----------------------------------------------------------------------------------------------------------


def _workspace_rows(sizes: Mapping[str, int]) -> int:
    """Rows of a head in the workspaces; `registry.ops.workspaces` says which query has which."""
    if "total_q" in sizes:
        return (sizes["total_q"] // ROWS + sizes["batch"]) * ROWS
    return sizes["batch"] * -(-sizes["seqlen_q"] // ROWS) * ROWS


def _elements(sizes: Mapping[str, int], dim: str) -> int:
    tokens = sizes["total_k"] if "total_k" in sizes else sizes["batch"] * sizes["seqlen_k"]
    return tokens * sizes["heads_kv"] * sizes[dim]


def _room(sizes: Mapping[str, int], dim: str) -> int:
    """Floats of a split's sums of k (dim head_dim) or v (head_dim_v)."""
    return -(-_elements(sizes, dim) // PARTIAL_MULTIPLE) * PARTIAL_MULTIPLE


def _key_tiles(call: Call, main: Launch) -> int:
    """Of all entries."""
    return main.kernel.artifact.grid.blocks(call.facts) // call.facts["heads_kv"]


def _sum(call: Call, found: Numbers, maker: Maker) -> Launch:
    elements = _elements(call.sizes, "head_dim"), _elements(call.sizes, "head_dim_v")
    facts = {name: call.facts[name] for name in ("dtype", "head_dim", "head_dim_v")}
    facts["rows"] = sum(-(-n // UNIT) for n in elements)
    found = found | {"dk_elements": elements[0], "dv_elements": elements[1]}
    return maker.prepared("bwd_sum", facts, lambda _: Settled(found))
