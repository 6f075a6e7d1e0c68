"""The device under test: one variant at a time, forced, behind the public API."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.derived import add_channel, one_variant_each, read_index
from registry.contract import Artifact, Condition, DispatchRow, Index, Variant

PACKING = ("fwd", "fwd_paged")  # ops whose rows can pack the heads of a group


class Dut(Protocol):
    """What the checks ask of a device: `runtime.flash_attn`, `flash_attn_varlen`, `flash_attn_with_kvcache` and
    `flash_attn_combine` or, in the self-test, stand-ins for them."""

    device: str
    artifacts: dict[str, Artifact]

    def force(self, key: str, pack: bool = False) -> None: ...
    def poison(self) -> None: ...
    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any: ...
    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any: ...
    def kvcache(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> Any: ...
    def combine(self, out_partial: torch.Tensor, lse_partial: torch.Tensor, **options: Any) -> Any: ...


class Gpu:
    """The GPU, through `runtime`. registry: a file with an index for the GPU; scratch: a private folder.

    device: where inputs are made; 'cpu' is for tests that put another backend under the runtime.
    """

    def __init__(self, registry: Path, scratch: Path, arch: str, device: str = "cuda"):
        import runtime

        self.device = device
        self._runtime, self._file = runtime, scratch / "one-variant-each.db"
        torch.backends.cuda.matmul.allow_tf32 = False  # the references are to be what they say
        self.artifacts = one_variant_each(registry, self._file, arch)
        add_packed_channels(self._file, arch, list(self.artifacts))

    def force(self, key: str, pack: bool = False) -> None:
        """From now on every call is served by the variant `key`, whatever the dispatch table says.

        pack: with the query heads of a key/value head in the same tiles, wherever there are several.
        """
        packs = pack and Variant.parse(key).op in PACKING
        self._runtime.configure(registry=self._file, channel=packed_channel(key) if packs else key)

    def poison(self) -> None:
        """Fill what the allocator holds free for the current stream with NaN; nothing while a graph is captured."""
        if self.device == "cuda" and not torch.cuda.is_current_stream_capturing():
            if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < RESERVE:
                reserve()
            fill_free_memory()

    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with self._poisoned(q, k, v, *options.values()):
            return self._runtime.flash_attn(q, k, v, **options)

    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with self._poisoned(q, k, v, *options.values()):
            return self._runtime.flash_attn_varlen(q, k, v, **options)

    def kvcache(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn_with_kvcache(q, k_cache, v_cache, **options)

    def combine(self, out_partial: torch.Tensor, lse_partial: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn_combine(out_partial, lse_partial, **options)

    def _poisoned(self, *given: Any) -> contextlib.AbstractContextManager[None]:
        """Gradients must not see `poisoned_allocations`: its switch asks for deterministic ones."""
        if torch.is_grad_enabled() and any(torch.is_tensor(x) and x.requires_grad for x in given):
            self.poison()
            return contextlib.nullcontext()
        return poisoned_allocations()


def packed_channel(key: str) -> str:
    return f"{key}-packed"


def add_packed_channels(registry: Path, arch: str, keys: list[str]) -> None:
    """Beside the channels of `one_variant_each`, one per variant that packs the heads of every group."""
    indexes = {key: read_index(registry, arch, key) for key in keys}
    file = sqlite3.connect(registry)
    try:
        for key, index in indexes.items():
            op = Variant.parse(key).op
            if op not in PACKING:
                continue
            rows = (DispatchRow(op, (Condition("group", ">=", 2),), key, pack=True), *index.rows)
            packed = Index(arch, index.release, index.artifacts, rows, index.abis)
            add_channel(file, packed_channel(key), packed)
        file.commit()
    finally:
        file.close()


_poisoning = 0  # calls inside poisoned_allocations; PyTorch's switch is one for all threads
_lock = threading.Lock()


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Whatever PyTorch allocates inside is filled with NaN: an element that a kernel does not write shows."""
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    global _poisoning
    with _lock:
        _poisoning += step
        torch.use_deterministic_algorithms(_poisoning > 0)


RESERVE = 1 << 29  # bytes of one free block from which larger workspaces are cut
SMALL = 1 << 20  # bytes up to which the allocator has blocks of their own
FRONT = 1 << 27  # bytes of a free block, from whose front allocations are cut, that are filled


def reserve() -> None:
    """Let the allocator hold free blocks, so that what a call allocates is not fresh from the driver, all 0."""
    held = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (RESERVE, *[SMALL] * 64)]
    del held


def fill_free_memory() -> None:
    """What the allocator holds free for the current stream becomes 0xFF: NaN in bf16, fp16 and fp32, -1 in int32. On
    that stream, without synchronising. Of long blocks, which references leave behind, the front."""
    from cuda.bindings import driver

    torch.zeros(1, device="cuda")  # a new thread may have no context yet, and the driver would refuse
    stream = torch.cuda.current_stream().cuda_stream
    for start, size in free_blocks(torch.cuda.memory_snapshot(), torch.cuda.current_device(), stream):
        (status,) = driver.cuMemsetD8Async(start, 0xFF, min(size, FRONT), stream)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuMemsetD8Async of {size} bytes: {status}")


def free_blocks(segments: list[dict[str, Any]], device: int, stream: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the free blocks of a memory snapshot that a call on this stream can be given."""
    for segment in segments:
        if (segment["device"], segment["stream"]) != (device, stream):
            continue
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):  # a graph's own
            continue
        start = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                yield start, block["size"]
            start += block["size"]
