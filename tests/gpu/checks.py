"""The conformance checks of every op, by their names in conformance.json.

Each takes a device under test, on which its variant is in force, the variant's key and a scale, and asserts. They run
on the GPU against `runtime` (test_fwd.py, test_decode.py, test_bwd.py), and on the CPU in small against stand-ins and
their planted faults (tests/benchmarks: test_gpu_checks.py, test_paged_checks.py, test_bwd_checks.py), so that it is
known that they can fail. A check that forces something else puts the variant back into force.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.gpu import (
    append_checks,
    bwd_checks,
    bwd_large_checks,
    bwd_launch_checks,
    combine_checks,
    paged_checks,
    paged_large_checks,
    paged_launch_checks,
)
from tests.gpu.dense_checks import beyond_2g, empty, lse, strided, windows, yardstick
from tests.gpu.dut import Dut
from tests.gpu.feature_checks import drawn, head_dims, pack_gqa, score_mods
from tests.gpu.large_checks import largest
from tests.gpu.launch_checks import determinism, graph_capture, streams
from tests.gpu.report import FULL, TINY, Scale
from tests.gpu.varlen_checks import leftpad, unused_rows, varlen, varlen_many

__all__ = ["CHECKS", "FULL", "OPS", "TINY"]

Check = Callable[[Dut, str, Scale], None]


def _named(*checks: Check) -> dict[str, Check]:
    return {check.__name__: check for check in checks}


CHECKS = _named(
    *(yardstick, lse, strided, windows, empty, beyond_2g),
    *(head_dims, score_mods, pack_gqa, varlen, varlen_many, drawn),
    *(determinism, graph_capture, streams),
    *(leftpad, unused_rows, largest),
)
OPS: dict[str, dict[str, Check]] = {
    "fwd": CHECKS,
    "fwd_paged": _named(
        *(paged_checks.yardstick, paged_checks.splits, paged_checks.varlen, paged_checks.score_mods),
        *(paged_checks.pack_gqa, paged_checks.head_dims, paged_checks.strided, paged_checks.empty),
        *(paged_checks.beyond_2g, paged_checks.append_and_attend, paged_checks.drawn),
        *(paged_launch_checks.determinism, paged_launch_checks.graph_capture, paged_launch_checks.streams),
        *(paged_checks.leftpad, paged_large_checks.largest),
    ),
    "fwd_combine": _named(combine_checks.combine, combine_checks.into_given, combine_checks.determinism)
    | {"largest": paged_large_checks.largest_combine},
    "kv_append": _named(
        *(append_checks.append_rows, append_checks.rotary, append_checks.beyond_2g, append_checks.determinism),
        append_checks.lost_pages,
    )
    | {"largest": paged_large_checks.largest_append},
    "bwd_preprocess": _named(
        *(bwd_checks.scores, varlen, varlen_many, bwd_checks.head_dims),
        *(bwd_checks.strides, bwd_checks.empty, bwd_checks.drawn),
        *(bwd_launch_checks.determinism, bwd_launch_checks.large, bwd_launch_checks.graph_capture),
        bwd_large_checks.largest,
    ),
    "bwd": _named(
        *(bwd_checks.lengths, bwd_checks.masks, bwd_checks.gqa),
        *(varlen, varlen_many, bwd_checks.scores, bwd_checks.head_dims),
        *(bwd_checks.strides, bwd_checks.empty, bwd_checks.splits, bwd_checks.drawn),
        *(bwd_launch_checks.determinism, bwd_launch_checks.large, bwd_launch_checks.graph_capture),
        *(bwd_launch_checks.streams, bwd_launch_checks.autograd),
        *(leftpad, bwd_large_checks.largest),
    ),
    "bwd_sum": _named(
        *(bwd_checks.splits, varlen, bwd_checks.head_dims, bwd_checks.drawn),
        *(bwd_launch_checks.determinism, bwd_launch_checks.graph_capture),
        bwd_large_checks.largest,
    ),
    "bwd_postprocess": _named(
        *(bwd_checks.lengths, bwd_checks.gqa, varlen, varlen_many),
        *(bwd_checks.head_dims, bwd_checks.empty, bwd_checks.drawn),
        *(bwd_launch_checks.determinism, bwd_launch_checks.large, bwd_launch_checks.graph_capture),
        bwd_large_checks.largest,
    ),
}
