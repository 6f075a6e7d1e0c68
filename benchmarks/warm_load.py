"""A load from a warm disk cache with every check on, up to the driver: 200 KB kernels, p99 against its bar.

    python -m benchmarks.warm_load [--loads N] [--out FOLDER]

What is timed is `Session.kernel` of a kernel that the process does not have yet: selection; the cache's owner, mode and
link checks; reading; size and SHA-256 of the frame; bounded decoding; size, SHA-256 and ELF header of the cubin; the
parameter layout. A driver that does nothing stands in for CUDA's, and the registry is a server that nobody runs. The
content of `like a cubin` compresses to about a quarter, as the table's cubins do; `incompressible` is the worst case.
Files are in the page cache. The bar is about loads that had their core to themselves: those during which the kernel
gave it to another process are counted, and in `p99_all_ms`. Needs no GPU. Writes warm_load.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from registry.contract import Abi, Artifact, DispatchRow, Grid, Index, Param, Variant, sha256_hex
from registry.frames import ELF_MACHINE_CUDA, compress
from runtime import config
from runtime.load import session
from runtime.sources.cache import DiskCache

ARCH = "sm_120"
NBYTES = 200_000  # of a cubin
BAR_MS = 1.5  # at most, of 99 loads in 100
CASES = {"like a cubin": 4, "incompressible": 1}  # how often the same noise is repeated in a cubin
ABI = Abi("fwd", 1, (Param("q", "ptr"), Param("k", "ptr"), Param("v", "ptr"), Param("seqlen_q", "i32")))
NO_SERVER = "http://127.0.0.1:9"  # the discard port: whoever asked it would fail at once


def made_up(number: int, nbytes: int, repeats: int) -> tuple[Artifact, bytes]:
    """An artifact for sm_120 and its frame: a cubin's ELF header before seeded noise, said `repeats` times."""
    variant = Variant("fwd", "bf16", 64, 64, (("m", 16 * (number + 1)), ("n", 64), ("w", 4), ("s", 1)))
    noise = random.Random(number).randbytes(-(-nbytes // repeats)) * repeats
    cubin = _elf_header() + noise[: nbytes - 64]
    frame = compress(cubin)
    artifact = Artifact(
        variant=variant.key,
        arch=ARCH,
        symbol=variant.key,
        abi=ABI.digest,
        grid=Grid("tiles_heads_batch", 16 * (number + 1)),
        threads=128,
        smem=65_536,
        static_smem=0,
        registers=200,
        spills=0,
        stack=0,
        blocks_per_sm=1,
        hot_loop=(("HMMA", 64),),
        cubin_sha256=sha256_hex(cubin),
        cubin_size=len(cubin),
        frame_sha256=sha256_hex(frame),
        frame_size=len(frame),
        ptx_sha256=sha256_hex(variant.key.encode()),
        toolchain="made up",
        min_driver=12080,
    )
    return artifact, frame


def _elf_header() -> bytes:
    """The 64 bytes that begin a cubin for sm_120."""
    ident = b"\x7fELF\x02\x01\x01\x33\x08" + bytes(7)
    flags = 0x6000002 | int(ARCH.removeprefix("sm_")) << 8
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, ELF_MACHINE_CUDA, 1, 0, 0, 0, flags, 64, 56, 0, 64, 0, 0)


class NoDriver:
    """runtime.load.driver.Driver and backend in one, which load nothing."""

    def __init__(self) -> None:
        self.driver = self

    def capability(self, device: int) -> tuple[int, int]:
        return 12, 0

    def version(self) -> int:
        return 12080

    def context(self, device: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load_library(self, cubin: bytes) -> Any:
        return cubin

    def kernel(self, library: Any, symbol: str) -> Any:
        return library

    def params(self, kernel: Any) -> tuple[tuple[int, int], ...]:
        return ABI.layout

    def function(self, kernel: Any) -> Any:
        return kernel

    def allow_dynamic_smem(self, function: Any, nbytes: int) -> None:
        pass


def row(case: str, loads: int) -> dict[str, Any]:
    """How long `loads` loads take, in milliseconds, with a cache of their own."""
    artifact, frame = made_up(0, NBYTES, CASES[case])
    index = Index(ARCH, "0.1", (artifact,), (DispatchRow("fwd", (), artifact.variant),), (ABI,))
    with tempfile.TemporaryDirectory(prefix="cubinery-bench-") as folder:
        os.chmod(folder, 0o700)
        cache = DiskCache(folder)
        cache.put("indexes", index.digest, index.to_bytes())
        cache.put("blobs", artifact.frame_sha256, frame)
        settings = config.current()._replace(
            registry=NO_SERVER, pins=((ARCH, index.digest),), cache=folder, offline=True
        )
        measured = _times(settings, loads)
    everything = sorted(ms for ms, _ in measured)
    times = sorted(ms for ms, disturbed in measured if not disturbed) or everything
    return {
        "case": case,
        "cubin_bytes": artifact.cubin_size,
        "frame_bytes": artifact.frame_size,
        "loads": loads,
        "disturbed": sum(disturbed for _, disturbed in measured),
        "p50_ms": _percentile(times, 50),
        "p99_ms": _percentile(times, 99),
        "max_ms": _percentile(times, 100),
        "p99_all_ms": _percentile(everything, 99),
        "bars": {"p99_ms": BAR_MS},
    }


def _percentile(times: Sequence[float], percent: int) -> float:
    """The least of these sorted times that no less than `percent` of them stay within."""
    return round(times[-(-len(times) * percent // 100) - 1], 4)


def _times(settings: config.Config, loads: int) -> list[tuple[float, bool]]:
    """(milliseconds, whether another process had the core meanwhile) of each load after the first."""
    now = session.Session(settings)
    now.__dict__["backend"] = NoDriver()  # in place of the cached property
    found = []
    for _ in range(loads + 1):
        now._kernels.clear()
        switches, start = _switches(), time.perf_counter()
        _, _, fresh = now.kernel("fwd", {}, 0, capturing=False)
        found.append(((time.perf_counter() - start) * 1e3, _switches() != switches))
        assert fresh
    return found[1:]


def _switches() -> int:
    """How often this thread has lost its core to another process."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write `warm_load.json`; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loads", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    if options.loads < 100:
        parser.error("--loads: the 99th percentile needs at least 100")
    rows = [row(case, options.loads) for case in CASES]
    print(f"{'case':16} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'disturbed':>9}  bar: p99 <= {BAR_MS} ms")
    for r in rows:
        met = "met" if r["p99_ms"] <= BAR_MS else "MISSED"
        print(f"{r['case']:16} {r['p50_ms']:8.3f} {r['p99_ms']:8.3f} {r['max_ms']:8.3f} {r['disturbed']:9}  {met}")
    facts = {**measure.stamp(), "python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}
    print(measure.write(options.out, "warm_load", {**facts, "cpu": _cpu(), "rows": rows}))
    return int(any(r["p99_ms"] > BAR_MS for r in rows))


def _cpu() -> str:
    """The processor's name, as Linux states it."""
    with contextlib.suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
