"""registry.frames: deterministic to write; no bytes make the reader exceed the size that it was told."""

from __future__ import annotations

import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.store import StoreError, compress, decompress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@given(st.binary(max_size=2000))
def test_round_trip(content):
    frame = compress(content)
    assert decompress(frame, len(content)) == content
    assert compress(content) == frame
    assert zstd.get_frame_info(frame).decompressed_size == len(content)
    assert zstd.get_frame_size(frame) == len(frame)


@given(st.binary(min_size=1, max_size=300), st.data())
def test_damaged_frames_are_refused_or_decode_to_the_stated_size(content, data):
    frame = bytearray(compress(content))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert len(decompress(bytes(frame), len(content))) == len(content)  # a hash must tell such a change
    except StoreError as error:
        assert error.reason == "integrity"


def _undeclared(content: bytes) -> bytes:
    return zstd.compress(content, options={zstd.CompressionParameter.content_size_flag: 0})


CONTENT = bytes(range(256)) * 40


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"not zstd",
        compress(CONTENT)[:-1],
        compress(CONTENT)[:9],
        compress(CONTENT) + b"\0",
        compress(CONTENT) + compress(b"more"),
        compress(CONTENT[:100]) + compress(CONTENT[100:]),
        compress(CONTENT[:-1]),
        compress(CONTENT + b"x"),
        _undeclared(CONTENT),
    ],
    ids=["empty", "garbage", "cut", "header", "trailing", "another", "several", "short", "long", "undeclared"],
)
def test_anything_but_one_frame_of_the_stated_size_is_refused(frame):
    with pytest.raises(StoreError) as caught:
        decompress(frame, len(CONTENT))
    assert caught.value.reason == "integrity"


@pytest.mark.parametrize("make", [compress, _undeclared], ids=["declared", "undeclared"])
def test_a_bomb_is_refused_before_it_grows(make):
    bomb = make(bytes(64 << 20))
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            decompress(bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_window_larger_than_the_content_is_refused():
    """A frame header may ask for 128 MB of window, which zstd grants by default, whatever the frame holds."""
    content = b"x" * 100_000
    frame = bytes.fromhex("28b52ffd") + bytes([0b1000_0000, (27 - 10) << 3]) + len(content).to_bytes(4, "little")
    frame += ((len(content) << 3) | (1 << 1) | 1).to_bytes(3, "little") + b"x"  # a last block: one byte, repeated
    assert zstd.decompress(frame) == content
    with pytest.raises(StoreError, match="memory") as caught:
        decompress(frame, len(content))
    assert caught.value.reason == "integrity"
    assert decompress(compress(content), len(content)) == content
