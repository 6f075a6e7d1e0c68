"""The conformance tests of the ops behind KV caches on a GPU: every variant through every check, in the ledger."""

from __future__ import annotations

import pytest

from tests.gpu import every_variant


@pytest.mark.parametrize(("key", "name"), every_variant.cases("fwd_paged", "fwd_combine", "kv_append"))
def test_conformance(dut, done, recorded, key, name):
    every_variant.run(dut, done, recorded, key, name)
