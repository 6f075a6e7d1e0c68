"""One kernel's launch: `Maker` finds the kernel, `Launch.serve` fills its parameters.

`Launch.fire` is cuLaunchKernel with its grid bound; `plan._fire` and `attention._run_dense` call it.
"""

import ctypes
import struct
from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from registry import ops
from registry.contract import PARAM_FORMATS, Abi
from runtime import stages
from runtime.call.tensors import Numbers
from runtime.errors import ArgumentError, IntegrityError
from runtime.load.kernel import Kernel
from runtime.load.session import Session

if TYPE_CHECKING:
    from registry.contract import DispatchRow

MAX_BLOCKS = 2**31 - 1  # of grid.x
MAX_ROWS = 2**31 - 32  # of an op whose grid counts rows: a block's rows behind the last are counted in 32 bits too
MAIN_SLOTS = 5  # q, k, v, o and lse lead the ABI of `fwd`: all that a plain dense call writes
LENGTH_FACTS = frozenset(("seqlen_q", "seqlen_k", "total_q", "total_k", "packed_rows", "rows"))  # lengths decide them


class Loaded(NamedTuple):
    """A kernel for a call. packs: what the dispatch row says of query heads. resident: multiprocessors, and blocks that
    each holds at once; zeros for an op whose blocks share nothing."""

    kernel: Kernel
    packs: bool
    resident: tuple[int, int]


class Settled(NamedTuple):
    """What a launch takes beside addresses. pack: query heads that share a tile. splits: blocks that share what one
    would compute."""

    numbers: Numbers
    pack: int = 1
    splits: int = 1


class ParameterBuffer(NamedTuple):
    """How an op's parameters lie in a buffer. form: of those behind the slots. sources: their names among Numbers."""

    slots: struct.Struct
    form: str
    sources: tuple[str, ...]


class Launch:
    """All that a launch needs but its addresses. Belongs to one plan, and so to one thread.

    pick: addresses by name -> those of the slots, which write_addresses writes; write_dense_addresses writes the first
    MAIN_SLOTS alone. fire(stream, params, 0): launches on the current device and returns (status,). is_first: the
    kernel has not been launched in this process.
    """

    __slots__ = ("buffer", "check", "cu_launch_kernel", "current_device", "device", "fire", "guard", "is_first",
                 "layout", "loaded", "names", "params", "pick", "pointers", "raw_stream", "success", "write_addresses",
                 "write_dense_addresses")  # fmt: skip
    fire: Callable[[int, int, int], tuple[Any]]

    def __init__(self, loaded: Loaded, device: int, backend: Any, is_first: bool):
        driver, abi = backend.driver, loaded.kernel.abi
        self.loaded, self.is_first = loaded, is_first
        self.layout = layout(abi, loaded.kernel.artifact.variant)
        self.buffer = buffer = ctypes.create_string_buffer(abi.nbytes)
        at = ctypes.addressof(buffer)
        self.pointers = (ctypes.c_void_p * len(abi.layout))(*[at + offset for offset, _ in abi.layout])
        self.params = ctypes.addressof(self.pointers)
        self.write_addresses: Callable[..., None] = partial(self.layout.slots.pack_into, buffer, 0)
        self.write_dense_addresses: Callable[..., None] = partial(struct.Struct(f"<{MAIN_SLOTS}Q").pack_into, buffer, 0)
        self.cu_launch_kernel = driver.launch
        self.success, self.check = driver.success, driver.check
        self.device, self.guard = device, backend.guard
        self.raw_stream, self.current_device = backend.raw_stream, backend.current_device
        self.names: tuple[str, ...] = tuple([tensor.public for tensor in ops.get(abi.op).tensors])
        self.pick: Callable[[Mapping[str, int]], tuple[int, ...]] = itemgetter(*self.names)

    @property
    def kernel(self) -> Kernel:
        return self.loaded.kernel

    def rename(self, names: Mapping[str, str]) -> None:
        """Take addresses from elsewhere: {tensor of the op: name among the addresses}."""
        tensors = ops.get(self.kernel.abi.op).tensors
        self.names = tuple(names.get(tensor.name, tensor.public) for tensor in tensors)
        self.pick = itemgetter(*self.names)

    def serve(self, facts: Mapping[str, Any], settled: Settled) -> None:
        """Launch for calls with these facts and numbers from now on."""
        kernel, artifact = self.loaded.kernel, self.loaded.kernel.artifact
        values = [settled.numbers[name] for name in self.layout.sources]
        blocks = artifact.grid.blocks(facts, settled.pack) * settled.splits
        if blocks > MAX_BLOCKS:
            message = f"the call needs {blocks} blocks of {artifact.variant}, a launch may have {MAX_BLOCKS}; split it"
            raise ArgumentError("q", message, reason="too_large")
        if facts.get("rows", 0) > MAX_ROWS:
            message = f"the call has {facts['rows']} rows for {artifact.variant}, at most {MAX_ROWS} may be; split it"
            raise ArgumentError("q", message, reason="too_large")
        struct.pack_into(self.layout.form, self.buffer, self.layout.slots.size, *values)
        self.fire = partial(self.cu_launch_kernel, kernel.function, blocks, 1, 1, artifact.threads, 1, 1, kernel.smem)


class Maker(NamedTuple):
    """Makes a plan's launches, and changes those that it has.

    known: every launch that was made, by variant and whether it packs heads. rows: by op, what serves calls that
    differ from the plan's in lengths alone, with the conditions that lengths decide.
    """

    session: Session
    device: int
    known: dict[tuple[str, bool], Launch]
    rows: "dict[str, list[DispatchRow]]"

    def prepared(
        self,
        op: str,
        facts: Mapping[str, Any],
        settle: Callable[[Loaded], Settled],
        names: Mapping[str, str] | None = None,
    ) -> Launch:
        """The launch of the kernel that serves these facts, ready for them.

        settle: what the launch takes, once the kernel is known. names: {tensor of the op: name among the call's
        addresses}, where it is not the public one; '' passes a null pointer.
        """
        is_change = any(launch.kernel.abi.op == op for launch in self.known.values())
        launch = self._known(op, facts) if is_change else None
        if launch is None:
            loaded, is_first = self._load(op, facts)
            start = perf_counter()
            settled = settle(loaded)
            variant = loaded.kernel.artifact.variant
            launch = self.known[variant, loaded.packs] = Launch(loaded, self.device, self.session.backend, is_first)
            launch.serve(facts, settled)
            if is_first:
                stages.record(("plan", variant, (perf_counter() - start) * 1e3))
        else:
            launch.serve(facts, settle(launch.loaded))
        if names is not None:
            launch.rename(names)
        return launch

    def _known(self, op: str, facts: Mapping[str, Any]) -> Launch | None:
        from runtime.load import select  # here: a first call changes no plan

        if op not in self.rows:
            index = self.session.index_for_device(self.session.backend.capability(self.device))
            fixed = {name: value for name, value in facts.items() if name not in LENGTH_FACTS}
            self.rows[op] = select.open_rows(index.rows(op, fixed), fixed)
        row = select.first(self.rows[op], facts)
        return self.known.get((row.variant, row.pack)) if row else None

    def _load(self, op: str, facts: Mapping[str, Any]) -> tuple[Loaded, bool]:
        """Loads the kernel if need be: then its first launch goes to the ledger."""
        backend, shared_by = self.session.backend, ops.get(op).shared_by
        capturing = backend.is_capturing()  # before the guard too: another device's capture forbids a load as well
        with backend.guard(self.device):
            kernel, packs, fresh = self.session.kernel(
                op, dict(facts), self.device, capturing or backend.is_capturing()
            )
            resident = (0, 0)
            with backend.driver.context(self.device):  # this thread may have none, though another loaded the kernel
                if shared_by:
                    threads = kernel.artifact.threads
                    resident = backend.driver.resident_blocks(self.device, kernel.function, threads, kernel.smem)
        return Loaded(kernel, packs, resident), fresh


_layouts: dict[str, ParameterBuffer] = {}  # by the ABI's digest


def layout(abi: Abi, variant: str) -> ParameterBuffer:
    """`_layout`, once for each ABI."""
    if abi.digest not in _layouts:
        _layouts[abi.digest] = _layout(abi, variant)
    return _layouts[abi.digest]


def _layout(abi: Abi, variant: str) -> ParameterBuffer:
    """How this client fills the parameters of an ABI, which may come from another release than its descriptions.

    Raises IntegrityError ('abi') for an ABI with a parameter that this client does not know, or without one that it
    would fill: nothing that the caller asked for is dropped silently.
    """
    op = ops.get(abi.op)
    named = f"ABI {abi.op} v{abi.version} of {variant}"
    slots, rest = abi.params[: len(op.slots)], abi.params[len(op.slots) :]
    if tuple((p.name, p.type) for p in slots) != tuple((name, "ptr") for name in op.slots):
        raise IntegrityError(f"{named} does not begin with {', '.join(op.slots)}; update the client", reason="abi")
    types = {p.name: p.type for p in op.abi.params[len(op.slots) :]}
    unknown = [p.name for p in rest if types.get(p.name) != p.type]
    if unknown:
        raise IntegrityError(f"{named} has {', '.join(unknown)}, unknown here; update the client", reason="abi")
    lacking = types.keys() - {p.name for p in rest}
    if lacking:
        raise IntegrityError(f"{named} lacks {', '.join(sorted(lacking))}; rebuild the registry", reason="abi")
    sources = {scalar.name: scalar.origin for scalar in op.scalars}
    # '@' aligns as C does, which is Abi.layout: behind slots of 8 bytes the first offset is aligned for anything.
    form = "@" + "".join(PARAM_FORMATS[p.type] for p in rest)
    return ParameterBuffer(struct.Struct(f"<{len(slots)}Q"), form, tuple(sources.get(p.name, p.name) for p in rest))
