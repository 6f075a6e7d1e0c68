"""The backward's conformance tests on a GPU: every variant of its ops through every check, in the ledger."""

from __future__ import annotations

import pytest

from tests.gpu import every_variant


@pytest.mark.parametrize(("key", "name"), every_variant.cases("bwd_preprocess", "bwd", "bwd_sum", "bwd_postprocess"))
def test_conformance(dut, done, recorded, key, name):
    every_variant.run(dut, done, recorded, key, name)
