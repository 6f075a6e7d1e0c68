"""docs/decode.md: every line of Python runs as it stands, but for the GPU."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

import runtime
from tests.runtime.cache_kernels import write_cache_registry
from tests.runtime.fakes import FakeBackend
from tests.support.graphs import Graph

PAGE = Path(__file__).parents[2] / "docs/decode.md"


def test_python_runs(backend: FakeBackend, tmp_path: Path, monkeypatch):
    write_cache_registry(tmp_path / "r.db")
    runtime.configure(registry=tmp_path / "r.db")
    launched = []
    monkeypatch.setattr(
        backend.driver, "launch", lambda function, *_: launched.append(function["symbol"]) or (backend.driver.success,)
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        before = len(launched)
        exec(compile(block.replace('"cuda"', '"cpu"'), str(PAGE), "exec"), names)
        assert len(launched) > before, block
    ops = [name.split("-")[0] for name in launched]
    assert {"fwd", "fwd_paged", "fwd_combine", "kv_append"} == set(ops) and any("e4m3kv" in name for name in launched)
