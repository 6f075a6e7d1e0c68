"""A CUDA graph's stand-in on the CPU."""

from __future__ import annotations


class Graph:
    def replay(self) -> None:
        pass
