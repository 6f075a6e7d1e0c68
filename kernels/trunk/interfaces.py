"""What the forward's main loop asks of its parts (`kernels.trunk.forward`): in what ops that share it may differ.

They are called while the DSL traces, so `if`s on their constants cost nothing on the device.
"""

from types import SimpleNamespace
from typing import Any, Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Keys(Protocol):
    """Where keys and values are, and when their loads start.

    ahead: turns between the start of a block's loads and its own. first_steps: steps of Q·Kᵀ before a turn's loads.
    from_notes: loads read the block's notes, and Q's have a group of their own in front of them. bounded_ahead: blocks
    that are loaded ahead may have rows without a key. carried: interior blocks are counted, so that the compiler
    carries their addresses from block to block. panel: columns of a panel in shared memory, 0 for what suits a tile.
    turns: which stage is whose (`kernels.trunk.turns`).
    """

    ahead: int
    first_steps: int
    from_notes: bool
    bounded_ahead: bool
    carried: bool
    panel: int
    turns: Any

    def work(self, call: SimpleNamespace, block: Int32) -> Int32:
        """The number of a block's query tile."""

    def lengths(self, call: SimpleNamespace, batch_idx: Int32) -> tuple[Int32, Int32]:
        """(first token, length) of a batch entry's keys."""

    def open(self, state: SimpleNamespace, rows: SimpleNamespace, batch_idx: Int32, head_kv: Int32) -> SimpleNamespace:
        """The key blocks to visit (`kernels.trunk.visits`). What loads need is put into `state`."""

    def noted(self, rows: SimpleNamespace) -> tuple[Int32, ...]:
        """Numbers for the block's notes, behind `forward.NOTED` others."""

    def load_k(self, state: SimpleNamespace, n_block: Int32, stage: Int32, seqlen_k: Int32 | None) -> None:
        """Start the copy of a block of keys. seqlen_k: None if all its rows have keys."""

    def load_v(self, state: SimpleNamespace, n_block: Int32, stage: Int32, seqlen_k: Int32 | None) -> None:
        """The same of values."""

    def look_up(self, state: SimpleNamespace, n_block: Int32) -> None:
        """Find out what must be known of a block before its loads, which come next."""

    def look_ahead(self, state: SimpleNamespace, n_block: Int32, left: Any, blocks: int = 0) -> None:
        """Ask for the same of the next turn's, if there are more than `blocks` left."""

    def advance(self, state: SimpleNamespace) -> None:
        """Take what the last turn asked for."""

    def to_start(self, blocks: SimpleNamespace) -> Int32:
        """The number of blocks, for the loads before the first turn."""

    def left_at_edge(self, i: Int32, count: Int32) -> Any:
        """What `more` needs to know when the i-th of `count` blocks is visited."""

    def left_inside(self, n_block: Int32, inner_first: Int32) -> Any:
        """The same of an interior block."""

    def more(self, left: Any, blocks: int) -> cutlass.Boolean:
        """Whether there are more than so many blocks from this one on."""

    def first_key(self, state: SimpleNamespace) -> Int32 | None:
        """The first key that the tile sees; None if all before have keys."""


class Multiplies(Protocol):
    """What the tensor cores multiply. dtype: theirs; k_columns, v_columns: of tiles of keys and values, in elements of
    that; packing: elements of keys and values in one of them."""

    dtype: type[cutlass.Numeric]
    k_columns: int
    v_columns: int
    packing: int

    def load_queries(self, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32) -> None:
        """Bring steps of Q that stay in registers there, from shared memory."""

    def keys(self, state: SimpleNamespace, acc_S: cute.Tensor, sK: cute.Tensor, steps: range) -> None:
        """Add Q·Kᵀ over a range of steps of 16 columns."""

    def values(self, state: SimpleNamespace, acc_S: cute.Tensor, sV: cute.Tensor) -> None:
        """Add P·V to the output, with P in acc_S."""

    def finish(self, state: SimpleNamespace, batch_idx: Int32, head_kv: Int32) -> None:
        """Do to the output what is left when it is normalised."""

    def column(self, tOcO: cute.Tensor, c: int) -> Int32:
        """The output's column that is this thread's c-th."""

    def to_smem(self, state: SimpleNamespace, rO: cute.Tensor, tOcO: cute.Tensor) -> None:
        """Store the converted output in sO."""


class Output(Protocol):
    """The epilogue."""

    def tile(self, forward: Any, memory: cute.Pointer) -> cute.Tensor:
        """sO. memory: where Q is in shared memory."""

    def write(self, forward: Any, state: SimpleNamespace, head_kv: Int32) -> None:
        """Normalise and write the output, and the LSE where it is wanted."""
