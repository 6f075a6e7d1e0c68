"""Races between the actors of a block through shared memory, and the order of its additions to global memory: vector
clocks that join at barriers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.formats import Array
from tests.ptx.parser import PtxError


class RaceTracker:
    """Every access must lie behind a barrier from each earlier access of another actor, unless both are reads.

    Actors are warps or, in blocks of one warp, threads: only there do `bar.warp.sync` and a dropped one make a
    difference. Positions are bytes in the shared memory of all blocks of the wave, laid end to end; actors are numbered
    through the wave. Each counts time by the barriers it passed; `clock[w, v]` is how much actor w has seen of actor v
    of its block, and each granule of memory remembers its last writer and when each actor last read it.

    Two shortcuts make this nearly free where every actor meets at every barrier. Accesses are first only logged, and
    a barrier of the whole block throws its log away, for they are ordered before all that follows. And nothing is
    looked up while neither log nor tables hold anything that was recorded since that barrier.
    """

    def __init__(self, blocks: int, actors: int, block_bytes: int, granule: int, kind: str):
        """actors: of a block; granule: bytes of the smallest access; block_bytes: a multiple of it; kind: of actors."""
        self.blocks, self.actors, self.granule, self.kind = blocks, actors, granule, kind
        self.block_bytes = block_bytes
        granules = blocks * block_bytes // granule
        self.writer = np.zeros(granules, np.int16)  # number of the last writing actor in its block
        self.written_at = np.zeros(granules, np.int32)
        self.read_at = np.zeros((granules, actors), np.int32)
        self.used = False  # whether the tables hold anything
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new wave begins."""
        self.clock = np.tile(np.eye(self.actors, dtype=np.int32), (self.blocks, 1))
        if self.used:
            self.written_at.fill(0)
            self.read_at.fill(0)
        self.used = False
        self.reads: list[tuple[Array, int, Array]] = []
        self.writes: list[tuple[Array, int, Array]] = []
        self.logged = np.zeros(self.blocks, bool)  # blocks with an access in the logs
        self.tabled = np.zeros(self.blocks, bool)  # blocks with an access in the tables since their last barrier
        self.clean = True  # neither

    def read(self, position: Array, size: int, actor: Array) -> None:
        """Lanes read `size` bytes from `position` on; `actor` is each lane's. Raises PtxError on a race."""
        self._flush(self.writes, self._record_writes)
        if not self.clean:
            self._check(position, size, actor, write=False)
        self.reads.append((position, size, actor))
        self.logged[actor // self.actors] = True

    def write(self, position: Array, size: int, actor: Array) -> None:
        """As `read`, for writes."""
        self.copy_starts(position, size, actor)
        self._log_write(position, size, actor)

    def copy_starts(self, position: Array, size: int, actor: Array) -> None:
        """An asynchronous copy may land from now on: its destination must be free."""
        self._flush(self.writes, self._record_writes)
        self._flush(self.reads, self._record_reads)
        if not self.clean:
            self._check(position, size, actor, write=True)

    def copy_lands(self, position: Array, size: int, actor: Array) -> None:
        """A copy has been waited for. Who read its destination since it started has got NaN and is not told again."""
        self._flush(self.writes, self._record_writes)
        if not self.clean:
            self._check(position, size, actor, write=False)
        self._log_write(position, size, actor)

    def _log_write(self, position: Array, size: int, actor: Array) -> None:
        self.writes.append((position, size, actor))
        self.logged[actor // self.actors] = True

    def barrier(self, met: Sequence[tuple[int, Array]]) -> None:
        """Actors met at barriers: (block, the numbers of those of its that did)."""
        whole = [block for block, actors in met if len(actors) == self.actors]
        self.logged[whole] = False
        if self.logged.any():
            self._flush(self.writes, self._record_writes)
            self._flush(self.reads, self._record_reads)
            self.logged[:] = False
        self.writes.clear()
        self.reads.clear()
        for block, actors in met:
            clock = self.clock[block * self.actors :][: self.actors]
            clock[actors] = clock[actors].max(0)
            clock[actors, actors] += 1
        self.tabled[whole] = False
        self.clean = not self.tabled.any()

    def _flush(self, log, record) -> None:
        # No clock has moved since the accesses were logged: `barrier` flushes or drops the logs first.
        for position, size, actor in log:
            record(*self._granules(position, size, actor))
            self.tabled[actor // self.actors] = True
            self.clean, self.used = False, True
        log.clear()

    def _record_writes(self, granule: Array, actor: Array) -> None:
        own = actor % self.actors
        self.writer[granule], self.written_at[granule] = own, self.clock[actor, own]

    def _record_reads(self, granule: Array, actor: Array) -> None:
        own = actor % self.actors
        self.read_at[granule, own] = self.clock[actor, own]

    def _granules(self, position: Array, size: int, actor: Array) -> tuple[Array, Array]:
        per = max(size // self.granule, 1)
        granule = (position // self.granule)[:, None] + np.arange(per)
        return granule.reshape(-1), np.repeat(actor, per)

    def _check(self, position: Array, size: int, actor: Array, write: bool) -> None:
        """Earlier writes must be ordered before this access; if it is a write, earlier reads too."""
        needed = self.tabled[actor // self.actors]
        if not needed.any():
            return
        granule, actor = self._granules(position[needed], size, actor[needed])
        ordered = self.clock[actor, self.writer[granule]] >= self.written_at[granule]
        if write:
            ordered &= (self.clock[actor] >= self.read_at[granule]).all(1)
        if ordered.all():
            return
        j = int(np.argmin(ordered))
        readers = np.flatnonzero(self.clock[actor[j]] < self.read_at[granule[j]])
        by_read = write and len(readers) > 0
        other = f"read by {self.kind} {readers[0]}" if by_read else f"written by {self.kind} {self.writer[granule[j]]}"
        raise PtxError(
            f"race: block {actor[j] // self.actors} of the wave, {self.kind} {actor[j] % self.actors} "
            f"{'writes' if write else 'reads'} shared byte {granule[j] * self.granule % self.block_bytes}, "
            f"{other}, with no barrier between"
        )


class Turns:
    """Additions of floats to global memory whose order is to be that of the blocks.

    A block acquires its turn, adds, and releases it: what any of its actors adds must lie behind a barrier from every
    acquiring load of another, and before one from every releasing atomic. Blocks that do neither may add at any time.
    """

    def __init__(self, tracker: RaceTracker, actor: Array):
        """actor: each lane's, as `tracker` counts them."""
        self.tracker, self.actor = tracker, actor
        self.reset()

    def reset(self) -> None:
        """A new wave begins."""
        shape = (self.tracker.blocks, self.tracker.actors)
        self.acquired, self.added = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def acquire(self, lanes: slice | Array) -> None:
        self._note(self.acquired, lanes)

    def add(self, lanes: slice | Array) -> None:
        self._note(self.added, lanes)
        self._check(self.acquired, lanes, "adds to global memory", "acquired its turn")

    def release(self, lanes: slice | Array) -> None:
        self._check(self.added, lanes, "releases its turn", "added to global memory")

    def _note(self, times: Array, lanes: slice | Array) -> None:
        actor = self.actor[lanes]
        times.reshape(-1)[actor] = self.tracker.clock[actor, actor % self.tracker.actors]

    def _check(self, times: Array, lanes: slice | Array, what: str, other: str) -> None:
        actor = np.unique(self.actor[lanes])
        late = self.tracker.clock[actor] < times[actor // self.tracker.actors]
        if late.any():
            j, by = np.argwhere(late)[0]
            kind, own = self.tracker.kind, actor[j] % self.tracker.actors
            raise PtxError(f"out of turn: {kind} {own} {what}, {kind} {by} {other}, with no barrier between")
