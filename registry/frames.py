"""Content <-> one zstd frame: deterministic to write, bounded to read."""

from __future__ import annotations

import io
import sys

from registry.contract import MAX_CONTENT
from registry.errors import StoreError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_VERSION: str = zstd.zstd_version  # shapes the frames: another one may compress otherwise

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
