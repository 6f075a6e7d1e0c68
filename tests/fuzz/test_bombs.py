"""Bar 5: a zstd bomb costs at most the size that its row states and 16 MiB."""

from __future__ import annotations

import json
import subprocess
import sys

from registry.contract import MAX_CONTENT
from registry.frames import PIECE, WINDOW_LOG, compress, decompress
from tests.fuzz.bombs import bombs
from tests.project.shell import ROOT

SPARE = 16  # MiB
FILLED = 4  # MiB of a cost that must show: memory is measured


def test_every_kind_is_refused_at_the_cost_of_its_stated_size(record_property):
    command = [sys.executable, "-m", "tests.fuzz.bombs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    stated = {name: min(size, MAX_CONTENT) / 2**20 for name, _, size in bombs()}
    assert costs.keys() == stated.keys() and len(stated) > 30
    for name, (reason, grown) in costs.items():
        assert reason == "zstd", name
        assert grown <= stated[name] + SPARE, name
    holds = costs["declared as the row says, holds more"]
    assert holds[1] > stated["declared as the row says, holds more"] + FILLED, "what is used is seen"
    record_property("bombs", len(costs))
    record_property("most_mib_above_the_stated_size", max(round(c[1] - stated[n], 1) for n, c in costs.items()))


def test_what_is_not_a_bomb_is_read_whatever_its_size():
    """At the edges of a piece, of the window and of a frame's blocks."""
    for size in (0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, (1 << WINDOW_LOG) - 1, (1 << WINDOW_LOG) + 1):
        content = (bytes(range(256)) * (size // 256 + 1))[:size]
        assert decompress(compress(content), size) == content
