"""docs/training.md: every line of Python runs as it stands, but for the GPU."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from tests.runtime.backward_kernels import KERNELS
from tests.runtime.fakes import FakeBackend
from tests.support.graphs import Graph

PAGE = Path(__file__).parents[2] / "docs/training.md"


@pytest.mark.usefixtures("backward_registry")
def test_python_runs(backend: FakeBackend, monkeypatch):
    launched: list[str] = []

    def launch(function: dict[str, str], *_: object) -> tuple[object]:
        launched.append(function["symbol"])
        return (backend.driver.success,)

    monkeypatch.setattr(backend.driver, "launch", launch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        before = len(launched)
        exec(compile(block.replace('"cuda"', '"cpu"'), str(PAGE), "exec"), names)
        ops = {name.split("-")[0] for name in launched[before:]}
        differentiated = any(word in block for word in (".backward()", "autograd.grad"))
        backward = {op for op in KERNELS if op in ops or op != "bwd_sum"}  # which only split groups need
        assert ops == {"fwd", *backward} if differentiated else ops == {"fwd"}, block
