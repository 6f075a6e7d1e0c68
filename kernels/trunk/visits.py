"""In which order a query tile visits key blocks: the edges, right and left, then the interior, each downwards."""

from types import SimpleNamespace

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def visits(first: Int32, inner_first: Int32, inner_end: Int32, end: Int32) -> SimpleNamespace:
    """What `mask.block_ranges` found, with the number of blocks and that of edge blocks."""
    count = end - first
    edges = count - (inner_end - inner_first)
    return SimpleNamespace(count=count, edges=edges, inner_first=inner_first, inner_end=inner_end, end=end)


@cute.jit
def visit(blocks: SimpleNamespace, i: Int32) -> Int32:
    """The i-th key block."""
    n_block = blocks.end - 1 - i
    if i >= blocks.edges:
        n_block = blocks.inner_end - 1 - (i - blocks.edges)
    elif n_block < blocks.inner_end:
        n_block -= blocks.inner_end - blocks.inner_first
    return n_block
