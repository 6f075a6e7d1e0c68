"""Promise 1 on a GPU: the conformance tests run in a process that cannot import a compiler (conftest.py)."""

from __future__ import annotations

import importlib

import pytest

from tests.gpu.conftest import COMPILERS


@pytest.mark.parametrize("name", COMPILERS)
def test_compilers_are_out_of_reach(name, dut):
    with pytest.raises(ImportError):
        importlib.import_module(name)
