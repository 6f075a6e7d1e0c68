"""A registry of toy cubins, and a CUDA driver that runs on the CPU: it reads the parameters as a kernel would."""

from __future__ import annotations

import contextlib
import ctypes
import json
import struct
from pathlib import Path
from typing import Any

import torch

from kernels.abi import FWD
from registry.contract import (
    PARAM_FORMATS,
    WINDOW_OPEN,
    Abi,
    Artifact,
    Condition,
    DispatchRow,
    Grid,
    Index,
    Variant,
    sha256_hex,
)
from registry.store import Store, compress
from runtime.errors import DriverError

# A table like kernels.dispatch's, but retuning that one changes nothing here.
TABLE = tuple(
    (dtype, head_dim, seqlen_q, Variant("fwd", dtype, head_dim, head_dim, (("m", m), ("n", 64), ("w", 4), ("s", 1))))
    for head_dim in (64, 96, 128)
    for dtype in ("bf16", "fp16")
    for m, seqlen_q in ((64, 64), (128, None))
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def rows() -> tuple[DispatchRow, ...]:
    """Short queries get the tile of 64 rows, all others that of 128."""
    made = []
    for dtype, head_dim, seqlen_q, variant in TABLE:
        when = [Condition("dtype", "==", dtype), Condition("head_dim", "==", head_dim)]
        when += [Condition("seqlen_q", "<=", seqlen_q)] if seqlen_q else []
        made.append(DispatchRow("fwd", tuple(when), variant.key))
    return tuple(made)


def elf(arch: str, payload: bytes = b"", *, abi_version: int = 8, machine: int = 190) -> bytes:
    """A 64-byte ELF header as cubins have it, and a payload."""
    number = int(arch.removeprefix("sm_"))
    flags = 0x6000002 | number << 8 if abi_version == 8 else number << 16 | 0x500 | number
    ident = b"\x7fELF\x02\x01\x01\x33" + bytes([abi_version]) + bytes(7)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, 0, flags, 64, 56, 0, 64, 0, 0) + payload


def toy_cubin(variant: Variant, arch: str, abi: Abi = FWD) -> bytes:
    """What FakeDriver loads: the payload says which kernel it is and which parameters it takes."""
    return elf(arch, json.dumps({"symbol": variant.key, "params": abi.to_json()["params"]}).encode())


def toy_artifact(variant: Variant, arch: str, *, cubin: bytes | None = None, frame: bytes | None = None,
                 abi: Abi = FWD, **changes: Any) -> tuple[Artifact, bytes]:  # fmt: skip
    """An artifact and its frame."""
    cubin = toy_cubin(variant, arch, abi) if cubin is None else cubin
    frame = compress(cubin) if frame is None else frame
    fields: dict[str, Any] = {
        "variant": variant.key, "arch": arch, "symbol": variant.key, "abi": abi.digest,
        "grid": Grid("tiles_heads_batch", variant.size("m")), "threads": 32 * variant.size("w"), "smem": 65_536,
        "static_smem": 0, "registers": 200, "spills": 0, "stack": 0, "blocks_per_sm": 1, "hot_loop": (("HMMA", 64),),
        "cubin_sha256": sha256_hex(cubin), "cubin_size": len(cubin), "frame_sha256": sha256_hex(frame),
        "frame_size": len(frame), "ptx_sha256": sha256_hex(variant.key.encode()), "toolchain": "toy",
        "min_driver": 12080,
    }  # fmt: skip
    return Artifact(**fields | changes), frame


def toy_index(
    arch: str = "sm_120", *, abi: Abi = FWD, only: str = "", **changes: Any
) -> tuple[Index, dict[str, bytes]]:
    """An index of the table (or of the variants whose key holds `only`), and frames by hash."""
    made = [toy_artifact(v, arch, abi=abi, **changes) for *_, v in TABLE if only in v.key]
    index = Index(arch, "0.1", tuple(a for a, _ in made), rows(), (abi,))
    return index, {a.frame_sha256: frame for a, frame in made}


def write_registry(path: Path, *archs: str, channel: str = "stable", **options: Any) -> dict[str, str]:
    """A registry file as the builder leaves it; {arch: index digest}."""
    digests = {}
    with Store(path) as store:
        for arch in archs or ("sm_120",):
            index, frames = toy_index(arch, **options)
            for artifact in index.artifacts:
                frame = frames[artifact.frame_sha256]
                store.put_artifact(sha256_hex(artifact.frame_sha256.encode()), artifact, frame)
            digests[arch] = store.put_index(index, channel)
    return digests


class FakeDriver:
    """Behind runtime.driver.Driver. `calls` records what was asked, `launches` each launch with its parameters."""

    def __init__(self, version: int = 12080):
        self.success = object()
        self.calls: list[str] = []
        self.launches: list[dict[str, Any]] = []
        self.status: Any = self.success
        self._version = version
        self.refuse_image = False

    def check(self, status: Any, call: str) -> None:
        if status is not self.success:
            raise DriverError(f"{call}: {status}", status=int(status))

    def version(self) -> int:
        return self._version

    def context(self, device: int) -> contextlib.AbstractContextManager[None]:
        self.calls.append("context")
        return contextlib.nullcontext()

    def load_library(self, cubin: bytes) -> Any:
        self.calls.append("load_library")
        if self.refuse_image:
            self.check(200, "cuLibraryLoadData")
        return json.loads(cubin[64:])

    def unload_library(self, library: Any) -> None:
        self.calls.append("unload_library")

    def kernel(self, library: Any, symbol: str) -> Any:
        assert library["symbol"] == symbol
        return library

    def params(self, kernel: Any) -> tuple[tuple[int, int], ...]:
        return Abi.from_json({"op": "fwd", "version": 1, "params": kernel["params"]}).layout

    def function(self, kernel: Any) -> Any:
        return kernel

    def allow_dynamic_smem(self, function: Any, nbytes: int) -> None:
        self.calls.append(f"allow_dynamic_smem {nbytes}")

    def launch(self, function: Any, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, smem: int, stream: int,
               params: int, extra: int) -> tuple[Any]:  # fmt: skip
        named = [(name, kind) for name, kind in function["params"]]
        pointers = (ctypes.c_void_p * len(named)).from_address(params)
        values = {
            name: struct.unpack(form := "<" + PARAM_FORMATS[kind], ctypes.string_at(pointer, struct.calcsize(form)))[0]
            for (name, kind), pointer in zip(named, pointers, strict=True)
        }  # fmt: skip
        self.launches.append({"variant": function["symbol"], "grid": (gx, gy, gz), "block": (bx, by, bz), "smem": smem,
                              "stream": stream, "params": values, "extra": extra})  # fmt: skip
        if self.status is self.success:
            attend(Variant.parse(function["symbol"]), values)
        return (self.status,)


def _view(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Memory at an address as a tensor."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    n = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    raw = (ctypes.c_byte * (n * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, strides)


def attend(variant: Variant, p: dict[str, Any]) -> None:
    """The kernel: attention from nothing but its parameters."""
    dtype, d = DTYPES[variant.dtype], variant.head_dim

    def tensor(name: str, heads: int, seqlen: int) -> torch.Tensor:
        strides = (*(p[f"{name}_stride_{axis}"] for axis in "bhs"), 1)
        return _view(p[name], dtype, (p["batch"], heads, seqlen, d), strides)

    q, o = (tensor(name, p["heads_q"], p["seqlen_q"]) for name in "qo")
    k, v = (
        tensor(name, p["heads_kv"], p["seqlen_k"]).repeat_interleave(p["heads_q"] // p["heads_kv"], 1) for name in "kv"
    )
    scores = q.float() @ k.float().transpose(2, 3) * (p["scale_log2"] * 0.6931471805599453)
    i = torch.arange(p["seqlen_q"])[:, None] + p["seqlen_k"] - p["seqlen_q"]
    j = torch.arange(p["seqlen_k"])[None]
    left, right = (b if b < WINDOW_OPEN else 1 << 40 for b in (p["window_left"], p["window_right"]))
    scores = scores.masked_fill((j < i - left) | (j > i + right), -torch.inf)
    o.copy_(torch.nan_to_num(torch.softmax(scores, -1)) @ v.float())
    if p["lse"]:
        strides = (p["lse_stride_b"], p["lse_stride_h"], 1)
        shape = (p["batch"], p["heads_q"], p["seqlen_q"])
        _view(p["lse"], torch.float32, shape, strides).copy_(torch.logsumexp(scores, -1))


class FakeBackend:
    """torch's CPU in place of its CUDA device; a CPU tensor's device index is -1."""

    device_type = "cpu"

    def __init__(self, driver: FakeDriver | None = None, capability: tuple[int, int] = (12, 0)):
        self.torch = torch
        self.driver = driver or FakeDriver()
        self.capability_of_all = capability
        self.capturing = False
        self.current = -1
        self.guarded: list[int] = []

    def raw_stream(self, device: int) -> int:
        return 0x5EA

    def current_device(self) -> int:
        return self.current

    def capability(self, device: int) -> tuple[int, int]:
        return self.capability_of_all

    def is_capturing(self) -> bool:
        return self.capturing

    @contextlib.contextmanager
    def guard(self, device: int) -> Any:
        self.guarded.append(device)
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before
