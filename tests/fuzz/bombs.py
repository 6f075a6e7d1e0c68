"""zstd bombs of every kind, and what refusing each of them costs.

    python -m tests.fuzz.bombs

Prints {name: [reason, MiB]}: each is given to the runtime in a process of its own, whose growth at most is measured.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator

from registry.contract import MAX_CONTENT, CubineryError, sha256_hex
from registry.frames import compress, unpack
from tests.fuzz.seeds import ARTIFACT, CONTENT, MAGIC, rle, single, skippable, windowed

SIZE = len(CONTENT)
HUGE = 1 << 30  # bytes that a bomb would unpack to
LONG = 100_000
WHOLE = compress(CONTENT)


def bombs() -> Iterator[tuple[str, bytes, int]]:
    """(name, frame, the size that the artifact's row states). The row's hashes always fit."""
    yield "declared", single(HUGE, rle(HUGE)), SIZE
    yield "declared with a window", windowed(20, rle(HUGE), HUGE), SIZE
    yield "declared as less than it holds", single(SIZE, rle(HUGE)), SIZE
    yield "declared as less, with a window", windowed(10, rle(HUGE), SIZE), SIZE
    yield "declared as 2**63", single(2**63, rle(HUGE)), 2**63
    yield "declared as the row says, too much", single(HUGE, rle(HUGE)), HUGE
    yield "declared as the row says, and cut off", single(MAX_CONTENT, rle(MAX_CONTENT)[:-4]), MAX_CONTENT
    yield "declared as the row says, and empty", single(MAX_CONTENT, b""), MAX_CONTENT
    yield "declared as the row says, holds more", windowed(23, rle(HUGE), MAX_CONTENT), MAX_CONTENT
    yield "undeclared", windowed(20, rle(HUGE)), SIZE
    yield "undeclared, of the right size", windowed(20, rle(SIZE)), SIZE
    yield "several frames", single(1 << 20, rle(1 << 20)) * 1024, 1 << 20
    yield "several frames that add up", compress(CONTENT[:100]) + compress(CONTENT[100:]), SIZE
    yield "many empty frames", compress(b"") * 100_000 + WHOLE, SIZE
    yield "a bomb behind the frame", WHOLE + single(HUGE, rle(HUGE)), SIZE
    yield "trailing bytes", WHOLE + bytes(32 << 20), SIZE
    yield "skippable before", skippable(4, b"skip") + WHOLE, SIZE
    yield "skippable before a bomb", skippable(4, b"skip") + single(HUGE, rle(HUGE)), SIZE
    yield "skippable behind", WHOLE + skippable(4, b"skip"), SIZE
    yield "skippable of 4 GiB", skippable(2**32 - 1), SIZE
    yield "skippable alone", skippable(32 << 20, bytes(32 << 20)), SIZE
    for log in (24, 27, 31, 41):  # of 100 kB, since what fits one buffer needs no window
        yield f"a window of 2**{log}", windowed(log, rle(LONG), LONG), LONG
        yield f"a window of 2**{log}, the most content", windowed(log, rle(MAX_CONTENT), MAX_CONTENT), MAX_CONTENT
        yield f"a window of 2**{log}, undeclared", windowed(log, rle(LONG)), LONG
    yield "one segment of the most content", single(MAX_CONTENT, rle(MAX_CONTENT)), MAX_CONTENT
    yield "a dictionary", MAGIC + b"\xe3" + b"\1\0\0\0" + SIZE.to_bytes(8, "little") + rle(SIZE), SIZE
    for generation in range(1, 8):
        yield f"format 0.{generation}", bytes([0x20 + generation]) + WHOLE[1:], SIZE


def cost(frame: bytes, size: int) -> tuple[str, float]:
    """(reason, MiB by which a process grows that is given the frame)."""
    sums = {"frame_sha256": sha256_hex(frame), "cubin_sha256": sha256_hex(b"")}
    artifact = ARTIFACT.replace(frame_size=len(frame), cubin_size=size, **sums)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            unpack(frame, artifact)
            reason = "loaded"
        except CubineryError as error:
            reason = error.reason
        except BaseException as error:
            reason = repr(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(theirs, json.dumps([reason, round(grown / 1024, 1)]).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    reason, grown = json.loads(text or '["died", 0]')
    return reason, grown


if __name__ == "__main__":
    json.dump({name: cost(frame, size) for name, frame, size in bombs()}, sys.stdout)
