"""Calls with a cache that launch more than the forward: append before it, combine behind it, memory in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from registry.contract import Variant
from runtime.api.combine import combine_plan
from runtime.call import launch, params, planning, splits
from runtime.call.arguments import Arguments, Call
from runtime.call.cached import NEW, PAGED, Cached
from runtime.load.kernel import Kernel
from runtime.load.session import Session

SEQUSED_K, PAGE_TABLE = PAGED.index("seqused_k"), PAGED.index("page_table")
DESCALES = slice(PAGED.index("k_descale"), PAGED.index("v_descale") + 1)


def choose_splits(call: Call, kernel: Kernel, pack: int, resident: tuple[int, int]) -> int:
    """How many blocks share a tile's keys. resident: multiprocessors, and blocks that each holds at once."""
    cache = call.cached
    if cache is None:
        return 1
    if cache.num_splits:
        return cache.num_splits
    facts, artifact = call.facts, kernel.artifact
    keys = splits.visible_keys(facts["seqlen_q"], facts["seqlen_k"], call.window)
    variant = Variant.parse(artifact.variant)
    units, key_blocks = artifact.grid.blocks(facts, pack), -(-keys // variant.size("n"))
    return splits.num_splits(units, key_blocks, *resident, heavy=splits.is_heavy(variant))


class Chain:
    """Belongs to one thread, as its plans do.

    Workspaces, of the caching allocator, for the time of a call: partial outputs with their LSE, num_splits ·
    (head_dim_v + 1) · 4 bytes for each head of each query, and a rotated copy of q.
    """

    __slots__ = ("append", "combine", "floats", "forward", "lse_offset", "new_q", "new_space", "plans", "written")
    append: launch.Plan | None
    combine: launch.Plan | None
    forward: launch.Plan | None  # None: there are no queries
    plans: tuple[launch.Plan, ...]  # in order
    floats: int  # of all partial outputs and their LSE
    lse_offset: int  # bytes to the first partial LSE
    new_space: Callable[[int], Any]
    new_q: Callable[[Any], Any] | None  # makes the rotated copy
    written: Callable[[Any], None] | None  # None: the cache is only read

    @classmethod
    def of(cls, now: Session, old: Chain | None, given: Arguments, call: Call, forward: launch.Plan | None,
           num_splits: int) -> Chain:  # fmt: skip
        """old: that of the same key with other lengths; its plans are used again."""
        cache, torch, made = call.cached, now.backend.torch, cls()
        assert cache is not None
        made.append = made.combine = made.new_q = made.written = None
        made.forward, made.floats, made.lse_offset = forward, 0, 0
        made.new_space = partial(torch.empty, dtype=torch.float32, device=given.q.device)
        if params.append_rows(call, cache):
            made.append = _append_plan(now, old.append if old else None, given, call, cache)
        if cache.rotary_dim:
            made.new_q = partial(torch.empty_like, memory_format=torch.contiguous_format)
        if cache.seqlen_new:
            made.written = torch.autograd.graph.increment_version
        if num_splits > 1 and forward is not None:
            rows, head_dim_v = params.partial_rows(call), call.facts["head_dim_v"]
            made.lse_offset = 4 * num_splits * rows * head_dim_v
            made.floats = num_splits * rows * (head_dim_v + 1)
            made.combine = _combine_plan(now, old.combine if old else None, given, call, num_splits)
        made.plans = tuple(plan for plan in (made.append, forward, made.combine) if plan is not None)
        return made

    def run(self, q: Any, k: Any, v: Any, main: tuple[int, int, int, int, int], addresses: list[int]) -> None:
        """main, addresses: of launch.MAIN_SLOTS and of the optional tensors, 0 where there is none."""
        qp, kp, vp, op, lp = main
        if self.append is not None:
            rotated = None if self.new_q is None else self.new_q(q)
            into = 0 if rotated is None else rotated.data_ptr()
            k_new, v_new, cos, sin = addresses[len(PAGED) :]
            self.append.pack(k_new, v_new, kp, vp, qp if into else 0, into, cos, sin, addresses[SEQUSED_K],
                             addresses[PAGE_TABLE], *addresses[DESCALES])  # fmt: skip
            if self.written is not None:
                self.written(k)
                self.written(v)
            qp = into or qp
        if self.combine is not None:
            space = self.new_space(self.floats)
            start: int = space.data_ptr()
            self.combine.pack(start, start + self.lse_offset, op, lp)
            op, lp = start, start + self.lse_offset
        if self.forward is not None:
            self.forward.pack(qp, kp, vp, op, lp)
            self.forward.pack_optional(*addresses[: len(PAGED)])
        if self.plans:
            launch.launch_all(self.plans)


def _append_plan(now: Session, old: launch.Plan | None, given: Arguments, call: Call, cache: Cached) -> launch.Plan:
    tensors = {"k": given.k, "v": given.v, "q": given.q} | {name: given.tensors[name] for name in NEW}
    steps = {name: params.steps(tensor.shape, tensor.stride()) for name, tensor in tensors.items()}
    values = params.append(call, cache, steps | {"q_out": params.rotated_steps(call)})
    facts = {name: call.facts[name] for name in ("dtype", "kv_dtype", "head_dim", "head_dim_v")}
    facts["rows"] = params.append_rows(call, cache)
    if old is not None:
        old.rewrite(values, facts)
        return old
    device = given.q.get_device()
    return planning.make(now, "kv_append", facts, device,
                         lambda kernel, _: launch.Plan(kernel, values, facts, 1, device, now.backend))  # fmt: skip


def _combine_plan(now: Session, old: launch.Plan | None, given: Arguments, call: Call, num_splits: int) -> launch.Plan:
    facts, rows, seqlen = call.facts, params.partial_rows(call), call.seqlen_q
    batch, heads, head_dim_v = 1 if facts["varlen"] else facts["batch"], facts["heads_q"], facts["head_dim_v"]
    lse = heads * seqlen, 1, seqlen  # contiguous along seqlen
    values = params.combine((num_splits, batch, seqlen, heads, head_dim_v), (rows * head_dim_v, rows), lse,
                            params.all_steps(given)["o"], lse)  # fmt: skip
    return combine_plan(now, old, facts["dtype"], head_dim_v, rows, values, given.q.get_device())
