"""torch.compile in its default mode: graphs break at our functions, and results are those of eager calls."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.runtime.compile_program import ORDERS
from tests.support.cold_call import ROOT

TRACED = 40  # frames of a process in which Dynamo never looks into this package


@pytest.mark.parametrize(("order", "backend"), [("torch first", "inductor"), ("runtime first", "eager")])
def test_compiled_calls_give_eager_s_results(order: str, backend: str):
    assert order in ORDERS
    command = [sys.executable, "-m", "tests.runtime.compile_program", order, backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["same"] == {"dense": True, "varlen": True, "decode with append": True}
    if order == "torch first":
        assert report["frames"] < TRACED, report
