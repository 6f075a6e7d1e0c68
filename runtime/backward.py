"""The backward: from a forward's call and tensors to gradients, in three launches or four. Imported with
`runtime.autograd`.

`bwd_preprocess` makes the sums over rows that each query needs and clears dQ's fp32 accumulator, `bwd` makes dK and dV
and adds to the accumulator, `bwd_postprocess` makes dQ of it; where blocks share a group's heads, `bwd_sum` adds up
their parts of dK and dV. What little is left is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from registry.contract import Variant
from runtime import arguments, checks, launch, memory, params, planning, session, splits
from runtime.arguments import Call
from runtime.load import Kernel

NOTHING = (None,) * len(arguments.OPTIONAL)
OPS = ("bwd_preprocess", "bwd", "bwd_postprocess")
SUMS = 64  # floats to whose multiples partial sums are rounded: 256 bytes
SEMAPHORE_ROWS = 16


class Saved(NamedTuple):
    """What autograd keeps of a forward: its tensors, then arguments.OPTIONAL."""

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    page_table: Any
    sink: Any
    alibi_slopes: Any

    @property
    def varied(self) -> bool:
        """Whether rows may belong to no sequence, which the kernels do not write."""
        return any(t is not None for t in (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k))


class Needs(NamedTuple):
    """Whose gradients are wanted."""

    q: bool
    k: bool
    v: bool
    sink: bool
    alibi_slopes: bool


class _Ready:
    """What calls that look alike need. Belongs to one thread."""

    __slots__ = ("accum", "adding", "keys", "known", "lengths", "plans", "rows", "splits", "tiles")
    lengths: tuple[Any, ...] | None  # that the rest is for
    plans: tuple[launch.Plan, launch.Plan, launch.Plan]  # of OPS
    adding: launch.Plan | None  # of `bwd_sum`, with several splits
    known: dict[str, launch.Plan]  # by variant, also those of other lengths
    rows: int  # of a head in the workspaces
    accum: int  # head_dim of dq_accum
    splits: int  # blocks that share the query heads of a key/value head
    keys: int  # of a tile
    tiles: int  # of keys, of all entries


def gradients(call: Call, saved: Saved, dout: Any, dlse: Any, needs: Needs, deterministic: bool) -> tuple[Any, ...]:
    """Of q, k, v, sink and alibi_slopes; None where they are not needed.

    dout, dlse: of out and lse, with their shapes and dtypes; None: nothing depends on it. Raises what flash_attn
    raises.
    """
    launches = _launches(saved, needs)
    new = torch.zeros_like if launches < 2 or saved.varied else torch.empty_like
    new = partial(new, memory_format=torch.contiguous_format)
    dq, dk, dv = new(saved.q) if needs.q else None, new(saved.k), new(saved.v)
    dsink = torch.zeros_like(saved.sink) if needs.sink and not launches else None
    dslopes = torch.zeros_like(saved.alibi_slopes) if needs.alibi_slopes and launches < 2 else None
    if launches:
        dout = _readable(torch.zeros_like(saved.out) if dout is None else dout)
        dlse = None if dlse is None else dlse.resolve_neg()
        ready = _find(call, saved, dout, dlse)
        lse_log2, delta, dalibi = _run(ready, saved, dout, dlse, (dq, dk, dv), launches, needs, deterministic)
        if needs.sink:
            dsink = _of_sink(saved.sink, lse_log2, delta)
        if dalibi is not None:
            dslopes = _of_slopes(ready, saved, dalibi)
    return (dq, dk if needs.k else None, dv if needs.v else None, dsink, dslopes)


def _launches(saved: Saved, needs: Needs) -> int:
    """How many of OPS are needed."""
    if saved.q.numel() == 0 or saved.lse.numel() == 0:
        return 0
    if saved.k.numel() == 0:
        return 1 if needs.sink else 0
    if needs.q:
        return 3
    return 2 if needs.k or needs.v or needs.alibi_slopes else 1


def _run(ready: _Ready, saved: Saved, dout: Any, dlse: Any, grads: tuple[Any, Any, Any], launches: int, needs: Needs,
         deterministic: bool) -> tuple[Any, Any, Any]:  # fmt: skip
    """Launch. (lse_log2, delta, dalibi): (heads_q, rows) twice, and (tiles, heads_q) or None."""
    q, heads, rows = saved.q, saved.q.shape[-2], ready.rows
    dq, dk, dv = grads
    lse = saved.lse.contiguous()  # which a hook of saved tensors may have changed
    qp, kp, vp, op = (t.data_ptr() for t in saved[:4])
    if (qp | kp | vp | op) % memory.ALIGNMENT:
        memory.check_alignment(memory.ALIGNMENT, ("q", qp), ("k", kp), ("v", vp), ("out", op))

    n = heads * rows
    accum = n * ready.accum
    space = q.new_empty(accum + 2 * n + (n // SEMAPHORE_ROWS if deterministic else 0), dtype=torch.float32)
    dq_accum: int = space.data_ptr()
    lse_log2 = dq_accum + 4 * accum
    delta = lse_log2 + 4 * n
    semaphores = delta + 4 * n if deterministic else 0
    dalibi = None
    if needs.alibi_slopes and launches > 1:
        dalibi = torch.zeros((ready.tiles, heads), dtype=torch.float32, device=q.device)
    sums = _sums(ready, saved) if ready.splits > 1 and launches > 1 else None

    pre, middle, post = ready.plans
    of_q = _address(saved.cu_seqlens_q), _address(saved.seqused_q)
    pre.pack(op, dout.data_ptr(), lse.data_ptr(), _address(dlse), lse_log2, delta, dq_accum, semaphores, *of_q)
    middle.pack(qp, kp, vp, dout.data_ptr(), lse_log2, delta, dq_accum,
                *((dk.data_ptr(), dv.data_ptr(), 0, 0) if sums is None else (0, 0, *map(_address, sums))),
                of_q[0], _address(saved.cu_seqlens_k), of_q[1], _address(saved.seqused_k), 0,
                _address(saved.alibi_slopes), _address(dalibi), semaphores)  # fmt: skip
    post.pack(dq_accum, _address(dq), *of_q)
    plans: tuple[launch.Plan, ...] = ready.plans[:launches]
    if sums is not None and ready.adding is not None:
        ready.adding.pack(*map(_address, sums), dk.data_ptr(), dv.data_ptr())
        plans = (*plans[:2], ready.adding, *plans[2:])
    launch.launch_all(plans)
    return space[accum : accum + n].view(heads, rows), space[accum + n : accum + 2 * n].view(heads, rows), dalibi


def _of_sink(sink: Any, lse_log2: Any, delta: Any) -> Any:
    """A row's sink has the weight exp(sink - lse), and no value. lse_log2 is +inf for rows that do not exist."""
    weights = (sink.float()[:, None] * params.LOG2E - lse_log2).exp2_()
    return weights.mul_(delta).sum(1).neg_().to(sink.dtype)


def _of_slopes(ready: _Ready, saved: Saved, dalibi: Any) -> Any:
    """dalibi: of each tile of keys; the sums' order does not change from run to run."""
    slopes = saved.alibi_slopes
    if slopes.dim() == 1:
        return dalibi.sum(0)
    if saved.cu_seqlens_k is None:
        return dalibi.view(slopes.shape[0], -1, slopes.shape[1]).sum(1)
    firsts = saved.cu_seqlens_k // ready.keys + torch.arange(slopes.shape[0] + 1, device=slopes.device)
    firsts = firsts.clamp_(0, ready.tiles).cummax(0).values  # whatever the lengths say, inside dalibi
    return torch.segment_reduce(dalibi, "sum", offsets=firsts, axis=0, initial=0, unsafe=True)


def _address(tensor: Any) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _readable(dout: Any) -> Any:
    """A contiguous copy, unless the kernels can read dout 16 bytes at a time."""
    dout = dout.resolve_neg()
    *strides, last = dout.stride()
    odd = any(n > 1 and (step % checks.STRIDE or step == 0) for n, step in zip(dout.shape, strides, strict=False))
    if last != 1 or odd or dout.data_ptr() % memory.ALIGNMENT:
        return dout.clone(memory_format=torch.contiguous_format)
    return dout


def _sums(ready: _Ready, saved: Saved) -> tuple[Any, Any]:
    """(splits, elements): what is summed up to dk, and to dv."""
    n = [_room(t) for t in (saved.k, saved.v)]
    new = torch.zeros if saved.varied else torch.empty
    space = new((ready.splits, sum(n)), dtype=torch.float32, device=saved.q.device)
    return space[:, : saved.k.numel()], space[:, n[0] : n[0] + saved.v.numel()]


def _room(tensor: Any) -> int:
    """Floats of a split's sums."""
    n: int = tensor.numel()
    return -(-n // SUMS) * SUMS


# -- plans ------------------------------------------------------------------------------------------------------------


def _find(call: Call, saved: Saved, dout: Any, dlse: Any) -> _Ready:
    """This thread's plans for such a call, made or changed if need be."""
    q, k, v, out = saved[:4]
    packed_q, packed_k, slopes = saved.cu_seqlens_q is not None, saved.cu_seqlens_k is not None, saved.alibi_slopes
    facts, plans = call.facts, launch.plans
    # As attention._shapes: of packed tokens one and more are told apart.
    q_shape = (facts["batch"], min(q.shape[0], 2), q.shape[1:]) if packed_q else q.shape
    k_shape = (min(k.shape[0], 2), k.shape[1:], v.shape[1:]) if packed_k else (k.shape, v.shape)
    key = ("backward", q_shape, k_shape, packed_q, packed_k, q.dtype, q.get_device(),
           q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(), dlse is None,
           None if slopes is None else slopes.stride(), call.window, call.scale, call.softcap)  # fmt: skip
    of_lse = None if dlse is None else dlse.stride()
    lengths = (call.seqlen_q, call.seqlen_k, facts["seqlen_q"], facts["seqlen_k"], of_lse)
    ready: _Ready | None = plans.by_call.get(key)
    if ready is not None and ready.lengths == lengths:
        return ready
    fresh = ready is None
    if ready is None:
        ready = _Ready()
        ready.known = {}
    ready.lengths = None  # of no call, should anything below fail
    _prepare(ready, call, saved, dout, dlse)
    ready.lengths = lengths
    if fresh:
        plans.keep(key, ready)
    return ready


def _prepare(ready: _Ready, call: Call, saved: Saved, dout: Any, dlse: Any) -> None:
    """Find and load the kernels, and make plans for these lengths."""
    q, k, v, out = saved[:4]
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):  # hooks of saved tensors may have changed them
        checks.check_rows(name, tensor)
    call = call._replace(alibi_stride_b=arguments.alibi_stride_b(saved.alibi_slopes, call.facts["batch"]))
    facts = arguments.backward_facts(call.facts, None if saved.cu_seqlens_k is None else k.shape[0])
    read = {"q": q, "k": k, "v": v, "o": out, "dout": dout}
    steps = {name: params.steps(t.shape, t.stride()) for name, t in read.items()}
    steps |= {f"d{name}": params.contiguous(read[name].shape, read[name].shape[-1]) for name in "qkv"}
    steps["dlse"] = (0, 0, 0)
    if dlse is not None:
        by_row = dlse.transpose(-1, -2)  # (…, seqlen_q, heads_q)
        steps["dlse"] = params.steps((*by_row.shape, 1), (*by_row.stride(), 1))
    now = session.current()

    def middle(kernel: Kernel, resident: tuple[int, int]) -> tuple[params.Typed, int]:
        grid = kernel.artifact.grid
        blocks = grid.blocks(facts)
        ready.accum = Variant.parse(kernel.artifact.variant).head_dim
        ready.keys, ready.tiles = grid.tile_m, blocks // facts["heads_kv"]
        ready.splits = splits.group_splits(blocks, facts["group"], *resident, bool(facts["causal"]))
        stride = _room(k) + _room(v) if ready.splits > 1 else 0
        return params.bwd(call, _only(steps, "q k v dout dk dv"), ready.splits, stride), ready.splits

    make = partial(_plan, now, ready.known, facts, q.get_device())
    of_middle = make("bwd", middle)
    before = params.bwd_preprocess(call, _only(steps, "o dout dlse"), ready.accum)
    after = params.bwd_postprocess(call, steps["dq"], ready.accum)
    ready.plans = (make("bwd_preprocess", lambda *_: (before, 1)), of_middle,
                   make("bwd_postprocess", lambda *_: (after, 1)))  # fmt: skip
    ready.rows = params.backward_rows(call)
    ready.adding = None
    if ready.splits > 1:
        elements = k.numel(), v.numel()
        sums = params.bwd_sum(ready.splits, _room(k) + _room(v), elements)
        facts = facts | {"rows": params.sum_rows(elements)}
        ready.adding = _plan(now, ready.known, facts, q.get_device(), "bwd_sum", lambda *_: (sums, 1))


def _only(steps: dict[str, params.Steps], names: str) -> dict[str, params.Steps]:
    return {name: steps[name] for name in names.split()}


def _plan(now: session.Session, known: dict[str, launch.Plan], facts: dict[str, Any], device: int, op: str,
          values_of: Callable[[Kernel, tuple[int, int]], tuple[params.Typed, int]]) -> launch.Plan:  # fmt: skip
    """A plan, that of `known` if there is one. values_of: from a kernel, and multiprocessors with the blocks that each
    holds at once, to parameters and splits."""
    backend = now.backend

    def build(kernel: Kernel, _: bool) -> launch.Plan:
        artifact = kernel.artifact
        plan = known.get(artifact.variant)
        if plan is not None:
            values, shared = values_of(kernel, plan.resident)
            plan.rewrite(values, facts, shared)
            return plan
        resident = backend.driver.resident_blocks(device, kernel.function, artifact.threads, kernel.smem)
        values, shared = values_of(kernel, resident)
        plan = known[artifact.variant] = launch.Plan(kernel, values, facts, 1, device, backend, shared)
        plan.resident = resident
        return plan

    return planning.make(now, op, facts, device, build)
