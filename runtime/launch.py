"""Plans: what one thread keeps for calls that look alike, and the launch itself."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from registry.contract import PARAM_FORMATS, Artifact
from runtime.arguments import OPTIONAL
from runtime.cached import PAGED
from runtime.errors import ArgumentError, IntegrityError
from runtime.load import Kernel

MAX_PLANS = 1024  # a thread keeps; the oldest goes first
MAX_BLOCKS = 2**31 - 1  # of grid.x
# As kernels/abi.py has them:
MAX_ROWS = 2**31 - 32  # of `fwd_combine` and `kv_append`
MAX_PACKED_ROWS = 2**31 - 2**10  # seqlen_q · pack of the forward

# The parameters that change with every call. They lead the ABI, so that one pack_into of all addresses suffices, or two
# where there are optional tensors.
MAIN_SLOTS = ("q", "k", "v", "o", "lse")
CALL_SLOTS = MAIN_SLOTS + OPTIONAL
# Nothing gives leftpad_k yet: in `fwd` it has the place of OPTIONAL's page_table, which is null there, in `fwd_paged` 8
# bytes that nobody writes.
FWD_SLOTS = tuple("leftpad_k" if name == "page_table" else name for name in OPTIONAL)
PAGED_SLOTS = (*PAGED[:3], "leftpad_k", *PAGED[3:])
SLOTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # op -> (written always, where a call has any of them)
    "fwd": (MAIN_SLOTS, FWD_SLOTS),
    "fwd_paged": (MAIN_SLOTS, PAGED_SLOTS),
    "fwd_combine": (("o_partial", "lse_partial", "o", "lse"), ()),
    "kv_append": (("k_new", "v_new", "k", "v", "q", "q_out", "rotary_cos", "rotary_sin", "seqused_k", "page_table",
                   "k_descale", "v_descale"), ()),
    "bwd_preprocess": (("o", "dout", "lse", "dlse", "lse_log2", "delta", "dq_accum", "semaphores", "cu_seqlens_q",
                        "seqused_q"), ()),
    "bwd": (("q", "k", "v", "dout", "lse_log2", "delta", "dq_accum", "dk", "dv", "dk_partial", "dv_partial",
             "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "dalibi", "semaphores"), ()),
    "bwd_postprocess": (("dq_accum", "dq", "cu_seqlens_q", "seqused_q"), ()),
}  # fmt: skip
Values = Mapping[str, tuple[str, int | float]]  # name -> (type, value)

# For benchmarks: artifact -> bytes to add to the dynamic shared memory, so that an H200 SM holds as many blocks as an
# SM120 SM would. Set it before the first call; configure() forgets the kernels that were loaded before.
SMEM_PADDING: Callable[[Artifact], int] | None = None


class Plans(threading.local):
    """One thread's plans by call key. A shared parameter buffer would race: the bindings drop the GIL in a launch."""

    def __init__(self) -> None:
        self.by_call: dict[Any, Any] = {}

    def keep(self, key: Any, plan: Any) -> None:
        if len(self.by_call) >= MAX_PLANS:
            del self.by_call[next(iter(self.by_call))]
        self.by_call[key] = plan


plans = Plans()


def drop_plans() -> None:
    """Forget every thread's plans; calls in flight finish with theirs."""
    global plans
    plans = Plans()


class Plan:
    """All that a launch needs but its addresses. Belongs to one thread.

    pack, pack_optional: write the addresses of SLOTS' two groups (0: none). fire(stream, params, 0): launches on
    the current device and returns (status,). values: every other parameter of the client's, by name.
    tile_heads: query heads that share a tile. splits: blocks of the grid that share a tile's work.
    slots: write the parameters that `resize` changes, by name. resident: multiprocessors, and blocks that each
    holds at once; zeros if nobody has asked.
    """

    __slots__ = ("buffer", "check", "current_device", "device", "fire", "guard", "kernel", "launch", "pack",
                 "pack_optional", "params", "pointers", "raw_stream", "resident", "slots", "success",
                 "tile_heads")  # fmt: skip

    def __init__(self, kernel: Kernel, values: Values, facts: Mapping[str, Any], tile_heads: int, device: int,
                 backend: Any, splits: int = 1):  # fmt: skip
        driver = backend.driver
        self.kernel, self.tile_heads, self.launch = kernel, tile_heads, driver.launch
        self.resident = (0, 0)
        self._aim(facts, splits)
        self.buffer = buffer = parameters(kernel, values)
        start = ctypes.addressof(buffer)
        places = kernel.abi.layout
        self.pointers = (ctypes.c_void_p * len(places))(*(start + offset for offset, _ in places))
        self.params = ctypes.addressof(self.pointers)
        main, optional = (struct.Struct("<" + "Q" * len(names)) for names in SLOTS[kernel.abi.op])
        if kernel.abi.op == "fwd_paged":
            optional = struct.Struct("<3Q8x5Q")
        self.pack: Callable[..., None] = partial(main.pack_into, buffer, 0)
        self.pack_optional: Callable[..., None] = partial(optional.pack_into, buffer, main.size)
        self.slots: dict[str, Callable[[int], None]] = {
            p.name: partial(struct.Struct(PARAM_FORMATS[p.type]).pack_into, buffer, offset)
            for p, (offset, _) in zip(kernel.abi.params, places, strict=True)
            if p.name in ("lse_stride_h", "seqlen_q", "seqlen_k")
        }
        self.success, self.check = driver.success, driver.check
        self.device, self.guard = device, backend.guard
        self.raw_stream, self.current_device = backend.raw_stream, backend.current_device

    def resize(self, facts: Mapping[str, Any], seqlen_q: int, seqlen_k: int) -> None:
        """Serve calls whose packed arrays have other numbers of tokens; a dense array's length is still the same."""
        self._aim(facts)
        self.slots["lse_stride_h"](seqlen_q)
        self.slots["seqlen_q"](seqlen_q)
        self.slots["seqlen_k"](seqlen_k)

    def rewrite(self, values: Values, facts: Mapping[str, Any], splits: int = 1) -> None:
        """Serve calls with other values of the parameters than `resize` knows, on the same kernel."""
        self._aim(facts, splits)
        for p, (offset, _) in zip(self.kernel.abi.params, self.kernel.abi.layout, strict=True):
            if p.name in values:
                struct.pack_into(PARAM_FORMATS[p.type], self.buffer, offset, values[p.name][1])

    def _aim(self, facts: Mapping[str, Any], splits: int = 1) -> None:
        artifact = self.kernel.artifact
        blocks = artifact.grid.blocks(facts, self.tile_heads) * splits
        if blocks > MAX_BLOCKS:
            message = f"the call needs {blocks} blocks of {artifact.variant}, a launch may have {MAX_BLOCKS}; split it"
            raise ArgumentError("q", message, reason="too_large")
        if facts.get("rows", 0) > MAX_ROWS:
            message = f"the call has {facts['rows']} rows for {artifact.variant}, at most {MAX_ROWS} may be; split it"
            raise ArgumentError("q", message, reason="too_large")
        self.fire: Callable[[int, int, int], tuple[Any]] = partial(
            self.launch, self.kernel.function, blocks, 1, 1, artifact.threads, 1, 1, self.kernel.smem
        )


def launch_all(plans: Sequence[Plan]) -> None:
    """One after the other on the current stream of their one device."""
    plan = plans[0]
    device = plan.device
    if plan.current_device() != device:
        with plan.guard(device):
            _fire_all(plans, plan.raw_stream(device))
    else:
        _fire_all(plans, plan.raw_stream(device))


def _fire_all(plans: Sequence[Plan], stream: int) -> None:
    for plan in plans:
        (status,) = plan.fire(stream, plan.params, 0)
        if status is not plan.success:
            plan.check(status, "cuLaunchKernel")


def parameters(kernel: Kernel, values: Values) -> Any:
    """The parameter buffer with the call slots still 0. values: of all that the client knows.

    Raises IntegrityError ('abi') for an ABI with a parameter that this client does not know, or without one that this
    call needs: nothing that the caller asked for is dropped silently.
    """
    abi = kernel.abi
    named = f"ABI {abi.op} v{abi.version} of {kernel.artifact.variant}"
    slots = sum(SLOTS[abi.op], ())
    if tuple((p.name, p.type) for p in abi.params[: len(slots)]) != tuple((name, "ptr") for name in slots):
        raise IntegrityError(f"{named} does not begin with {', '.join(slots)}; update the client", reason="abi")
    rest = abi.params[len(slots) :]
    unknown = [p.name for p in rest if p.name not in values or values[p.name][0] != p.type]
    if unknown:
        raise IntegrityError(f"{named} has {', '.join(unknown)}, unknown here; update the client", reason="abi")
    lacking = values.keys() - {p.name for p in rest}
    if lacking:
        raise IntegrityError(f"{named} lacks {', '.join(sorted(lacking))}; rebuild the registry", reason="abi")
    buffer = ctypes.create_string_buffer(abi.nbytes)
    types = "@" + "".join(PARAM_FORMATS[p.type] for p in abi.params)  # '@' aligns as C does, which is Abi.layout
    struct.pack_into(types, buffer, 0, *(0 for _ in slots), *(values[p.name][1] for p in rest))
    return buffer
