"""What fuzzing starts from: sound inputs of each parser, and some that are wrong in known ways.

python -m tests.fuzz.seeds    writes them into tests/fuzz/corpus, as `seed-<name>`
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

from registry.contract import Abi, Artifact, Condition, DispatchRow, Grid, Index, Param, canonical_json, sha256_hex
from registry.frames import compress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CORPUS = Path(__file__).parent / "corpus"
MAGIC = b"\x28\xb5\x2f\xfd"
BLOCK = 128 << 10  # bytes that one block of a frame can hold


def header(arch: int = 120, abi_version: int = 8, machine: int = 190) -> bytes:
    """The ELF header of a cubin, of 64 bytes."""
    flags = 0x6000002 | arch << 8 if abi_version == 8 else arch << 16 | 0x500 | arch
    ident = b"\x7fELF\x02\x01\x01\x33" + bytes([abi_version]) + bytes(7)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, 0, flags, 64, 56, 0, 64, 0, 0)


CONTENT = header() + bytes(range(256)) * 8
ABI = Abi("fwd", 3, (Param("q", "ptr"), Param("rows", "i32"), Param("stride", "i64"), Param("scale", "f32")))
ARTIFACT = Artifact(
    variant="fwd-bf16-d64-dv64-m64-n64-w4-s1",
    arch="sm_120",
    symbol="kernel",
    abi=ABI.digest,
    grid=Grid("tiles_heads_batch", 64),
    threads=128,
    smem=65_536,
    static_smem=0,
    registers=200,
    spills=0,
    stack=0,
    blocks_per_sm=1,
    hot_loop=(("HMMA", 64), ("LDSM", 8)),
    cubin_sha256=sha256_hex(CONTENT),
    cubin_size=len(CONTENT),
    frame_sha256=sha256_hex(b"frame"),
    frame_size=300,
    ptx_sha256=sha256_hex(b"ptx"),
    toolchain="none",
    min_driver=12080,
)


def indexes() -> dict[str, bytes]:
    when = (Condition("dtype", "in", ("bf16", "fp16")), Condition("head_dim", "<=", 64))
    row = DispatchRow("fwd", when, ARTIFACT.variant, pack=True)
    whole = Index("sm_120", "0.1", (ARTIFACT,), (row,), (ABI,)).to_bytes()
    value = json.loads(whole)
    artifact = value["artifacts"][0]
    return {
        "whole": whole,
        "empty": Index("sm_90", "", (), (), ()).to_bytes(),
        "row": canonical_json({**value, "artifacts": []}),
        "twice": canonical_json({**value, "artifacts": [artifact, artifact]}),
        "utf16": whole.decode().encode("utf-16"),
        "surrogate": canonical_json({**value, "release": "\ud800"}),
        "huge": canonical_json({**value, "artifacts": [{**artifact, "cubin_size": 10**100}]}),
        "negative": canonical_json({**value, "artifacts": [{**artifact, "registers": -1}]}),
        "digits": whole.replace(b'"threads":128', b'"threads":' + b"9" * 5000),
        "nan": whole.replace(b'"threads":128', b'"threads":NaN'),
        "deep": b"[" * 4000,
        "format": whole.replace(b'"format":2', b'"format":3'),
    }


def rle(total: int) -> bytes:
    """Blocks of one repeated byte that make `total` bytes: 4 bytes for each 128 KiB."""
    sizes = [BLOCK] * (total // BLOCK) + [total % BLOCK] * bool(total % BLOCK)
    words = [size << 3 | 1 << 1 for size in sizes]
    words[-1] |= 1
    return b"".join(word.to_bytes(3, "little") + b"\0" for word in words)


def single(declared: int, blocks: bytes) -> bytes:
    """A frame of one segment: its window is its content."""
    return MAGIC + b"\xe0" + declared.to_bytes(8, "little") + blocks


def windowed(log: int, blocks: bytes, declared: int | None = None) -> bytes:
    """A frame with a window of 2**log bytes, which declares its size or does not."""
    if declared is None:
        return MAGIC + bytes([0, (log - 10) << 3]) + blocks
    return MAGIC + bytes([0b1100_0000, (log - 10) << 3]) + declared.to_bytes(8, "little") + blocks


def skippable(size: int, content: bytes = b"") -> bytes:
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + content


def frames() -> dict[str, bytes]:
    option = zstd.CompressionParameter
    whole, n = compress(CONTENT), len(CONTENT)
    return {
        "whole": whole,
        "fast": zstd.compress(CONTENT, 1),
        "checksum": zstd.compress(CONTENT, options={option.checksum_flag: 1}),
        "undeclared": zstd.compress(CONTENT, options={option.content_size_flag: 0}),
        "literals": zstd.compress(b"".join(i.to_bytes(2, "little") for i in range(n // 2))),
        "empty": compress(b""),
        "cut": whole[:-3],
        "several": compress(CONTENT[:100]) + compress(CONTENT[100:]),
        "trailing": whole + b"tail",
        "skippable": skippable(4, b"skip") + whole,
        "skippable-huge": skippable(2**32 - 1),
        "rle": single(n, rle(n)),
        "lie": single(n, rle(1 << 20)),
        "window": windowed(27, rle(n), n),
        "window-most": windowed(41, rle(n), n),
        "dictionary": MAGIC + b"\xe3" + b"\1\0\0\0" + n.to_bytes(8, "little") + rle(n),
        "legacy": b"\x27\xb5\x2f\xfd" + whole[4:],
        "raw": single(n, (n << 3 | 1).to_bytes(3, "little") + CONTENT),
    }


def elves() -> dict[str, bytes]:
    return {
        "sm120": header() + b"rest",
        "sm90": header(90),
        "old": header(90, 7),
        "future": header(abi_version=9),
        "x86": header(machine=62),
        "short": header()[:63],
        "bits": header()[:4] + b"\x01" + header()[5:],
        "order": header()[:5] + b"\x02" + header()[6:],
        "text": b".version 8.0\n.target sm_80\n" + bytes(64),
    }


def channels() -> dict[str, bytes]:
    digest = sha256_hex(b"index")
    return {
        "whole": canonical_json({"name": "stable", "indexes": {"sm_120": digest, "sm_90": digest}}),
        "list": b'{"indexes": []}',
        "letters": b'{"indexes": {"sm_120a": "' + digest.encode() + b'"}}',
        "deep": b'{"indexes":' + b"[" * 4000,
    }


def seeds() -> dict[str, dict[str, bytes]]:
    """{target: {name: bytes}}"""
    return {"index": indexes(), "frame": frames(), "elf": elves(), "channel": channels()}


def main() -> None:
    for target, found in seeds().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            (CORPUS / target / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
