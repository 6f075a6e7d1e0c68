"""Which stage of shared memory a turn of the forward's loops uses, and which one its loads may fill."""

import cutlass.cute as cute
from cutlass import Int32


class Alternating:
    """Two stages or one: turns are numbered, even ones use stage 0."""

    def at_edge(self, turn: Int32, i: Int32) -> Int32:
        """The stage of the i-th edge block."""
        return i % 2

    def inside(self, turn: Int32, edges: Int32) -> Int32:
        """The first interior block's turn. turn: the one after the last edge block's."""
        return edges

    def stage(self, turn: Int32) -> Int32:
        return turn % 2

    def next(self, turn: Int32) -> Int32:
        return turn + 1

    def free(self, stage: Int32) -> Int32:
        """The stage that the turn before used up."""
        return 1 - stage


class Rotating:
    """Any number of stages, one after the other: a turn is known by its stage."""

    def __init__(self, stages: int):
        self.stages = stages

    def at_edge(self, turn: Int32, i: Int32) -> Int32:
        return turn

    def inside(self, turn: Int32, edges: Int32) -> Int32:
        return turn

    def stage(self, turn: Int32) -> Int32:
        return turn

    @cute.jit
    def next(self, turn: Int32) -> Int32:
        return turn + 1 if turn + 1 < self.stages else Int32(0)

    @cute.jit
    def free(self, stage: Int32) -> Int32:
        return stage - 1 if stage > 0 else Int32(self.stages - 1)
