"""What the GPU checks do with threads and graphs, without a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.gpu.stand_in import Stand


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """CUDA graphs on the CPU: what a stand-in does inside `torch.cuda.graph` is done again by a replay."""

    class Graph:
        def replay(self):
            for launch in self.launches:
                launch()

    @contextlib.contextmanager
    def capture(graph):
        Stand.recording = graph.launches = []
        try:
            yield
        finally:
            Stand.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: on a busy machine, threads that wait for each other cost ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
