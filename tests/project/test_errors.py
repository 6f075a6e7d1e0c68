"""Every error of the tree survives what multiprocessing and logging do with errors."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from typing import Any

import pytest

import benchmarks
import builder
import registry
import runtime
import server
from registry.contract import CubineryError
from runtime.errors import ArgumentError

VALUES: dict[str, Any] = {"reason": "why", "status": 700, "rejections": [("fwd-x", "needs more")]}


def kinds() -> list[type[CubineryError]]:
    for room in (benchmarks, builder, registry, runtime, server):
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if found.name.endswith("errors") or found.name == "benchmarks.cubins":
                importlib.import_module(found.name)
    todo, seen = [CubineryError], {}
    while todo:
        kind = todo.pop()
        seen[kind.__name__] = kind
        todo += kind.__subclasses__()
    return [seen[name] for name in sorted(seen)]


def made(kind: type[CubineryError]) -> CubineryError:
    """With a value for each parameter."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    given = {p.name: VALUES.get(p.name, p.name) for p in parameters if p.name != "self"}
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters)
    return kind(**given)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))],
                         ids=["copy", "deepcopy", "pickle"])  # fmt: skip
def test_an_error_is_the_same_again(kind, again):
    error = made(kind)
    error.add_note("while loading")
    found = again(error)
    assert type(found) is kind and found is not error
    assert str(found) == str(error) and found.args == error.args and found.__dict__ == error.__dict__
    assert found.reason == error.reason == "why"


def refuse(argument: str) -> None:
    raise ArgumentError(argument, "is of no use", reason="value")


def test_an_error_in_a_pool_reaches_the_caller():
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(ArgumentError) as error:
        pool.apply_async(refuse, ("q",)).get(timeout=60)
    assert (error.value.argument, error.value.reason, str(error.value)) == ("q", "value", "q: is of no use")
    assert error.value.renamed("k").argument == "k"


def test_what_python_keeps_of_an_import_error_is_kept():
    from runtime.errors import InstallError

    found = pickle.loads(pickle.dumps(InstallError("no torch")))
    assert found.msg == "no torch" and found.args == ("no torch",)
