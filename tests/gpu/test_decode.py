"""The conformance tests of the ops behind KV caches on a GPU: every variant through every check, in the ledger."""

from __future__ import annotations

import pytest

from kernels import dispatch
from tests.gpu import ledger
from tests.gpu.sanitize import TOOLS

OPS = ("fwd_paged", "fwd_combine", "kv_append")
CASES = [
    (variant.key, name)
    for variant in dispatch.variants()
    if variant.op in OPS
    for name in ledger.CONFORMANCE["ops"][variant.op]
    if name not in TOOLS
]


@pytest.mark.parametrize(("key", "name"), CASES)
def test_conformance(dut, done, recorded, key, name):
    if (key, name) in done:
        pytest.skip("this run's ledger has it already")
    from tests.gpu import checks

    assert key in dut.artifacts, f"{key} is in the dispatch table, not in the registry's index: build it"
    dut.force(key)
    with recorded(dut.artifacts[key], name):
        checks.OPS[key.split("-")[0]][name](dut, key, checks.FULL)
