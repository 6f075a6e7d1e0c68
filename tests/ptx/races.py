"""Races between the warps of a block through shared memory: vector clocks that join at barriers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.formats import Array
from tests.ptx.parser import PtxError


class RaceTracker:
    """Every access must lie behind a barrier from each earlier access of another warp, unless both are reads.

    Positions are bytes in the shared memory of all blocks of the wave, laid end to end; warps are numbered through
    the wave. Each warp counts time by the barriers it passed; `clock[w, v]` is how much warp w has seen of warp v of
    its block, and each granule of memory remembers its last writer and when each warp last read it.

    Two shortcuts make this nearly free where every warp meets at every barrier. Accesses are first only logged, and
    a barrier of the whole block throws its log away, for they are ordered before all that follows. And nothing is
    looked up while neither log nor tables hold anything that was recorded since that barrier.
    """

    def __init__(self, blocks: int, warps: int, block_bytes: int, granule: int):
        """granule: bytes of the smallest access; block_bytes: a multiple of it."""
        self.blocks, self.warps, self.granule = blocks, warps, granule
        self.block_bytes = block_bytes
        granules = blocks * block_bytes // granule
        self.writer = np.zeros(granules, np.int16)  # number of the last writing warp in its block
        self.written_at = np.zeros(granules, np.int32)
        self.read_at = np.zeros((granules, warps), np.int32)
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new wave begins."""
        self.clock = np.tile(np.eye(self.warps, dtype=np.int32), (self.blocks, 1))
        self.written_at.fill(0)
        self.read_at.fill(0)
        self.reads: list[tuple[Array, int, Array]] = []
        self.writes: list[tuple[Array, int, Array]] = []
        self.logged = np.zeros(self.blocks, bool)  # blocks with an access in the logs
        self.tabled = np.zeros(self.blocks, bool)  # blocks with an access in the tables since their last barrier
        self.clean = True  # neither

    def read(self, position: Array, size: int, warp: Array) -> None:
        """Lanes read `size` bytes from `position` on; `warp` is each lane's. Raises PtxError on a race."""
        self._flush(self.writes, self._record_writes)
        if not self.clean:
            self._check(position, size, warp, write=False)
        self.reads.append((position, size, warp))
        self.logged[warp // self.warps] = True

    def write(self, position: Array, size: int, warp: Array) -> None:
        """As `read`, for writes."""
        self.copy_starts(position, size, warp)
        self._log_write(position, size, warp)

    def copy_starts(self, position: Array, size: int, warp: Array) -> None:
        """An asynchronous copy may land from now on: its destination must be free."""
        self._flush(self.writes, self._record_writes)
        self._flush(self.reads, self._record_reads)
        if not self.clean:
            self._check(position, size, warp, write=True)

    def copy_lands(self, position: Array, size: int, warp: Array) -> None:
        """A copy has been waited for. Who read its destination since it started has got NaN and is not told again."""
        self._flush(self.writes, self._record_writes)
        if not self.clean:
            self._check(position, size, warp, write=False)
        self._log_write(position, size, warp)

    def _log_write(self, position: Array, size: int, warp: Array) -> None:
        self.writes.append((position, size, warp))
        self.logged[warp // self.warps] = True

    def barrier(self, met: Sequence[tuple[int, Array]]) -> None:
        """Warps met at barriers: (block, the numbers of its warps that did)."""
        whole = [block for block, warps in met if len(warps) == self.warps]
        self.logged[whole] = False
        if self.logged.any():
            self._flush(self.writes, self._record_writes)
            self._flush(self.reads, self._record_reads)
            self.logged[:] = False
        self.writes.clear()
        self.reads.clear()
        for block, warps in met:
            clock = self.clock[block * self.warps :][: self.warps]
            clock[warps] = clock[warps].max(0)
            clock[warps, warps] += 1
        self.tabled[whole] = False
        self.clean = not self.tabled.any()

    def _flush(self, log, record) -> None:
        # No clock has moved since the accesses were logged: `barrier` flushes or drops the logs first.
        for position, size, warp in log:
            record(*self._granules(position, size, warp))
            self.tabled[warp // self.warps] = True
            self.clean = False
        log.clear()

    def _record_writes(self, granule: Array, warp: Array) -> None:
        own = warp % self.warps
        self.writer[granule], self.written_at[granule] = own, self.clock[warp, own]

    def _record_reads(self, granule: Array, warp: Array) -> None:
        own = warp % self.warps
        self.read_at[granule, own] = self.clock[warp, own]

    def _granules(self, position: Array, size: int, warp: Array) -> tuple[Array, Array]:
        per = max(size // self.granule, 1)
        granule = (position // self.granule)[:, None] + np.arange(per)
        return granule.reshape(-1), np.repeat(warp, per)

    def _check(self, position: Array, size: int, warp: Array, write: bool) -> None:
        """Earlier writes must be ordered before this access; if it is a write, earlier reads too."""
        needed = self.tabled[warp // self.warps]
        if not needed.any():
            return
        granule, warp = self._granules(position[needed], size, warp[needed])
        ordered = self.clock[warp, self.writer[granule]] >= self.written_at[granule]
        if write:
            ordered &= (self.clock[warp] >= self.read_at[granule]).all(1)
        if ordered.all():
            return
        j = int(np.argmin(ordered))
        readers = np.flatnonzero(self.clock[warp[j]] < self.read_at[granule[j]])
        by_read = write and len(readers) > 0
        other = f"read by warp {readers[0]}" if by_read else f"written by warp {self.writer[granule[j]]}"
        raise PtxError(
            f"race: block {warp[j] // self.warps} of the wave, warp {warp[j] % self.warps} "
            f"{'writes' if write else 'reads'} shared byte {granule[j] * self.granule % self.block_bytes}, "
            f"{other}, with no barrier between"
        )
