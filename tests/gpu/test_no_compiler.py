"""Promise 1 on a GPU: the conformance tests ran in a process that cannot import a compiler (conftest.py), and did not."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.gpu.conftest import COMPILERS


@pytest.mark.parametrize("name", COMPILERS)
def test_compilers_are_out_of_reach(name, dut):
    assert name not in sys.modules
    with pytest.raises(ImportError, match="blocked"):
        importlib.import_module(name)
