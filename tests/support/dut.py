"""The real runtime over the fake driver, for checks that a GPU runs."""

from __future__ import annotations

import pytest

import runtime
from runtime.load import session
from tests.runtime.fakes import FakeBackend


@pytest.fixture
def backend(monkeypatch):
    made = FakeBackend(capability=(9, 0))
    monkeypatch.setattr(session, "BACKEND", lambda: made)
    yield made
    runtime.configure()
