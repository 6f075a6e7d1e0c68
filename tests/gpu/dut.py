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

    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn(q, k, v, **options)

    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn_varlen(q, k, v, **options)

    def kvcache(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn_with_kvcache(q, k_cache, v_cache, **options)

    def combine(self, out_partial: torch.Tensor, lse_partial: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn_combine(out_partial, lse_partial, **options)


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
