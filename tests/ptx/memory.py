"""Global and shared memory. Every access is checked; what was never written reads as 0xFF bytes, which are NaN."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from tests.ptx.formats import UNSIGNED, WORDS, Array
from tests.ptx.parser import PtxError
from tests.ptx.races import RaceTracker

GAP = 1 << 20  # bytes between allocations, so that a stray access hits none
SHARED_BASE = 1 << 10  # shared addresses start here, so that a null one is caught

Lanes = slice | Array  # the lanes of an access: all of them, or their numbers


class Allocation:
    """One piece of global memory. `written`: 0xFF for every byte that may be loaded; None: all may."""

    def __init__(self, base: int, data: Array, written: Array | None):
        self.base, self.nbytes = base, len(data)
        self.data = _padded(data)
        self.written = None if written is None else _padded(written)
        self.storer: Array | None = None  # 1 + the launch-wide warp that stored each byte last, 0: none

    def words(self, size: int) -> Array:
        return self.data.view(WORDS[size])

    def check_written(self, word: Array, size: int, what: str) -> None:
        """Raise PtxError unless every byte of these words was written."""
        if self.written is None:
            return
        part = min(size, 8)
        missing = (self.written.view(UNSIGNED[part]).reshape(-1, size // part)[word] != 2 ** (8 * part) - 1).any(1)
        if missing.any():
            raise PtxError(f"{what}: reads global memory that was never written", int(np.argmax(missing)))

    def mark_written(self, word: Array, size: int) -> None:
        if self.written is not None:
            self.written.reshape(-1, size)[word] = 0xFF


class Device:
    """Global memory: separate allocations with guard gaps between them."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.bases: list[int] = []
        self._next = 0x7F0000000000
        self.waits = 0  # loads of what other blocks change, since the last store or atomic

    @property
    def next(self) -> int:
        """The first free address: that of the next allocation, unless it asks for a later one."""
        return self._next

    def put(self, array: Array, defined: Array | None = None, at: int | None = None) -> int:
        """The address of a copy of `array`, `at` where one is asked for.

        defined: a boolean for each element; loading one that is False is a fault.
        """
        data = np.ascontiguousarray(array)
        written = None if defined is None else np.repeat(defined.reshape(-1), data.itemsize).astype(np.uint8) * 0xFF
        return self._add(data.reshape(-1).view(np.uint8).copy(), written, at)

    def empty(self, nbytes: int) -> int:
        """The address of new memory. Loading a byte of it that no kernel stored is a fault; `get` sees 0xFF."""
        return self._add(np.full(nbytes, 0xFF, np.uint8), np.zeros(nbytes, np.uint8))

    def get(self, address: int, dtype=np.uint8) -> Array:
        """The contents of the allocation that `put` or `empty` returned."""
        allocation = self.allocations[self.bases.index(address)]
        return allocation.data[: allocation.nbytes].view(dtype)

    def launch(self) -> None:
        """A new kernel starts: what earlier ones stored is ordered before it."""
        self.waits = 0
        for allocation in self.allocations:
            allocation.storer = None

    def load(self, address: Array, size: int, what: str) -> Array:
        """One `size`-byte word for each address."""
        found = np.empty(len(address), WORDS[size])
        for allocation, lanes, offset in self.find(address, size, what):
            allocation.check_written(offset // size, size, what)
            found[lanes] = allocation.words(size)[offset // size]
        return found

    def store(self, address: Array, words: Array, warp: Array) -> None:
        """One word to each address; `warp`: each lane's warp, numbered through the launch."""
        size, self.waits = words.itemsize, 0
        for allocation, lanes, offset in self.find(address, size, "global store"):
            place, new = allocation.words(size), words[lanes]
            self._check_storers(allocation, offset, new, warp[lanes])
            place[offset // size] = new
            if _differ(place[offset // size], new).any():
                raise PtxError("race: threads of one store write different values to one global address")
            allocation.mark_written(offset // size, size)

    def find(self, address: Array, size: int, what: str) -> Iterator[tuple[Allocation, Lanes, Array]]:
        """(allocation, lanes, byte offsets) of each allocation that the addresses touch."""
        if not len(address):
            return
        if (bad := address & np.uint64(size - 1)).any():
            raise PtxError(f"misaligned {size}-byte {what}", int(np.argmax(bad)))
        first = bisect_right(self.bases, int(address.min())) - 1
        inside = self.allocations[first]
        if first >= 0 and int(address.max()) + size <= inside.base + inside.nbytes:
            yield inside, slice(None), (address - np.uint64(inside.base)).astype(np.int64)
            return
        number = np.searchsorted(np.array(self.bases, np.uint64), address, side="right") - 1
        for i in np.unique(number):
            lanes = np.flatnonzero(number == i)
            part = self.allocations[i]
            offset = (address[lanes] - np.uint64(part.base)).astype(np.int64)
            stray = offset + size > part.nbytes if i >= 0 else np.ones(len(lanes), bool)
            if stray.any():
                lane = int(lanes[np.argmax(stray)])
                raise PtxError(f"{what}: address {int(address[lane]):#x} outside every allocation", lane)
            yield part, lanes, offset

    def _add(self, data: Array, written: Array | None, at: int | None = None) -> int:
        base = self._next if at is None else at
        if base < self._next or base % 16:
            raise ValueError(f"no allocation at {base:#x}: the next free address is {self._next:#x}")
        self._next = (base + len(data) + GAP) // 4096 * 4096 + 4096
        self.allocations.append(Allocation(base, data, written))
        self.bases.append(base)
        return base

    def _check_storers(self, allocation: Allocation, offset: Array, new: Array, warp: Array) -> None:
        # Blocks are never ordered, and the warps of a block here only by its barriers, which this does not follow:
        # so two warps that store different values to one address are taken to race.
        if allocation.storer is None:
            allocation.storer = np.zeros(len(allocation.data), np.int32)
        every = _bytes(offset, new.itemsize)
        before, me = allocation.storer[every], (warp + 1).astype(np.int32)[:, None]
        clash = ((before != 0) & (before != me)).any(1)
        if clash.any():
            clash &= _differ(allocation.words(new.itemsize)[offset // new.itemsize], new)
            if clash.any():
                lane = int(np.argmax(clash))
                raise PtxError(
                    f"race: warps {before[lane].max() - 1} and {me[lane, 0] - 1} of the launch store different values "
                    f"at {allocation.base + int(offset[lane]):#x}"
                )
        allocation.storer[every] = me


class SharedMemory:
    """The shared memory of all blocks of a wave, end to end, with its copies in flight.

    An address is SHARED_BASE + offset in the block's memory; a position is a byte in the array of all blocks.
    """

    def __init__(self, blocks: int, threads: int, nbytes: int, tracker: RaceTracker | None):
        self.nbytes, self.tracker = nbytes, tracker
        self.stride = -(-nbytes // 16) * 16
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.words = {size: self.data.view(kind) for size, kind in WORDS.items()}
        lane = np.arange(blocks * threads)
        self.actor = lane if threads == 32 else lane // 32  # as `RaceTracker` counts them
        self.start = lane // threads * self.stride - SHARED_BASE
        self.committed = np.zeros(blocks * threads, np.int64)  # groups that each lane has committed
        self.pending: list[tuple[Array, Array, Array, Array]] = []
        self.in_flight = np.zeros(len(self.data) // 4, bool)  # 4-byte words that a pending copy will fill

    def reset(self) -> None:
        self.data.fill(0xFF)
        self.committed.fill(0)
        self.pending.clear()
        self.in_flight.fill(False)
        if self.tracker:
            self.tracker.reset()

    def position(self, address: Array, lanes: Lanes, size: int) -> Array:
        """Positions of the lanes' addresses. Raises PtxError outside the block's memory or off alignment."""
        place = address.astype(np.int64)
        if len(place) and (place.min() < SHARED_BASE or place.max() + size > SHARED_BASE + self.nbytes):
            bad = (place < SHARED_BASE) | (place + size > SHARED_BASE + self.nbytes)
            offset = int(place[np.argmax(bad)]) - SHARED_BASE
            raise PtxError(f"{size}-byte access at shared byte {offset}, outside 0..{self.nbytes}", int(np.argmax(bad)))
        if np.bitwise_or.reduce(place) & (size - 1):
            raise PtxError(f"misaligned {size}-byte shared access", int(np.argmax(place & (size - 1) != 0)))
        return place + self.start[lanes]

    def load(self, address: Array, lanes: Lanes, size: int) -> Array:
        place = self.position(address, lanes, size)
        if self.tracker:
            self.tracker.read(place, size, self.actor[lanes])
        return self.words[size][place // size]

    def store(self, address: Array, lanes: Lanes, words: Array) -> None:
        place = self.position(address, lanes, words.itemsize)
        if self.tracker:
            self.tracker.write(place, words.itemsize, self.actor[lanes])
        if self.pending and (busy := self.in_flight[_fours(place, words.itemsize)].any(1)).any():
            raise PtxError("store to shared memory that an asynchronous copy is still to fill", int(np.argmax(busy)))
        self.words[words.itemsize][place // words.itemsize] = words

    def copy_async(self, address: Array, lanes: Lanes, words: Array) -> None:
        """Start a copy: until its group is waited for, its destination reads as NaN."""
        size = words.itemsize
        place = self.position(address, lanes, size)
        if self.tracker:
            self.tracker.copy_starts(place, size, self.actor[lanes])
        fours = _fours(place, size)
        if self.pending and (busy := self.in_flight[fours].any(1)).any():
            raise PtxError("two asynchronous copies fill the same shared memory", int(np.argmax(busy)))
        self.in_flight[fours] = True
        self.words[1].reshape(-1, size)[place // size] = 0xFF
        self.pending.append((np.arange(len(self.actor))[lanes], place, words, self.committed[lanes].copy()))

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Lanes, keep: int, commit: bool = False) -> None:
        """Land the copies of these lanes, but for their `keep` newest groups. commit: first make the latest a group."""
        if commit:
            self.commit(lanes)
        limit = np.full(len(self.committed), -1)
        limit[lanes] = self.committed[lanes] - keep
        pending, self.pending = self.pending, []
        landing: dict[int, list[tuple[Array, Array, Array]]] = {}
        for lane, place, words, group in pending:
            done = group < limit[lane]
            if done.all():
                landing.setdefault(words.itemsize, []).append((lane, place, words))
                continue
            if done.any():
                landing.setdefault(words.itemsize, []).append((lane[done], place[done], words[done]))
            self.pending.append((lane[~done], place[~done], words[~done], group[~done]))
        for size, copies in landing.items():
            lane, place, words = (np.concatenate(column) for column in zip(*copies, strict=True))
            if self.tracker:
                self.tracker.copy_lands(place, size, self.actor[lane])
            self.words[size][place // size] = words
            self.in_flight[_fours(place, size)] = False


def _padded(data: Array) -> Array:
    """`data` with zeros up to a multiple of 16 bytes, so that it can be viewed as words of any size."""
    return np.concatenate([data, np.zeros(-len(data) % 16, np.uint8)])


def _bytes(offset: Array, size: int) -> Array:
    """The index of every byte of the words at these offsets, shape (words, size)."""
    return offset[:, None] + np.arange(size)


def _fours(place: Array, size: int) -> Array:
    """The index of every 4-byte word that an access touches, shape (accesses, words)."""
    return (place[:, None] + np.arange(0, size, 4)) // 4


def _differ(a: Array, b: Array) -> Array:
    """Which words differ in their bits."""
    return (a.view(np.uint8).reshape(len(a), -1) != b.view(np.uint8).reshape(len(b), -1)).any(1)
