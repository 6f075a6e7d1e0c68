"""A kept plan: all that calls with one key share, and the path from their tensors to their launches.

`execute` is that path for every call; `runtime.api.attention` has it once more, inlined, for the plain dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from registry import ops
from registry.contract import DispatchRow
from runtime import stages
from runtime.call import checks, memory, tensors
from runtime.call.launch import Launch
from runtime.call.numbers import LENGTH_FACTS, Numbers
from runtime.call.request import Call, Request
from runtime.load import plans, select, session
from runtime.load.session import Session

ALIGNED = 256  # bytes to whose multiples workspaces are rounded


class Workspace(NamedTuple):
    """Memory for the time of a call, from torch's allocator, all of it in one piece. name: among the addresses.

    zeros: it is zeroed before the launches. inside: (name, offset): it lies `offset` bytes into the workspace `name`
    and gets no memory of its own.
    """

    name: str
    nbytes: int
    zeros: bool = False
    inside: tuple[str, int] | None = None


class Chain(NamedTuple):
    """What a call launches, in order, the memory in between, and the given tensors that it writes, `out` apart."""

    launches: tuple[Launch, ...]
    workspaces: tuple[Workspace, ...] = ()
    written: tuple[str, ...] = ()


class Role(Protocol):
    """What kinds of calls differ in: `runtime.call.forward`, `.combine` and `.backward`."""

    def fixed(self, request: Request) -> Any:
        """The part of a plan family's key that is no tensor: a plan serves only calls in which it is the same. None
        where its hash is not of its value: such a call's plan is not kept."""

    def check(self, request: Request, torch: Any, device_type: str) -> Call: ...
    def chain(self, call: Call, request: Request, maker: Maker) -> Chain: ...
    def outputs(self, call: Call, request: Request, torch: Any) -> Outputs: ...


class Outputs(NamedTuple):
    """new_out: makes the output from the call's first tensor. new_lse: makes its LSE. zero_out, zero_lse: the same,
    with zeros where rows may not be written."""

    new_out: Callable[[Any], Any]
    new_lse: Callable[[], Any]
    zero_out: Callable[[Any], Any]
    zero_lse: Callable[[], Any]


class Plan:
    """Belongs to one thread. `prepare` makes one, or changes one of the same family."""

    __slots__ = ("absent", "alignment_masks", "call", "chain", "dispatch_rows", "family", "first", "floats",
                 "forward_ad", "grad_enabled", "key", "known", "mark_written", "nbytes", "new_lse", "new_out",
                 "new_space", "offsets", "out_span", "single", "spans", "written_names", "zero_lse", "zero_out",
                 "zeros_from")  # fmt: skip
    key: Any
    family: Any
    call: Call
    known: dict[tuple[str, bool], Launch]  # every launch that was made, by variant and whether it packs heads
    dispatch_rows: dict[
        str, list[DispatchRow]
    ]  # by op: what serves such calls, with the conditions that lengths decide
    chain: Chain
    first: str  # of the given tensors
    written_names: tuple[str, ...]  # the given tensors that the launches write, `out` apart
    single: Launch | None  # the only launch, which needs no workspace
    absent: dict[str, int]  # address 0 for every slot of every launch
    alignment_masks: tuple[tuple[str, int], ...]  # bits of the given tensors' addresses that must be 0
    offsets: dict[str, int]  # of the workspaces
    nbytes: int  # of all workspaces
    zeros_from: int  # offset from which on they begin as zeros
    spans: tuple[tuple[str, int], ...]  # with out: bytes from the first to past the last element of the others
    out_span: int
    grad_enabled: Callable[[], bool]
    forward_ad: Any  # torch.autograd.forward_ad
    mark_written: Callable[[Any], None]  # tells autograd that a tensor's values change
    new_out: Callable[[Any], Any]
    new_lse: Callable[[], Any]
    zero_out: Callable[[Any], Any]
    zero_lse: Callable[[], Any]
    new_space: Callable[[], Any]
    floats: Any  # torch.float32


class Maker(NamedTuple):
    """Makes a plan's launches, and changes those that it has."""

    now: Session
    plan: Plan
    device: int

    def prepared(
        self,
        op: str,
        facts: Mapping[str, Any],
        numbers: Callable[[Launch], tuple[Numbers, int, int]],
        names: Mapping[str, str] | None = None,
    ) -> Launch:
        """The launch of the kernel that serves these facts, ready for them.

        numbers: a function of the launch that returns (values of scalars and strides, query heads that share a tile,
        splits). names: {tensor of the op: name among the call's addresses}, where it is not the public one; '' passes
        a null pointer.
        """
        found = self._known(op, facts) or self._load(op, facts)
        found.serve(facts, *numbers(found))
        if names is not None:
            found.rename(names)
        return found

    def _known(self, op: str, facts: Mapping[str, Any]) -> Launch | None:
        if not self.plan.known:
            return None
        if op not in self.plan.dispatch_rows:
            index = self.now.index_for(self.now.backend.capability(self.device))
            fixed = {name: value for name, value in facts.items() if name not in LENGTH_FACTS}
            self.plan.dispatch_rows[op] = select.open_rows(index, op, fixed)
        row = select.first(self.plan.dispatch_rows[op], facts)
        return self.plan.known.get((row.variant, row.pack)) if row else None

    def _load(self, op: str, facts: Mapping[str, Any]) -> Launch:
        """Loads the kernel if need be. A kernel's first launch goes to the ledger."""
        backend, shared_by = self.now.backend, ops.get(op).shared_by
        capturing = backend.is_capturing()  # before the guard too: another device's capture forbids a load as well
        with backend.guard(self.device):
            kernel, packs, fresh = self.now.kernel(op, dict(facts), self.device, capturing or backend.is_capturing())
            start = perf_counter()
            resident = (0, 0)
            with backend.driver.context(self.device):  # this thread may have none, though another loaded the kernel
                if shared_by:
                    threads = kernel.artifact.threads
                    resident = backend.driver.resident_blocks(self.device, kernel.function, threads, kernel.smem)
        made = Launch(kernel, packs, resident, self.device, backend)
        self.plan.known[kernel.artifact.variant, packs] = made
        if fresh:
            stages.record("plan", kernel.artifact.variant, (perf_counter() - start) * 1e3)
            made.time_first()
        return made


def prepare(role: Role, request: Request, key: Any) -> Plan:
    """Check everything, find and load the kernels, keep the plan. key: None for a call that cannot be kept.

    Raises whatever flash_attn raises.
    """
    kept = plans.plans  # before the session: a configure() in between must not get a plan of the old one
    now = session.current()
    torch = now.backend.torch
    call = role.check(request, torch, now.backend.device_type)
    if torch.is_grad_enabled():
        checks.check_differentiable(ops.get(request.op), request.tensors.items())
    fixed = None if key is None else role.fixed(request)
    plan, family = None, None
    if fixed is not None:
        family = (request.op, fixed, tensors.family(request.op, request.tensors))
        plan = kept.to_change(family)
    if plan is None:
        plan = _new(torch)
    _aim(plan, role, call, request, now)
    if fixed is not None:
        plan.key, plan.family = key, family
        kept.keep(plan)
    return plan


def _new(torch: Any) -> Plan:
    plan = Plan()
    plan.known, plan.dispatch_rows = {}, {}
    plan.grad_enabled, plan.forward_ad = torch.is_grad_enabled, torch.autograd.forward_ad
    plan.mark_written = torch.autograd.graph.increment_version
    plan.floats = torch.float32
    return plan


def _aim(plan: Plan, role: Role, call: Call, request: Request, now: Session) -> None:
    """Make `plan` serve this call."""
    given = request.tensors
    first = next(iter(given.values()))
    plan.call = call
    plan.chain = chain = role.chain(call, request, Maker(now, plan, first.get_device()))
    plan.first, plan.written_names = next(iter(given)), chain.written
    plan.single = chain.launches[0] if len(chain.launches) == 1 and not chain.workspaces else None
    plan.absent = {name: 0 for one in chain.launches for name in one.names}
    plan.alignment_masks = tensors.alignment_masks(request.op, given)
    _place(plan, chain.workspaces)
    torch = now.backend.torch
    plan.new_space = partial(torch.empty, plan.nbytes, dtype=torch.uint8, device=first.device)
    if "out" in given:
        plan.spans = tuple((name, memory.span(tensor)) for name, tensor in given.items() if name != "out")
        plan.out_span = memory.span(given["out"])
    plan.new_out, plan.new_lse, plan.zero_out, plan.zero_lse = role.outputs(call, request, torch)


def _place(plan: Plan, workspaces: tuple[Workspace, ...]) -> None:
    """Where each lies in the one allocation: those that begin as zeros behind all others."""
    offsets: dict[str, int] = {}
    end = 0
    for zeros in (False, True):
        plan.zeros_from = end
        for one in workspaces:
            if one.zeros is zeros and one.inside is None:
                offsets[one.name], end = end, end + -(-one.nbytes // ALIGNED) * ALIGNED
    for one in workspaces:
        if one.inside is not None:
            offsets[one.name] = offsets[one.inside[0]] + one.inside[1]
    plan.nbytes, plan.offsets = end, offsets


def execute(plan: Plan, given: Mapping[str, Any], return_lse: Any, zeros: Any = False) -> Any:
    """Check what the key leaves open, allocate, launch. (out, lse), lse None if it is not wanted.

    zeros: rows of new outputs that no sequence owns are zeros.
    """
    if plan.forward_ad._current_level >= 0:
        checks.check_tangents(plan.forward_ad, given.items())
    found = addresses(plan, given)
    if "out" in given:
        out = given["out"]
        _check_apart(plan, found, given)
        plan.mark_written(out)
    else:
        out = (plan.zero_out if zeros else plan.new_out)(given[plan.first])
        found["out"] = memory.address_of("out", out)
    lse = None
    if return_lse:
        lse = plan.zero_lse() if zeros else plan.new_lse()
        if lse is not None:  # an op may have none
            found["lse"] = memory.address_of("lse", lse)
    for name in plan.written_names:
        plan.mark_written(given[name])
    space = allocate(plan, found) if plan.nbytes else None
    fire(plan, found)
    del space  # torch's allocator hands it on in the order of the stream
    return out, lse


def addresses(plan: Plan, given: Mapping[str, Any]) -> dict[str, int]:
    """By name, 0 for what is not given, after the checks that a call's key leaves open."""
    found = plan.absent.copy()
    try:
        for name, mask in plan.alignment_masks:
            address = found[name] = given[name].data_ptr()
            if address & mask or not address:
                memory.check_address(name, given[name], address, mask + 1)
    except RuntimeError:  # of torch.func's wrappers
        memory.check_storage(*given.items())
        raise
    return found


def allocate(plan: Plan, found: dict[str, int]) -> Any:
    """The workspaces, in one tensor of bytes; their addresses are put among those that were found."""
    space = plan.new_space()
    if plan.zeros_from < plan.nbytes:
        space[plan.zeros_from :].zero_()
    start = space.data_ptr()
    for name, offset in plan.offsets.items():
        found[name] = start + offset
    return space


def floats(plan: Plan, space: Any, name: str) -> Any:
    """A workspace of fp32 in what `allocate` gave, flat."""
    one = next(one for one in plan.chain.workspaces if one.name == name)
    start = plan.offsets[name]
    return space[start : start + one.nbytes].view(plan.floats)


def fire(plan: Plan, found: Mapping[str, int]) -> None:
    """Launch all with these addresses, in order, on the current stream of their one device."""
    launches = plan.chain.launches
    if not launches:
        return
    for one in launches:
        one.write_addresses(*one.pick(found))
    first = launches[0]
    device = first.device
    if first.current_device() != device:
        with first.guard(device):
            _fire(launches, first.raw_stream(device))
    else:
        _fire(launches, first.raw_stream(device))


def _fire(launches: tuple[Launch, ...], stream: int) -> None:
    for one in launches:
        (status,) = one.fire(stream, one.params, 0)
        if status is not one.success:
            one.check(status, "cuLaunchKernel")


def _check_apart(plan: Plan, found: Mapping[str, int], given: Mapping[str, Any]) -> None:
    """That `out` shares no memory with an input."""
    start = found["out"]
    for name, nbytes in plan.spans:
        if start < found[name] + nbytes and found[name] < start + plan.out_span:
            memory.check_apart(given["out"], *((other, given[other]) for other, _ in plan.spans))
            return
