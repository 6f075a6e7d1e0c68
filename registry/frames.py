"""Content <-> one zstd frame: deterministic to write, bounded to read."""

from __future__ import annotations

import sys

from registry.errors import StoreError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_VERSION: str = zstd.zstd_version  # shapes the frames: another one may compress otherwise

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
    """The `size` bytes that a frame of `compress` holds; never allocates more than about that.

    Check the frame's hash first. Raises StoreError ('integrity') unless `frame` is exactly one frame that declares
    and holds `size` bytes.
    """
    try:
        declared = zstd.get_frame_info(frame).decompressed_size
        if declared != size:
            raise StoreError(f"zstd frame declares {declared} bytes, expected {size}", reason="integrity")
        # A frame of known size never needs a window larger than its content; 10 is the smallest that zstd takes.
        window: dict[int, int] = {zstd.DecompressionParameter.window_log_max: min(31, max(10, size.bit_length()))}
        decoder = zstd.ZstdDecompressor(options=window)
        content = decoder.decompress(frame, max_length=size + 1)
    except zstd.ZstdError as error:
        raise StoreError(f"not a zstd frame of {size} bytes: {error}", reason="integrity") from None
    if len(content) != size or not decoder.eof:
        raise StoreError(f"zstd frame is cut short: {len(content)} of {size} bytes", reason="integrity")
    if decoder.unused_data:
        raise StoreError(f"{len(decoder.unused_data)} bytes follow the zstd frame", reason="integrity")
    return content
