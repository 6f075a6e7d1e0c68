"""The device under test: one variant at a time, forced, behind the public API."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.derived import one_variant_each, read_index
from registry.contract import Artifact, Condition, DispatchRow, Index, Variant


class Dut(Protocol):
    """What the checks ask of a device: `runtime.flash_attn` and `runtime.flash_attn_varlen` or, in the self-test,
    stand-ins for them."""

    device: str
    artifacts: dict[str, Artifact]

    def force(self, key: str, pack: bool = False) -> None: ...
    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any: ...
    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any: ...


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
        self._runtime.configure(registry=self._file, channel=packed_channel(key) if pack else key)

    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn(q, k, v, **options)

    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn_varlen(q, k, v, **options)


def packed_channel(key: str) -> str:
    return f"{key}-packed"


def add_packed_channels(registry: Path, arch: str, keys: list[str]) -> None:
    """Beside the channels of `one_variant_each`, one per variant that packs the heads of every group."""
    indexes = {key: read_index(registry, arch, key) for key in keys}
    file = sqlite3.connect(registry)
    try:
        for key, index in indexes.items():
            op = Variant.parse(key).op
            rows = (DispatchRow(op, (Condition("group", ">=", 2),), key, pack=True), DispatchRow(op, (), key))
            packed = Index(arch, index.release, index.artifacts, rows, index.abis)
            file.execute("INSERT OR IGNORE INTO indexes VALUES (?, ?, ?)", (packed.digest, arch, packed.to_bytes()))
            place = (packed_channel(key), arch, packed.digest)
            file.execute("INSERT OR REPLACE INTO channels VALUES (?, ?, ?)", place)
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
