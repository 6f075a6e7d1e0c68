"""A kept plan: all that calls with one key share, and the path from their tensors to their launches.

`execute` is that path for every call; `runtime.api.attention` has it once more, inlined, for the plain dense one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from runtime import stages
from runtime.call import tensors
from runtime.call.launch import Launch, Maker
from runtime.call.request import Call, Request
from runtime.call.tensors import Checked
from runtime.load import plans, session

# The arrays whose rows are the tokens of all entries, where this tensor is given.
PACKED = {"cu_seqlens_q": ("q", "out"), "cu_seqlens_k": ("k", "v")}
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


class Outputs(NamedTuple):
    """new_out: makes the output from the call's first tensor. new_lse: makes its LSE. zero_out, zero_lse: the same,
    with zeros where rows may not be written. gradients: of a backward, (argument, its gradient's name among the
    addresses, what makes that of the argument)."""

    new_out: Callable[[Any], Any]
    new_lse: Callable[[], Any]
    zero_out: Callable[[Any], Any]
    zero_lse: Callable[[], Any]
    gradients: tuple[tuple[str, str, Callable[[Any], Any]], ...] = ()


class Role(Protocol):
    """What kinds of calls differ in: `runtime.call.forward`, `.combine` and `.backward`."""

    def fixed(self, request: Request) -> Any:
        """The part of a plan family's key that is no tensor: a plan serves only calls in which it is the same. None
        where its hash is not of its value: such a call's plan is not kept."""

    def check(self, request: Request, checked: Checked) -> Call:
        """What the descriptions do not ask: rules across arguments, and arguments that are no tensors."""

    def outputs(self, call: Call, request: Request, torch: Any) -> Outputs: ...
    def chain(self, call: Call, request: Request, maker: Maker) -> Chain: ...


class Resizable(Role, Protocol):
    """A role whose calls' keys leave lengths open."""

    def resized(self, call: Call, request: Request, sizes: dict[str, int]) -> Call:
        """A checked call, where only rows of packed arrays and hints have changed."""


class Plan:
    """Belongs to one thread. `prepare` makes one, or changes one of the same family."""

    __slots__ = ("alignment_masks", "call", "chain", "empty", "family", "first", "float32", "forward_ad",
                 "grad_enabled", "gradients", "is_neg", "key", "maker", "mark_written", "nbytes", "new_lse", "new_out",
                 "new_space", "null_addresses", "offsets", "out_span", "recorded", "single", "spans", "uint8",
                 "written_names", "zero_lse", "zero_out", "zeros_from")  # fmt: skip
    key: Any
    family: Any
    call: Call
    maker: Maker
    chain: Chain
    first: str  # of the given tensors
    written_names: tuple[str, ...]  # the given tensors that the launches write, `out` apart
    single: Launch | None  # the only launch, which needs no workspace
    null_addresses: dict[str, int]  # address 0 for every slot of every launch
    alignment_masks: tuple[tuple[str, int], ...]  # bits of the given tensors' addresses that must be 0
    offsets: dict[str, int]  # of the workspaces
    nbytes: int  # of all workspaces
    zeros_from: int  # offset from which on they begin as zeros
    spans: tuple[tuple[str, int], ...]  # with out: bytes from the first to past the last element of the others
    out_span: int
    grad_enabled: Callable[[], bool]
    forward_ad: Any  # torch.autograd.forward_ad
    mark_written: Callable[[Any], None]  # tells autograd that a tensor's values change
    is_neg: Callable[[Any], bool]  # whether a view is still to be negated
    new_out: Callable[[Any], Any]
    new_lse: Callable[[], Any]
    zero_out: Callable[[Any], Any]
    zero_lse: Callable[[], Any]
    gradients: tuple[tuple[str, str, Callable[[Any], Any]], ...]
    recorded: "dict[tuple[bool, bool], Callable[[Plan, Mapping[str, Any]], Any]]"  # see runtime.call.run
    new_space: Callable[[], Any]
    empty: Callable[..., Any]  # torch's
    uint8: Any  # torch's
    float32: Any


# -- making a plan ----------------------------------------------------------------------------------------------------


def prepare(role: Role, request: Request, key: Any, family: Any = None) -> Plan:
    """Check everything, find and load the kernels, keep the plan. key: None for a call that cannot be kept.
    family: the calls between which a plan may change; None derives it from the tensors.

    Raises whatever flash_attn raises.
    """
    kept = plans.plans  # before the session: a configure() in between must not get a plan of the old one
    now = session.ready()
    torch, given = now.backend.torch, request.tensors
    checked = tensors.check(request.op, given, torch, now.backend.device_type)
    of_tensors = tensors.family(request.op, given)
    masks = tensors.alignment_masks(request.op, given)
    call = role.check(request, checked)
    outputs = role.outputs(call, request, torch)
    fixed = None if key is None else role.fixed(request)
    family = family or (request.op, fixed, of_tensors)
    plan = _to_change(kept, family) if family in kept.families else None
    maker = Maker(now, next(iter(given.values())).get_device(), {}, {}) if plan is None else plan.maker
    chain = role.chain(call, request, maker)
    if plan is None:
        plan = _new(torch, maker)
    _aim(plan, call, chain, outputs, given)
    plan.alignment_masks = masks
    if fixed is not None:
        plan.key, plan.family = key, family
        _keep(kept, plan)
    return plan


def prepare_packed(role: Resizable, request: Request, key: Any) -> Plan | None:
    """`prepare` for packed arrays, or None where it does not apply.

    Totals are new in every batch. A plan that is kept for other rows and hints, and differs in nothing else, is changed
    for this call: only what rows and hints decide is checked and counted again.
    """
    given = request.tensors
    packed = {name for side, names in PACKED.items() if side in given for name in names}
    if not packed or key is None or role.fixed(request) is None:
        return None
    rows = [given[name].shape[0] if given[name].dim() else 0 for name in given if name in packed]
    if min(rows) < 2 or any(tensor.is_neg() for tensor in given.values()):  # with one row torch leaves strides open
        return None
    kept = plans.plans
    layouts = [(name, t.shape[name in packed :], t.stride(), t.dtype, t.get_device()) for name, t in given.items()]
    family = ("packed", request.op, role.fixed(request), given["q"].is_cuda, *layouts)
    plan = _to_change(kept, family)
    if plan is None:
        return prepare(role, request, key, family)
    sizes = plan.call.sizes | tensors.totals(request.op, given)
    if "out" in given:
        tensors.check_apart_within("out", given["out"])
    call = role.resized(plan.call, request, sizes)
    torch = plan.maker.session.backend.torch
    _aim(plan, call, role.chain(call, request, plan.maker), role.outputs(call, request, torch), given)
    plan.key, plan.family = key, family
    _keep(kept, plan)
    return plan


def _new(torch: Any, maker: Maker) -> Plan:
    plan = Plan()
    plan.maker = maker
    plan.grad_enabled, plan.forward_ad = torch.is_grad_enabled, torch.autograd.forward_ad
    plan.mark_written, plan.is_neg = torch.autograd.graph.increment_version, torch.Tensor.is_neg
    plan.empty, plan.uint8, plan.float32 = torch.empty, torch.uint8, torch.float32
    return plan


def _aim(plan: Plan, call: Call, chain: Chain, outputs: Outputs, given: Mapping[str, Any]) -> None:
    """Make `plan` serve this call."""
    plan.first, first = next(iter(given.items()))
    plan.call, plan.chain, plan.written_names = call, chain, chain.written
    plan.single = chain.launches[0] if len(chain.launches) == 1 and not chain.workspaces else None
    plan.null_addresses = {name: 0 for one in chain.launches for name in one.names}
    _place(plan, chain.workspaces)
    plan.new_out, plan.new_lse, plan.zero_out, plan.zero_lse, plan.gradients = outputs
    plan.recorded = {}
    if plan.nbytes:
        plan.new_space = partial(plan.empty, plan.nbytes, dtype=plan.uint8, device=first.device)
    if "out" in given:
        from runtime.call import memory  # here: only calls with out need it

        plan.spans = tuple([(name, memory.span(tensor)) for name, tensor in given.items() if name != "out"])
        plan.out_span = memory.span(given["out"])


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


def _keep(kept: plans.Plans, plan: Plan) -> None:
    """Under the plan's key and family."""
    if len(kept.by_call) >= plans.MAX_PLANS:
        _forget(kept, next(iter(kept.by_call.values())))
    kept.families.setdefault(plan.family, []).append(plan)
    kept.by_call[plan.key] = plan


def _forget(kept: plans.Plans, plan: Plan) -> None:
    """An interrupt may come between any two lines here and in `_keep`: what is already gone is no error."""
    kept.by_call.pop(plan.key, None)
    rest = [other for other in kept.families.get(plan.family, ()) if other is not plan]
    if rest:
        kept.families[plan.family] = rest
    else:
        kept.families.pop(plan.family, None)


def _to_change(kept: plans.Plans, family: Any) -> Plan | None:
    """A plan for a call with other lengths, no longer kept: of a family that has as many as it may, or where another
    family would have to give one up."""
    found: list[Plan] = kept.families.get(family, [])
    if not found or (len(found) < plans.MAX_SIZES and len(kept.by_call) < plans.MAX_PLANS):
        return None
    plan = found[0]
    _forget(kept, plan)
    return plan


# -- running it -------------------------------------------------------------------------------------------------------


def execute(plan: Plan, given: Mapping[str, Any], return_lse: Any, zeros: Any = False) -> Any:
    """Check what the key leaves open, allocate, launch. (out, lse), lse None if it is not wanted.

    zeros: rows of new outputs that no sequence owns are zeros.
    """
    if plan.forward_ad._current_level >= 0:
        tensors.check_tangents(plan.forward_ad, given.items())
    found = addresses(plan, given)
    if "out" in given:
        out = given["out"]
        _check_apart(plan, found, given)
        plan.mark_written(out)
    else:
        out = (plan.zero_out if zeros else plan.new_out)(given[plan.first])
        found["out"] = _address_of("out", out)
    lse = None
    if return_lse:
        lse = plan.zero_lse() if zeros else plan.new_lse()
        if lse is not None:  # an op may have none
            found["lse"] = _address_of("lse", lse)
    for name in plan.written_names:
        plan.mark_written(given[name])
    space = allocate(plan, found) if plan.nbytes else None
    fire(plan, found)
    del space  # torch's allocator hands it on in the order of the stream
    return out, lse


def addresses(plan: Plan, given: Mapping[str, Any]) -> dict[str, int]:
    """By name, 0 for what is not given, after the checks that a call's key leaves open."""
    found = plan.null_addresses.copy()
    try:
        for name, mask in plan.alignment_masks:
            address = found[name] = given[name].data_ptr()
            if address & mask or not address:
                tensors.check_address(name, given[name], address, mask + 1)
        if any(map(plan.is_neg, given.values())):
            tensors.check_positive(*given.items())
    except RuntimeError:  # of torch.func's wrappers
        tensors.check_storage(*given.items())
        raise
    return found


def _address_of(name: str, tensor: Any) -> int:
    """Of a tensor that was just made: under FakeTensorMode or torch.func it may have no memory (ArgumentError)."""
    try:
        address: int = tensor.data_ptr()
    except RuntimeError:  # of torch.func's wrappers
        address = 0
    if not address:
        tensors.check_storage((name, tensor))
    return address


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
    return space[start : start + one.nbytes].view(plan.float32)


def fire(plan: Plan, found: Mapping[str, int]) -> None:
    """Launch all with these addresses, in order, on the current stream of their one device."""
    launches = plan.chain.launches
    if not launches:
        return
    for one in launches:
        one.write_addresses(*one.pick(found))
    device = one.device
    if one.current_device() != device:
        with one.guard(device):
            _fire(launches, one.raw_stream(device))
    else:
        _fire(launches, one.raw_stream(device))


def _fire(launches: tuple[Launch, ...], stream: int) -> None:
    for one in launches:
        if one.is_first:
            start = perf_counter()
            (status,) = one.fire(stream, one.params, 0)
            one.is_first = False
            stages.record(("first launch", one.loaded.kernel.artifact.variant, (perf_counter() - start) * 1e3))
        else:
            (status,) = one.fire(stream, one.params, 0)
        if status is not one.success:
            one.check(status, "cuLaunchKernel")


def _check_apart(plan: Plan, found: Mapping[str, int], given: Mapping[str, Any]) -> None:
    """That `out` shares no memory with an input."""
    start = found["out"]
    for name, nbytes in plan.spans:
        if start < found[name] + nbytes and found[name] < start + plan.out_span:
            from runtime.call import memory

            memory.check_apart(given["out"], *((other, given[other]) for other, _ in plan.spans))
            return
