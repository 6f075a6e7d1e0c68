"""`python -m tests.support.cold_call`: the files that a first `flash_attn` runs through, up to cuLaunchKernel.

A toy registry and a stand-in for the driver let it run without a GPU. `files` are those of ours with a frame in the
call; a move is a frame entered in another file than the one before it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("runtime", "registry")


class Trace(NamedTuple):
    """frames: (file, function) of ours in the order in which they were entered."""

    frames: list[tuple[str, str]]

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _ in self.frames))

    @property
    def moves(self) -> int:
        return sum(a[0] != b[0] for a, b in zip(self.frames, self.frames[1:], strict=False))


@contextmanager
def recorded(until: Any) -> Iterator[Trace]:
    """Frames of this thread, until a frame of the function `until` is entered."""
    trace, rooms = Trace([]), tuple(str(ROOT / room) for room in ROOMS)
    done = False

    def see(frame: Any, event: str, _: Any) -> None:
        nonlocal done
        if event != "call" or done:
            return
        done = frame.f_code is until.__code__
        if not done and frame.f_code.co_filename.startswith(rooms):
            trace.frames.append((str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_code.co_qualname))

    sys.setprofile(see)
    try:
        yield trace
    finally:
        sys.setprofile(None)


def cold_flash_attn(registry: Path) -> Trace:
    """The trace of a process's first dense call, from a registry file that holds toy cubins."""
    import torch

    import runtime
    from tests.runtime.fakes import FakeBackend, FakeDriver

    try:
        from runtime.load import session
    except ImportError:  # the layout of earlier commits
        from runtime import session  # type: ignore[attr-defined, no-redef]
    session.BACKEND = FakeBackend
    runtime.configure(registry=registry)
    q, k, v = (torch.randn(1, 128, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    with recorded(FakeDriver.launch) as trace:
        runtime.flash_attn(q, k, v, causal=True)
    return trace


def main() -> None:
    from tests.runtime.fakes import write_registry

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.db"
        write_registry(path)
        path.chmod(0o600)
        trace = cold_flash_attn(path)
    if "--json" in sys.argv:
        print(json.dumps({"files": trace.files, "moves": trace.moves, "frames": trace.frames}))
        return
    for file, function in trace.frames:
        print(f"{file:40} {function}")
    print(f"{len(trace.files)} files, {trace.moves} moves")


if __name__ == "__main__":
    main()
