"""A registry of made-up cubins, and a CPU stand-in for the kernels in it, so that the scripts' own logic runs in CI."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.cases import varlen
from benchmarks.reference import attention, packed
from registry.contract import Artifact, Condition, DispatchRow, Grid, Index, Variant, sha256_hex
from registry.store import Store, compress
from tests.support.abis import ABIS


def artifact(key: str, arch: str, *, registers: int = 128, smem: int = 40_960) -> tuple[Artifact, bytes]:
    """A well-formed artifact of a cubin that no driver would load, and its frame."""
    cubin = f"{key} {arch}".encode() * 20
    frame = compress(cubin)
    variant = Variant.parse(key)
    made = Artifact(
        variant=key, arch=arch, symbol="cubinery_" + key.replace("-", "_"), abi=ABIS[variant.op].digest,
        grid=Grid("tiles_heads_batch", variant.size("m")), threads=32 * (variant.size("w") or 4), smem=smem,
        static_smem=0,
        registers=registers, spills=0, stack=0, blocks_per_sm=2, hot_loop=(("HMMA", 64),),
        cubin_sha256=sha256_hex(cubin), cubin_size=len(cubin), frame_sha256=sha256_hex(frame), frame_size=len(frame),
        ptx_sha256=sha256_hex(key.encode()), toolchain="test", min_driver=12080,
    )  # fmt: skip
    return made, frame


def write_registry(path: Path, keys: Iterable[str], archs: Iterable[str] = ("sm_120", "sm_90")) -> Path:
    """A registry file with these variants for each architecture, an index and the channel 'stable'.

    A variant serves the calls of its own head dims; those of the backward's ops also those of lesser ones.
    """
    keys = list(keys)
    with Store(path) as store:
        for arch in archs:
            made = [artifact(key, arch) for key in keys]
            for a, frame in made:
                store.put_artifact(sha256_hex(f"{a.variant} {arch}".encode()), a, frame)
            rows = []
            for key in keys:
                v = Variant.parse(key)
                fits = "==" if v.op == "fwd" else "<="
                dims = Condition("head_dim", fits, v.head_dim), Condition("head_dim_v", fits, v.head_dim_v)
                rows.append(DispatchRow(v.op, (Condition("dtype", "==", v.dtype), *dims), key))
            abis = tuple(ABIS[op] for op in dict.fromkeys(row.op for row in rows))
            store.put_index(Index(arch, "test", tuple(a for a, _ in made), tuple(rows), abis), "stable")
    return path


def tables_read(folder: Path, monkeypatch: Any) -> Any:
    """tests.project.measured over the result files of this folder."""
    from tests.project import measured

    monkeypatch.setattr(measured, "result", lambda name: json.loads((folder / f"{name}.json").read_text()))
    return measured


def stand_in_cudart(folder: Path) -> Path:
    """A CUDA runtime of one device, an H200, with versioned symbols as NVIDIA's has them; needs a C compiler."""
    source, versions, library = folder / "cudart.c", folder / "versions", folder / "libcudart.so.13"
    source.write_text(
        "int cudaDeviceGetAttribute(int *value, int attribute, int device) {\n"
        "    if (device) return 101;\n"
        "    *value = attribute == 97 ? 232448 : attribute == 81 ? 233472 : 0;\n"
        "    return 0;\n}\n"
    )
    versions.write_text("libcudart.so.13 { global: cudaDeviceGetAttribute; local: *; };\n")
    options = [f"-Wl,-soname,{library.name}", f"-Wl,--version-script={versions}", "-o", str(library), str(source)]
    subprocess.run(["cc", "-shared", "-fPIC", *options], check=True)
    return library


class FakeHeld:
    """Stands in for benchmarks.held.HeldPeer: takes 3 and 5 ms. prepared: what was asked for."""

    def __init__(self) -> None:
        self.proof = {"bytes": 101_376, "asked": 1}
        self.prepared: list[tuple[str, str]] = []

    def __enter__(self) -> FakeHeld:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self) -> None:
        pass

    def prepare(self, what: str, case: Any, dtype: str) -> None:
        self.prepared.append((what, case.name))

    def round(self, repeat: int) -> list[float]:
        return [3.0, 5.0]


class FakeKernel:
    """Stands in for benchmarks.cubins.Kernel: plain PyTorch instead of a launch."""

    def __init__(self, candidate: Any, smem: int | None = None, carveout: int | None = None):
        self.candidate, self.artifact, self.abi = candidate, candidate.artifact, candidate.abi
        self.smem = candidate.artifact.smem if smem is None else smem
        self.occupancy = 2 if self.smem > candidate.artifact.smem else 4


def fake_bind(
    kernel: FakeKernel, q: Any, k: Any, v: Any, o: Any, lse: Any, *, causal: bool = False, window: int | None = None,
    pack: bool = False, cu_seqlens: Any = None,
) -> Any:  # fmt: skip
    """Stands in for benchmarks.cubins.bind_fwd. A kernel of tile n 16 forgets to mask; one of m 32 does so when packed;
    one of m 16 kills its process."""

    def launch() -> None:
        tile = kernel.candidate.variant
        if tile.size("m") == 16:
            raise SystemExit(9)
        forgets = tile.size("n") == 16 or (pack and tile.size("m") == 32)
        out, statistics = attend(q, k, v, causal and not forgets, window, cu_seqlens)
        o.copy_(out)
        lse.copy_(statistics)

    return launch


def attend(q: Any, k: Any, v: Any, causal: bool, window: int | None, cu_seqlens: Any) -> tuple[Any, Any]:
    """The reference, dense or packed."""
    if cu_seqlens is None:
        return attention(q, k, v, causal, window)
    starts = cu_seqlens[0].tolist()
    lengths = tuple(end - start for start, end in pairwise(starts))
    return packed(q, k, v, varlen("fake", (q.shape[1], k.shape[1], q.shape[2]), lengths, causal))
