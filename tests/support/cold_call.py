"""`python -m tests.support.cold_call`: the files that a process's first `flash_attn` runs through, to cuLaunchKernel.

`files` are those of ours with a frame in the call, imports within it included; a move is a frame entered in another
file than the one before it. Without a GPU a stand-in takes the driver's place, which imports nothing of ours, and the
registry holds toy cubins. With one, `--registry FILE` makes the call on it, through the driver.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
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
        return len(self.runs()) - 1

    def runs(self) -> list[tuple[str, list[str]]]:
        """(file, functions entered in it) between two moves."""
        found: list[tuple[str, list[str]]] = []
        for file, function in self.frames:
            if not found or found[-1][0] != file:
                found.append((file, []))
            if "<" not in function and function not in found[-1][1]:
                found[-1][1].append(function)
        return found


@contextmanager
def recorded() -> Iterator[Trace]:
    """Frames of this thread."""
    trace, rooms = Trace([]), tuple(f"{ROOT / room}/" for room in ROOMS)

    def see(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(rooms):
            trace.frames.append((str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_code.co_qualname))

    sys.setprofile(see)
    try:
        yield trace
    finally:
        sys.setprofile(None)


class Driver:
    """Says yes to everything; what it loads states the layout of its parameters."""

    success, launches = 0, 0

    def version(self) -> int:
        return 13000

    def context(self, device: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load_library(self, cubin: bytes) -> Any:
        return json.loads(cubin[64:])

    def kernel(self, library: Any, symbol: str) -> Any:
        return library

    def params(self, kernel: Any) -> tuple[tuple[int, int], ...]:
        places, offset = [], 0
        for _, kind in kernel["params"]:
            size = {"ptr": 8, "i64": 8, "i32": 4, "f32": 4}[kind]
            offset = -(-offset // size) * size
            places.append((offset, size))
            offset += size
        return tuple(places)

    def function(self, kernel: Any) -> Any:
        return kernel

    def allow_dynamic_smem(self, function: Any, nbytes: int) -> None:
        pass

    def check(self, status: int, call: str) -> None:
        assert status == 0, call

    def launch(self, *arguments: Any) -> tuple[int]:
        Driver.launches += 1
        return (0,)


class Backend:
    device_type, driver = "cpu", Driver()

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def raw_stream(self, device: int) -> int:
        return 0

    def current_device(self) -> int:
        return -1

    def capability(self, device: int) -> tuple[int, int]:
        return 12, 0

    def is_capturing(self) -> bool:
        return False

    def guard(self, device: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def cold_flash_attn(registry: str, device: str) -> Trace:
    """The trace of this process's first dense call."""
    import torch

    import runtime
    from runtime.load import session

    if device == "cpu":
        session.BACKEND = Backend
    runtime.configure(registry=registry)
    q, k, v = (torch.randn(1, 128, heads, 64, device=device).bfloat16() for heads in (4, 2, 2))
    with recorded() as trace:
        runtime.flash_attn(q, k, v, causal=True)
    assert device != "cpu" or Driver.launches == 1
    return trace


def in_a_new_process(registry: str, device: str = "cpu") -> Trace:
    code = "import sys; from tests.support import cold_call; cold_call.child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, registry, device]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Trace([(file, function) for file, function in json.loads(said)])


def child(registry: str, device: str) -> None:
    print(json.dumps(cold_flash_attn(registry, device).frames))


def of_toys() -> Trace:
    """Without a GPU."""
    from tests.runtime.fakes import write_registry

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.db"
        write_registry(path)
        path.chmod(0o600)
        return in_a_new_process(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.cold_call", description=__doc__)
    parser.add_argument("--registry", help="a registry file with kernels for this machine's GPU")
    parser.add_argument("--json", action="store_true", help="files, moves and frames as JSON")
    options = parser.parse_args()
    trace = in_a_new_process(options.registry, "cuda") if options.registry else of_toys()
    if options.json:
        print(json.dumps({"files": trace.files, "moves": trace.moves, "frames": trace.frames}))
        return
    for file, functions in trace.runs():
        print(f"{file:32} {', '.join(functions)}")
    print(f"{len(trace.files)} files, {trace.moves} moves")


if __name__ == "__main__":
    main()
