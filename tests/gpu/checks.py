"""The forward's conformance checks, by their names in conformance.json.

Each takes a device under test, on which its variant is in force, the variant's key and a scale, and asserts. They run
on the GPU against `runtime` (test_fwd.py), and on the CPU in small against a stand-in and its planted faults
(tests/benchmarks/test_gpu_checks.py), so that it is known that they can fail. A check that forces something else puts
the variant back into force.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.gpu.dense_checks import beyond_2g, empty, lse, strided, windows, yardstick
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import drawn, head_dims, pack_gqa, score_mods
from tests.gpu.launch_checks import determinism, graph_capture, streams
from tests.gpu.report import FULL, TINY, Scale
from tests.gpu.varlen_checks import varlen, varlen_many

__all__ = ["CHECKS", "FULL", "TINY"]

CHECKS: dict[str, Callable[[Dut, str, Scale], None]] = {
    check.__name__: check
    for check in (
        *(yardstick, lse, strided, windows, empty, beyond_2g),
        *(head_dims, score_mods, pack_gqa, varlen, varlen_many, drawn),
        *(determinism, graph_capture, streams),
    )
}
