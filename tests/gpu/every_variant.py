"""What the conformance tests share: every variant of some ops through every check of its op, by name."""

from __future__ import annotations

from typing import Any

import pytest

from kernels import dispatch
from tests.gpu import ledger
from tests.gpu.sanitize import TOOLS


def cases(*ops: str) -> list[tuple[str, str]]:
    """(variant key, name of a check) of all but the sanitizers' checks, which `tests.gpu.sanitize` runs."""
    return [
        (variant.key, name)
        for variant in dispatch.variants()
        if variant.op in ops
        for name in ledger.CONFORMANCE["ops"][variant.op]
        if name not in TOOLS
    ]


def run(dut: Any, done: Any, recorded: Any, key: str, name: str) -> None:
    """One check, into the ledger; of a run that goes on after a break, only what the ledger lacks."""
    if (key, name) in done:
        pytest.skip("the ledger has it already")
    from tests.gpu import checks

    assert key in dut.artifacts, f"{key} is in the dispatch table, not in the registry's index: build it"
    with recorded(dut.artifacts[key], name):
        dut.force(key)
        checks.OPS[key.split("-")[0]][name](dut, key, checks.FULL)
