"""The forward's conformance tests on a GPU: every variant of the dispatch table through every check, in the ledger."""

from __future__ import annotations

import pytest

from kernels import dispatch
from tests.gpu import every_variant, ledger
from tests.gpu.sanitize import TOOLS

KEYS = [variant.key for variant in dispatch.variants() if variant.op == "fwd"]
NAMES = [name for name in ledger.CONFORMANCE["ops"]["fwd"] if name not in TOOLS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", KEYS)
def test_conformance(dut, done, recorded, key, name):
    every_variant.run(dut, done, recorded, key, name)
