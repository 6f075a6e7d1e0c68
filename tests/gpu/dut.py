"""The device under test: one variant at a time, forced, behind the public API."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.derived import one_variant_each
from registry.contract import Artifact


class Dut(Protocol):
    """What the checks ask of a device. `attn` is `runtime.flash_attn` or, in the self-test, a stand-in for it."""

    device: str
    artifacts: dict[str, Artifact]

    def force(self, key: str) -> None: ...
    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any: ...


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

    def force(self, key: str) -> None:
        """From now on every call is served by the variant `key`, whatever the dispatch table says."""
        self._runtime.configure(registry=self._file, channel=key)

    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        with poisoned_allocations():
            return self._runtime.flash_attn(q, k, v, **options)


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
