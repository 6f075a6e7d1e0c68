"""One kernel's launch: its parameter buffer, and from addresses to cuLaunchKernel."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

from registry import ops
from registry.contract import PARAM_FORMATS, Abi
from runtime import stages
from runtime.call.numbers import Numbers
from runtime.errors import ArgumentError, IntegrityError
from runtime.load.kernel import Kernel

MAX_BLOCKS = 2**31 - 1  # of grid.x
MAX_ROWS = 2**31 - 32  # of an op whose grid counts rows: a block's rows behind the last are counted in 32 bits too
MAIN_SLOTS = 5  # q, k, v, o and lse lead the ABI of `fwd`: all that a plain dense call writes


class Layout(NamedTuple):
    """How an op's parameters lie in a buffer. form: of those behind the slots. sources: their names among Numbers."""

    slots: struct.Struct
    form: str
    sources: tuple[str, ...]


class Launch:
    """All that a launch needs but its addresses. Belongs to one plan, and so to one thread.

    packs_heads: what the dispatch row says of query heads. resident: multiprocessors, and blocks that each holds at
    once; zeros for an op whose blocks share nothing. pick: addresses by name -> those of the slots, which
    write_addresses writes; write_dense_addresses writes the first MAIN_SLOTS alone. fire(stream, params, 0): launches
    on the current device and returns (status,).
    """

    __slots__ = ("buffer", "check", "current_device", "device", "fire", "guard", "kernel", "layout", "names",
                 "packs_heads", "params", "pick", "pointers", "raw_stream", "resident", "start", "success",
                 "write_addresses", "write_dense_addresses")  # fmt: skip

    def __init__(self, kernel: Kernel, packs: bool, resident: tuple[int, int], device: int, backend: Any):
        driver = backend.driver
        self.kernel, self.packs_heads, self.resident = kernel, packs, resident
        self.layout = layout(kernel.abi, kernel.artifact.variant)
        self.buffer = buffer = ctypes.create_string_buffer(kernel.abi.nbytes)
        at = ctypes.addressof(buffer)
        places = kernel.abi.layout
        self.pointers = (ctypes.c_void_p * len(places))(*(at + offset for offset, _ in places))
        self.params = ctypes.addressof(self.pointers)
        self.write_addresses: Callable[..., None] = partial(self.layout.slots.pack_into, buffer, 0)
        self.write_dense_addresses: Callable[..., None] = partial(struct.Struct(f"<{MAIN_SLOTS}Q").pack_into, buffer, 0)
        self.start = driver.launch
        self.success, self.check = driver.success, driver.check
        self.device, self.guard = device, backend.guard
        self.raw_stream, self.current_device = backend.raw_stream, backend.current_device
        self.names: tuple[str, ...] = tuple(tensor.public for tensor in ops.get(kernel.abi.op).tensors)
        self.pick: Callable[[Mapping[str, int]], tuple[int, ...]] = itemgetter(*self.names)

    def rename(self, names: Mapping[str, str]) -> None:
        """Take addresses from elsewhere: {tensor of the op: name among the addresses}."""
        tensors = ops.get(self.kernel.abi.op).tensors
        self.names = tuple(names.get(tensor.name, tensor.public) for tensor in tensors)
        self.pick = itemgetter(*self.names)

    def serve(self, facts: Mapping[str, Any], numbers: Numbers, pack: int = 1, shared: int = 1) -> None:
        """Launch for calls with these facts and numbers from now on. pack: query heads that share a tile. shared:
        blocks that share what one would compute."""
        artifact = self.kernel.artifact
        blocks = artifact.grid.blocks(facts, pack) * shared
        if blocks > MAX_BLOCKS:
            message = f"the call needs {blocks} blocks of {artifact.variant}, a launch may have {MAX_BLOCKS}; split it"
            raise ArgumentError("q", message, reason="too_large")
        if facts.get("rows", 0) > MAX_ROWS:
            message = f"the call has {facts['rows']} rows for {artifact.variant}, at most {MAX_ROWS} may be; split it"
            raise ArgumentError("q", message, reason="too_large")
        self.fire: Callable[[int, int, int], tuple[Any]] = partial(
            self.start, self.kernel.function, blocks, 1, 1, artifact.threads, 1, 1, self.kernel.smem
        )
        form, sources = self.layout.form, self.layout.sources
        struct.pack_into(form, self.buffer, self.layout.slots.size, *[numbers[name] for name in sources])

    def time_first(self) -> None:
        """Record how long the next launch takes: it may be the kernel's first in this process."""
        start, variant = self.start, self.kernel.artifact.variant

        def first(*arguments: Any) -> tuple[Any]:
            self.start = start
            self.fire = partial(start, *self.fire.args)  # type: ignore[attr-defined]
            with stages.stage("first launch", variant):
                status: tuple[Any] = start(*arguments)
                return status

        self.start = first


@lru_cache(maxsize=256)
def layout(abi: Abi, variant: str) -> Layout:
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
    return Layout(struct.Struct(f"<{len(slots)}Q"), form, tuple(sources.get(p.name, p.name) for p in rest))
