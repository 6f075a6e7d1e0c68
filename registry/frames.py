"""Content <-> one zstd frame: deterministic to write, bounded to read. And from a frame to the cubin that an artifact
names, trusting nothing but the artifact."""

from __future__ import annotations

import hashlib
import io
import struct
import sys

from registry.contract.artifact import Artifact
from registry.contract.errors import ContractError, IntegrityError
from registry.contract.storage import MAX_CONTENT
from registry.errors import StoreError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_VERSION: str = zstd.zstd_version  # shapes the frames: another one may compress otherwise

ELF_MACHINE_CUDA = 190
ELF_HEADER = 64  # bytes of a 64-bit ELF header
PIECE = 1 << 20  # bytes read and written at a time
WINDOW_LOG = 23  # of the largest window that `compress` uses, in bytes

# Level 19 takes 50 ms for 200 KB and is a fifth smaller than level 12; reading costs the same at every level.
_COMPRESS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 19,
    zstd.CompressionParameter.content_size_flag: 1,
    zstd.CompressionParameter.checksum_flag: 0,  # frames are addressed by SHA-256
}


def compress(content: bytes) -> bytes:
    """One zstd frame that declares its content's size. Equal content gives equal bytes with the same zstd version."""
    return zstd.compress(content, options=_COMPRESS)


def declared_size(frame: bytes) -> int:
    """Bytes of content that a frame declares. StoreError ('integrity') if it is no frame or declares none."""
    try:
        size = zstd.get_frame_info(frame).decompressed_size
    except zstd.ZstdError as error:
        raise StoreError(f"not a zstd frame: {error}", reason="integrity") from None
    if size is None:
        raise StoreError("a zstd frame that does not declare its content's size", reason="integrity")
    return int(size)


def decompress(frame: bytes, size: int) -> bytes:
    """The `size` bytes that a frame of `compress` holds; allocates no more than that and 16 MiB, whatever it is given.

    Check the frame's hash first. Raises StoreError ('integrity') unless `frame` is exactly one frame that declares
    and holds `size` bytes, at most MAX_CONTENT.
    """
    if not 0 <= size <= MAX_CONTENT:
        raise StoreError(f"a zstd frame of {size} bytes; at most {MAX_CONTENT} are read", reason="integrity")
    if declared_size(frame) != size:
        raise StoreError(f"zstd frame declares {declared_size(frame)} bytes, expected {size}", reason="integrity")
    try:
        content, end = _decode(frame, size)
    except zstd.ZstdError as error:
        raise StoreError(f"not a zstd frame of {size} bytes: {error}", reason="integrity") from None
    if len(content) != size or end is None:
        raise StoreError(f"zstd frame is cut short: {len(content)} of {size} bytes", reason="integrity")
    if end < len(frame):
        raise StoreError(f"{len(frame) - end} bytes follow the zstd frame", reason="integrity")
    return content


def _decode(frame: bytes, size: int) -> tuple[bytes, int | None]:
    """(at most size + 1 bytes, where the frame ends or None), piece by piece: zstd's own buffers would double them."""
    # A frame of known size never needs a window larger than its content; 10 is the smallest that zstd takes.
    window: dict[int, int] = {zstd.DecompressionParameter.window_log_max: min(WINDOW_LOG, max(10, size.bit_length()))}
    decoder, buffer, at = zstd.ZstdDecompressor(options=window), io.BytesIO(bytes(size)), 0
    with memoryview(frame) as view:
        while not decoder.eof and buffer.tell() <= size:
            fed = view[at : at + PIECE] if decoder.needs_input else b""
            if decoder.needs_input and not fed:
                break
            at += len(fed)
            buffer.write(decoder.decompress(fed, max_length=min(PIECE, size + 1 - buffer.tell())))
    buffer.truncate()
    return buffer.getvalue(), at - len(decoder.unused_data) if decoder.eof else None


def unpack(frame: bytes, artifact: Artifact) -> bytes:
    """The cubin in `frame`: the very buffer that is to be loaded. Raises IntegrityError at the first thing wrong.

    The frame's size and hash are checked before it is decoded, decoding is bounded by the cubin's size, then follow
    the cubin's size and hash and its ELF header.
    """
    named = f"{artifact.variant} ({artifact.arch})"
    _check(frame, artifact.frame_size, artifact.frame_sha256, f"{named}: zstd frame")
    try:
        content = decompress(frame, artifact.cubin_size)
    except StoreError as error:
        raise IntegrityError(f"{artifact.variant}: {error}", reason="zstd") from None
    _check(content, artifact.cubin_size, artifact.cubin_sha256, f"{named}: cubin")
    found = elf_arch(content)
    if found != artifact.arch:
        raise IntegrityError(f"{artifact.variant}: the cubin is for {found}, not for {artifact.arch}", reason="arch")
    return content


def _check(data: bytes, size: int, digest: str, what: str) -> None:
    if len(data) != size:
        raise IntegrityError(f"{what}: {len(data)} bytes instead of {size}", reason="size")
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise IntegrityError(f"{what}: SHA-256 {found[:12]}… instead of {digest[:12]}…", reason="sha256")


def elf_arch(content: bytes) -> str:
    """The architecture in a cubin's ELF header, e.g. 'sm_120'. Raises IntegrityError for what is no cubin."""
    try:
        machine, arch = elf_machine(content)
    except ContractError as error:
        raise IntegrityError(f"the cubin: {error}", reason="elf") from None
    if machine != ELF_MACHINE_CUDA:
        raise IntegrityError(f"the cubin's ELF machine is {machine}, not {ELF_MACHINE_CUDA} (CUDA)", reason="elf")
    return arch


def elf_machine(content: bytes) -> tuple[int, str]:
    """(e_machine, architecture) that an ELF file's header states: (190, 'sm_120') for a cubin.

    The architecture means nothing for another machine. ContractError for what is no 64-bit little-endian ELF file, or
    a cubin whose ABI version is not 7 or 8: where its flags hold the architecture depends on that.
    """
    header = content[:ELF_HEADER]
    if len(header) < ELF_HEADER or header[:6] != b"\x7fELF\x02\x01":
        raise ContractError(f"no 64-bit little-endian ELF file: it starts with {header[:6]!r}")
    machine, flags = struct.unpack_from("<18xH28xI", header)
    abi_version = header[8]
    if machine == ELF_MACHINE_CUDA and abi_version not in (7, 8):
        raise ContractError(f"the cubin's ELF ABI version is {abi_version}, this code reads 7 and 8")
    return machine, f"sm_{flags >> 8 & 0xFF if abi_version == 8 else flags & 0xFF}"
