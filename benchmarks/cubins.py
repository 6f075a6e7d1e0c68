"""Cubins straight from a registry file and a raw launcher for them: what tuning over unlisted variants needs.

It goes around `runtime` on purpose: candidates stand in no index, and the launch's shared memory is varied. Needs
cuda.bindings, torch and a CUDA device only where a kernel is loaded.
"""

from __future__ import annotations

import ctypes
import json
import sqlite3
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.occupancy import padded_smem
from registry import ops
from registry.contract import WINDOW_OPEN, Abi, Artifact, CubineryError, Variant, fast_divmod, sha256_hex
from registry.frames import decompress

LOG2_E = 1.4426950408889634
OPEN = (WINDOW_OPEN, WINDOW_OPEN)


class BenchmarkError(CubineryError):
    """A benchmark cannot run as asked, or the driver refuses a call."""

    reason = "benchmark"


@dataclass(frozen=True)
class Candidate:
    """A variant as it runs on this device, and the artifact of the same PTX for sm_120 if the registry has one."""

    artifact: Artifact
    sm120: Artifact | None
    abi: Abi
    cubin: bytes

    @property
    def key(self) -> str:
        return self.artifact.variant

    @property
    def variant(self) -> Variant:
        return Variant.parse(self.key)

    def target_blocks(self) -> int:
        """Blocks that share an SM120 multiprocessor. BenchmarkError without an sm_120 artifact of the same PTX."""
        a = self.sm120
        if a is None:
            raise BenchmarkError(f"{self.key}: no sm_120 artifact of PTX {self.artifact.ptx_sha256[:12]} to emulate")
        return a.blocks_per_sm

    def emulated_smem(self) -> int:
        """Dynamic shared memory with which an H200 SM holds as many blocks as an SM120 SM would."""
        return padded_smem(self.target_blocks(), self.artifact.static_smem)


def read(path: Path, arch: str, op: str = "fwd", only: str = "*") -> list[Candidate]:
    """Every variant of `op` in the registry file's artifacts table for `arch`, the newest row of each, by key."""
    database = sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)
    try:
        # By rowid: a variant that was built again has a newer row.
        rows = database.execute("SELECT json FROM artifacts WHERE arch IN (?, 'sm_120') ORDER BY rowid", (arch,))
        artifacts = [Artifact.from_json(json.loads(text)) for (text,) in rows]
        chosen = {a.variant: a for a in artifacts if a.arch == arch and fnmatchcase(a.variant, only)}
        same_ptx = {(a.variant, a.ptx_sha256): a for a in artifacts if a.arch == "sm_120"}
        return [
            Candidate(a, same_ptx.get((key, a.ptx_sha256)), _abi(a, op), _cubin(database, a))
            for key, a in sorted(chosen.items())
            if Variant.parse(key).op == op
        ]
    finally:
        database.close()


def _abi(artifact: Artifact, op: str) -> Abi:
    if ops.get(op).abi.digest != artifact.abi:
        raise BenchmarkError(f"{artifact.variant}: built for another ABI than registry/ops states; build it again")
    return ops.get(op).abi


def _cubin(database: sqlite3.Connection, artifact: Artifact) -> bytes:
    row = database.execute("SELECT frame FROM blobs WHERE sha256 = ?", (artifact.frame_sha256,)).fetchone()
    if row is None:
        raise BenchmarkError(f"{artifact.variant}: the registry lacks its blob {artifact.frame_sha256}")
    cubin = decompress(row[0], artifact.cubin_size)
    if sha256_hex(cubin) != artifact.cubin_sha256:
        raise BenchmarkError(f"{artifact.variant}: the cubin's SHA-256 is not the artifact's")
    return cubin


class Kernel:
    """One cubin loaded into torch's current context, with its own shared-memory setting.

    smem: dynamic shared memory of a launch in bytes; carveout: percent of the SM's memory preferred as shared.
    """

    def __init__(self, candidate: Candidate, smem: int | None = None, carveout: int | None = None):
        import torch
        from cuda.bindings import driver

        torch.zeros(1, device="cuda")  # torch creates its context with its first allocation
        self.driver, self.artifact, self.abi = driver, candidate.artifact, candidate.abi
        self.smem = candidate.artifact.smem if smem is None else smem
        self.library = check(driver.cuLibraryLoadData(candidate.cubin, [], [], 0, [], [], 0))
        kernel = check(driver.cuLibraryGetKernel(self.library, candidate.artifact.symbol.encode()))
        self.function = check(driver.cuKernelGetFunction(kernel))
        attribute = driver.CUfunction_attribute
        self._set(attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.smem)
        if carveout is not None:
            self._set(attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, carveout)

    def _set(self, attribute: Any, value: int) -> None:
        check(self.driver.cuFuncSetAttribute(self.function, attribute, value))

    @property
    def occupancy(self) -> int:
        """Blocks per SM of this device, as the driver computes it for this launch."""
        query = self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        return check(query(self.function, self.artifact.threads, self.smem))

    def bind(self, params: bytearray, blocks: int) -> Launch:
        return Launch(self, params, blocks)


class Launch:
    """A kernel with its parameters packed: calling it enqueues one launch on torch's current stream."""

    def __init__(self, kernel: Kernel, params: bytearray, blocks: int):
        self.kernel, self.blocks = kernel, blocks
        # The driver reads the values through these addresses at every launch: both buffers live as long as this.
        self.buffer = (ctypes.c_char * len(params)).from_buffer(params)
        base = ctypes.addressof(self.buffer)
        self.pointers = (ctypes.c_void_p * len(kernel.abi.layout))(*(base + at for at, _ in kernel.abi.layout))
        self.address = ctypes.addressof(self.pointers)

    def __call__(self) -> None:
        import torch

        kernel, stream = self.kernel, torch.cuda.current_stream().cuda_stream
        threads = kernel.artifact.threads
        launch = kernel.driver.cuLaunchKernel
        check(launch(kernel.function, self.blocks, 1, 1, threads, 1, 1, kernel.smem, stream, self.address, 0))


def fwd_values(
    abi: Abi, q: Any, k: Any, v: Any, o: Any, lse: Any, *, scale: float, window: tuple[int, int] = OPEN, pack: int = 1,
    cu_seqlens: tuple[Any, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every parameter of the forward's ABI.

    q, k, v, o: (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) with cu_seqlens of queries and keys,
    int32 on the device, which must outlive the launch. window: (left, right). pack: 1, or heads_q / heads_kv.
    """
    values: dict[str, Any] = {p.name: 0.0 if p.type == "f32" else 0 for p in abi.params}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("o", o)):
        values[name] = tensor.data_ptr()
        strides = tensor.stride()[:-1]
        values[f"{name}_stride_s"], values[f"{name}_stride_h"] = strides[-2:]
        values[f"{name}_stride_b"] = strides[0] if cu_seqlens is None else 0
    values["lse"] = lse.data_ptr()
    values["lse_stride_b"], values["lse_stride_h"] = lse.stride()[:2] if cu_seqlens is None else (0, lse.stride(0))
    values["batch"] = q.shape[0] if cu_seqlens is None else len(cu_seqlens[0]) - 1
    if cu_seqlens is not None:
        values["cu_seqlens_q"], values["cu_seqlens_k"] = (x.data_ptr() for x in cu_seqlens)
    values["seqlen_q"], values["heads_q"], values["head_dim"] = q.shape[-3:]
    values["seqlen_k"], values["heads_kv"], values["head_dim_v"] = v.shape[-3:]
    values["window_left"], values["window_right"] = window
    values["pack"] = pack
    values["pack_magic"], values["pack_shift"] = fast_divmod(pack)
    values["scale_log2"] = scale * LOG2_E
    return values


def bind_fwd(
    kernel: Kernel, q: Any, k: Any, v: Any, o: Any, lse: Any, *, causal: bool = False, window: int | None = None,
    pack: bool = False, cu_seqlens: tuple[Any, Any] | None = None,
) -> Launch:  # fmt: skip
    """A launch of `kernel` on these tensors with scale 1/√head_dim; see `fwd_values`.

    window: keys to the left of the diagonal, which then also ends what a query sees. pack: let the query heads of a
    key/value head share tiles.
    """
    left, right = WINDOW_OPEN if window is None else window, 0 if causal or window is not None else WINDOW_OPEN
    together = q.shape[-2] // k.shape[-2] if pack else 1
    values = fwd_values(
        kernel.abi, q, k, v, o, lse,
        scale=q.shape[-1] ** -0.5, window=(left, right), pack=together, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    facts = {name: values[name] for name in ("batch", "seqlen_q", "heads_q")}
    facts |= {"varlen": int(cu_seqlens is not None), "total_q": q.shape[0]}
    return kernel.bind(kernel.abi.pack(values), kernel.artifact.grid.blocks(facts, together))


def check(result: tuple[Any, ...]) -> Any:
    """The value of a cuda.bindings call, or BenchmarkError with the driver's own name of the error."""
    status, *values = result
    if int(status) != 0:
        raise BenchmarkError(f"CUDA driver: {getattr(status, 'name', status)}")
    return values[0] if values else None
