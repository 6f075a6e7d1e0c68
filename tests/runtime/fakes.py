"""A registry of toy cubins, and a CUDA driver that runs on the CPU: it reads the parameters as a kernel would."""

from __future__ import annotations

import contextlib
import ctypes
import json
import struct
from pathlib import Path
from typing import Any

import torch

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
    fast_divmod,
    sha256_hex,
)
from registry.store import Store, compress
from runtime.errors import DriverError
from tests.runtime import backward_kernels, cache_kernels
from tests.support.abis import FWD

# A table like kernels.dispatch's, but retuning that one changes nothing here.
TABLE = tuple(
    (dtype, head_dim, seqlen_q, Variant("fwd", dtype, head_dim, head_dim, (("m", m), ("n", 64), ("w", 4), ("s", 1))))
    for head_dim in (64, 96, 128)
    for dtype in ("bf16", "fp16")
    for m, seqlen_q in ((64, 64), (128, None))
)
LN2 = 0.6931471805599453
DTYPES = cache_kernels.DTYPES
view = cache_kernels.view


def rows() -> tuple[DispatchRow, ...]:
    """Short queries get the tile of 64 rows, packed where heads share keys, all others that of 128."""
    made = []
    for dtype, head_dim, seqlen_q, variant in TABLE:
        dims = (Condition("head_dim", "<=", head_dim), Condition("head_dim_v", "<=", head_dim))
        when: tuple[Condition, ...] = (Condition("dtype", "==", dtype), *dims)
        if seqlen_q:
            packed = (Condition("group", ">=", 2), Condition("packed_rows", "<=", seqlen_q))
            made.append(DispatchRow("fwd", (*when, *packed), variant.key, pack=True))
            when += (Condition("seqlen_q", "<=", seqlen_q),)
        made.append(DispatchRow("fwd", when, variant.key))
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
    """Behind runtime.load.driver.Driver. `calls` records what was asked, `launches` each launch with its parameters."""

    def __init__(self, version: int = 12080):
        self.success = object()
        self.calls: list[str] = []
        self.launches: list[dict[str, Any]] = []
        self.status: Any = self.success
        self._version = version
        self.refuse_image = False
        self.resident = (132, 1)

    def launched(self, op: str) -> list[dict[str, Any]]:
        """What was launched of one op."""
        return [made for made in self.launches if Variant.parse(made["variant"]).op == op]

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

    def resident_blocks(self, device: int, function: Any, threads: int, smem: int) -> tuple[int, int]:
        self.calls.append("resident_blocks")
        return self.resident

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
            variant = Variant.parse(function["symbol"])
            KERNELS[variant.op](variant, values)
        return (self.status,)


def attend(variant: Variant, p: dict[str, Any]) -> None:
    """The kernel: attention from nothing but its parameters, one entry after the other."""
    assert p["head_dim"] <= variant.head_dim and p["head_dim_v"] <= variant.head_dim_v
    assert p["pack"] in (1, p["heads_q"] // max(p["heads_kv"], 1))
    assert (p["pack_magic"], p["pack_shift"]) == fast_divmod(p["pack"])
    for b in range(p["batch"]):
        _attend_entry(DTYPES[variant.dtype], p, b)


def _rows(p: dict[str, Any], side: str, b: int) -> tuple[int, int]:
    """(first token in the array, number of tokens) of an entry's q or k."""
    first, n = 0, p[f"seqlen_{side}"]
    if p[f"cu_seqlens_{side}"]:
        assert p[f"{side}_stride_b"] == 0
        ends = view(p[f"cu_seqlens_{side}"], torch.int32, (p["batch"] + 1,), (1,)).tolist()
        first, n = ends[b], ends[b + 1] - ends[b]
    if p[f"seqused_{side}"]:
        n = min(n, view(p[f"seqused_{side}"], torch.int32, (p["batch"],), (1,)).tolist()[b])
    if side == "k" and p["leftpad_k"]:
        padding = min(max(view(p["leftpad_k"], torch.int32, (p["batch"],), (1,)).tolist()[b], 0), n)
        first, n = first + padding, n - padding
    return first, n


def _attend_entry(dtype: torch.dtype, p: dict[str, Any], b: int) -> None:
    first = {side: _rows(p, side, b) for side in "qk"}
    n = [tokens for _, tokens in first.values()]

    def tensor(name: str, side: str, heads: int, dim: int) -> torch.Tensor:
        """(heads, tokens, dim)"""
        start, tokens = first[side]
        steps = p[f"{name}_stride_h"], p[f"{name}_stride_s"], 1
        offset = b * p[f"{name}_stride_b"] + start * p[f"{name}_stride_s"]
        return view(p[name] + offset * dtype.itemsize, dtype, (heads, tokens, dim), steps)

    heads, group = p["heads_q"], p["heads_q"] // p["heads_kv"]
    q, o = tensor("q", "q", heads, p["head_dim"]), tensor("o", "q", heads, p["head_dim_v"])
    k = tensor("k", "k", p["heads_kv"], p["head_dim"]).repeat_interleave(group, 0)
    v = tensor("v", "k", p["heads_kv"], p["head_dim_v"]).repeat_interleave(group, 0)
    scores = q.float() @ k.float().transpose(1, 2)
    if p["softcap_scale"]:
        scores = torch.tanh(scores * p["softcap_scale"] * LN2 / 2)
    scores = scores * (p["scale_log2"] * LN2)
    i = torch.arange(n[0])[:, None] + n[1] - n[0]
    j = torch.arange(n[1])[None]
    if p["alibi_slopes"]:
        slopes = view(p["alibi_slopes"] + 4 * b * p["alibi_stride_b"], torch.float32, (heads,), (1,))
        scores = scores - slopes[:, None, None] * (i - j).abs()
    left, right = (bound if bound < WINDOW_OPEN else 1 << 40 for bound in (p["window_left"], p["window_right"]))
    scores = scores.masked_fill((j < i - left) | (j > i + right), -torch.inf)
    if p["sink"]:
        sink = view(p["sink"], dtype if p["sink_low"] else torch.float32, (heads,), (1,)).float()
        scores = torch.cat((scores, sink[:, None, None].expand(-1, n[0], 1)), 2)
    o.copy_(torch.nan_to_num(torch.softmax(scores, -1))[..., : n[1]] @ v.float())
    if p["lse"]:
        start = p["lse"] + 4 * (b * p["lse_stride_b"] + first["q"][0])
        lse = view(start, torch.float32, (heads, n[0]), (p["lse_stride_h"], 1))
        lse.copy_(torch.logsumexp(scores, -1))


KERNELS = {"fwd": attend} | cache_kernels.KERNELS | backward_kernels.KERNELS


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
