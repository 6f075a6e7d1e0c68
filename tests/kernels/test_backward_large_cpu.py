"""The backward at its largest legal numbers of heads, entries, tokens and rows, of which only one place has memory.

A small call runs as it is; then its only head and entry, and its tokens, are said to be the last of a large call, whose
pointers are moved so that the same memory is meant, and the blocks of that place run alone. All that either leaves
behind must be the same, to the bit: a product that wraps around leads elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from registry.contract import Variant
from registry.ops.workspaces import ROWS
from tests.kernels.backward import STRIP, Memory, Trio, problems, run
from tests.kernels.backward_cases import dense, skeletons, varlen
from tests.kernels.cases import of
from tests.kernels.large import SECTION
from tests.kernels.launch import Compiled
from tests.ptx.interpreter import Device
from tests.support.abis import BWD, BWD_POSTPROCESS, BWD_PREPROCESS
from tests.support.call import Call

SMALLEST = min(skeletons(), key=lambda v: (v.head_dim, v.size("m")))  # for what is not about a tile
FAR_ENTRY, FAR_HEAD = 2**33, 2**31 + 8  # elements from entry to entry, and from head to head
MOST_SLOPES = 2**31 - 1  # batch · alibi_stride_b + heads_q at most
TOKENS = 2**30 - 1  # of q and k together
HEADS = 2**28 - 1  # of ROWS rows each: the most for which heads · rows is below 2**35
ENTRIES = 2**24 - 1  # of ROWS rows each: rows stay below 2**31


@dataclass(frozen=True)
class Large:
    """What surrounds the small call. heads, entries: how many there are, this one the last; group: query heads of a
    key/value head, each a block of its own, this one the last; first_q, first_k: tokens in front of the small call's,
    multiples of the tiles; padded: those of k are left padding."""

    heads: int = 1
    entries: int = 1
    group: int = 1
    first_q: int = 0
    first_k: int = 0
    padded: bool = False

    @property
    def heads_q(self) -> int:
        return self.heads * self.group


class Moved(Memory):
    """The memory of a small call, of one head and entry, and the parameters that say that it is part of a large one."""

    def __init__(self, case: Call, variant: Variant, large: Large):
        super().__init__(case, variant)
        self.large, self.small_values = large, dict(self.values)
        self.packed = case.queries.is_packed
        self.seqlen_q, self.seqlen_k = case.seqlen_q + large.first_q, case.seqlen_k + large.first_k
        tiles = self.seqlen_q // ROWS + large.entries if self.packed else -(-self.seqlen_q // ROWS) * large.entries
        self.row_tiles, self.entry, self.head = tiles, large.entries - 1, large.heads_q - 1
        # Packed entries before this one have no tokens; a dense one's tokens are all in front of the next one's.
        of_entry = 1 if self.packed else -(-self.seqlen_q // ROWS)
        self.first_row_tile = self.entry * of_entry + large.first_q // ROWS
        n = variant.size("n")
        self.key_tiles = self.seqlen_k // n + large.entries if self.packed else -(-self.seqlen_k // n)
        self.first_key_tile = (0 if large.padded else large.first_k // n) + (self.entry if self.packed else 0)
        self.values |= {"batch": large.entries, "heads_q": large.heads_q, "heads_kv": large.heads}
        self.values |= {"splits": large.group, "seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}
        self._move_rows()
        self._move_workspaces()
        self._move_options()
        self.values = {name: value % 2**64 if value < 0 else value for name, value in self.values.items()}

    def _move_rows(self) -> None:
        large, values = self.large, self.values
        sides = (("q o dout dq", self.head, large.first_q, 2), ("k v dk dv", large.heads - 1, large.first_k, 2))
        for names, head, first, size in (*sides, ("lse dlse", self.head, large.first_q, 4)):
            for name in (name for name in names.split() if values.get(name)):
                stride_b = 0 if self.packed else FAR_ENTRY
                before = self.entry * stride_b + head * FAR_HEAD + first * values.get(f"{name}_stride_s", 1)
                values |= {name: values[name] - size * before}
                values |= {f"{name}_stride_b": stride_b, f"{name}_stride_h": FAR_HEAD}

    def _move_workspaces(self) -> None:
        values, rows = self.values, self.row_tiles * ROWS
        assert rows < 2**31 and self.large.heads_q * rows < 2**35
        before = self.head * rows + self.first_row_tile * ROWS
        values["rows"] = rows
        for name, rate in (("lse_log2", 1), ("delta", 1), ("dq_accum", self.accum_columns), ("semaphores", 1 / STRIP)):
            values[name] -= int(4 * before * rate) if values[name] else 0

    def _move_options(self) -> None:
        values, case, entry = self.values, self.case, self.entry
        for side in "qk":
            if lengths := getattr(case, f"cu_seqlens_{side}"):
                ends = np.zeros(self.large.entries + 1, np.int32)
                ends[-1] = lengths[-1]
                values[f"cu_seqlens_{side}"] = self.device.put(ends)
        for name in ("seqused_q", "seqused_k", "leftpad_k"):
            values[name] = values[name] - 4 * entry if values.get(name) else 0
        if self.large.padded:
            values["leftpad_k"] = self.device.put(np.array([self.large.first_k], np.int32)) - 4 * entry
        if case.alibi:
            stride = (MOST_SLOPES - self.large.heads_q) // self.large.entries if case.alibi == "batch" else 0
            values |= {
                "alibi_slopes": values["alibi_slopes"] - 4 * (entry * stride + self.head),
                "alibi_stride_b": stride,
            }
        if self.grad.dalibi:
            number = self.first_key_tile if self.packed else entry * self.key_tiles + self.first_key_tile
            values["dalibi"] -= 4 * (number * self.large.heads_q + self.head)

    def row_blocks(self) -> tuple[int, list[int]]:
        """(grid, the blocks of this place) of the ops around."""
        first = self.head * self.row_tiles + self.first_row_tile
        return self.large.heads_q * self.row_tiles, [first + t for t in range(-(-self.case.seqlen_q // ROWS))]

    def key_blocks(self) -> tuple[int, list[int]]:
        """The same of `bwd`, as `kernels.trunk.tile_coord.schedule` counts them."""
        heads = self.large.heads_q  # each split has one
        pairs, pair = heads, self.head
        if not self.packed:
            pairs, pair = heads * self.large.entries, self.entry * heads + self.head
        done = pair // SECTION * SECTION
        width = min(SECTION, pairs - done)
        tiles = range(self.first_key_tile, self.first_key_tile - (-self.case.seqlen_k // self.variant.size("n")))
        return self.key_tiles * pairs, [done * self.key_tiles + t * width + pair - done for t in tiles]

    def launch(self, trio: Trio) -> None:
        grids = self.row_blocks(), self.key_blocks(), self.row_blocks()
        kernels = (trio.preprocess, BWD_PREPROCESS), (trio.main, BWD), (trio.postprocess, BWD_POSTPROCESS)
        for (compiled, abi), (grid, blocks) in zip(kernels, grids, strict=True):
            assert 0 <= blocks[0] <= blocks[-1] < grid < 2**31
            self.run(compiled, abi, grid, order=blocks)

    def launch_small(self, trio: Trio) -> None:
        self.values = self.small_values
        self.run(trio.preprocess, BWD_PREPROCESS, self.blocks(trio.preprocess))
        self.run(trio.main, BWD, self.blocks(trio.main), order=self.order(self.blocks(trio.main)))
        self.run(trio.postprocess, BWD_POSTPROCESS, self.blocks(trio.postprocess))


def left_behind(device: Device, bases: list[int]) -> list[bytes]:
    return [device.get(base).tobytes() for base in bases]


LAST = TOKENS // 2 // (2 * ROWS) * 2 * ROWS - 2 * ROWS  # a token near the last that q and k may have both
ALL_OPTIONS: dict[str, Any] = {
    "dlse": True,
    "alibi": "batch",
    "dalibi": True,
    "window": (None, 0),
    "deterministic": True,
}
LENGTHS: dict[str, Any] = {"seqused_q": (29,), "seqused_k": (33,), "leftpad_k": (2,)}


def small(seqlen_q: int = 31, seqlen_k: int = 37, **more: Any) -> Call:
    return dense(seqlen_q, seqlen_k, 1, 1, **more)


CASES = {
    "most-heads": (small(**ALL_OPTIONS), Large(heads=HEADS)),
    "heads-of-issue-12": (small(20, 20, **ALL_OPTIONS), Large(heads=65_535)),
    "most-query-heads": (small(**ALL_OPTIONS), Large(heads=HEADS // 5, group=5)),
    "most-entries": (small(**ALL_OPTIONS, **LENGTHS), Large(entries=ENTRIES)),
    "heads-and-entries": (small(**ALL_OPTIONS, **LENGTHS), Large(heads=2**14 - 1, entries=2**14 - 1)),
    "most-tokens": (small(150, 150, dlse=True, window=(20, 0), alibi="heads"), Large(first_q=LAST, first_k=LAST)),
    "most-queries": (small(41, 37, window=(None, 0), dlse=True, deterministic=True), Large(first_q=2 * LAST)),
    "most-keys": (small(alibi="batch", dalibi=True), Large(first_k=2 * LAST)),
    "most-padding": (small(**ALL_OPTIONS), Large(first_k=2 * LAST, padded=True)),
    "padding-of-many-heads": (small(window=(9, 3)), Large(heads=63, first_k=2 * LAST, padded=True)),
    "most-packed-entries": (varlen((31,), (37,), **ALL_OPTIONS), Large(entries=ENTRIES)),
    "packed-heads-and-entries": (varlen((31,), (37,), **ALL_OPTIONS), Large(heads=2**14 - 1, entries=2**14 - 1)),
}


@pytest.mark.parametrize(("case", "large"), CASES.values(), ids=CASES.keys())
@of([SMALLEST])
def test_the_last_of_a_large_call(case: Call, large: Large, variant: Variant, variant_of: Callable[[str], Compiled]):
    trio = Trio.of(variant, variant_of)
    assert problems(run(trio, case), case, variant) == []
    alone, moved = Moved(case, variant, large), Moved(case, variant, large)
    bases = list(alone.device.bases)
    alone.launch_small(trio)
    moved.launch(trio)
    assert left_behind(moved.device, bases) == left_behind(alone.device, bases)


@of([SMALLEST])
def test_partial_sums_of_most_heads(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Rows of a token's heads, and parts of the splits, lie further apart than 32 bits count."""
    trio, case, large, split = Trio.of(variant, variant_of), small(31, 5), Large(heads=2**26 - 1, group=4), 2**41
    alone, moved = Moved(case, variant, large), Moved(case, variant, large)
    alone.launch_small(trio)
    rows: dict[str, list[int]] = {}
    for name, dim in (("dk", moved.dim), ("dv", moved.dim_v)):
        row, first = large.heads * dim, moved.device.next
        nothing = np.full(dim, 0xFFFFFFFF, np.uint32)
        rows[name] = [moved.device.put(nothing, at=first + 4 * row * token) for token in range(case.seqlen_k)]
        before = (large.group - 1) * split + (large.heads - 1) * dim
        moved.values |= {f"{name}_partial": (first - 4 * before) % 2**64, f"{name}_partial_stride_split": split}
    moved.launch(trio)
    for name, places in rows.items():
        found = np.stack([moved.device.get(place, np.float32) for place in places])
        right, _ = alone.keys_result(name)
        np.testing.assert_allclose(found, right[:, 0], rtol=2.0**-8, atol=1e-6)
        assert moved.keys_result(name)[1] == 0
