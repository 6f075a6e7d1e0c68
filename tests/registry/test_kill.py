"""Bar 2's part of the publishing side: SIGKILL in the midst of writes leaves nothing torn and loses nothing that was
acknowledged. The work is done by processes of `tests.registry.kill`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.size import size

SMALL = {"builder": 20, "publish": 12, "gc": 15, "export": 13}


@pytest.mark.parametrize("program", SMALL)
def test_killed_in_the_midst_of_a_write(program, tmp_path):
    kills = size(SMALL[program], 125)
    command = [sys.executable, "-m", "tests.registry.kill", program, str(tmp_path), "2026", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["landed"] == kills and report["acknowledged"] > 0
