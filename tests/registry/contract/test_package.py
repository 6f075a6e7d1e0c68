"""The package as a whole: what it hands on, and what its files may do."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from registry import contract

FOLDER = Path(contract.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def body(name: str) -> list[ast.stmt]:
    """A file's statements without its docstring."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assert ast.get_docstring(tree), name
    return tree.body[1:]


def defined(name: str) -> list[str]:
    """The public names that a file defines itself."""
    names = []
    for node in body(name):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names += [t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    return [n for n in names if not n.startswith("_")]


def test_the_package_hands_on_every_public_name_and_no_other():
    owners = {name: file for file in FILES for name in defined(file)}
    assert sum(len(defined(file)) for file in FILES) == len(owners)
    assert sorted(contract.__all__) == sorted(owners)
    for name, file in owners.items():
        assert getattr(contract, name) is getattr(importlib.import_module(f"registry.contract.{file}"), name)


def test_no_file_has_the_name_of_something_that_the_package_hands_on():
    assert not set(FILES) & set(contract.__all__)


@pytest.mark.parametrize("name", FILES)
def test_files_define_names_and_do_nothing_else(name):
    """So that none changes another, and a fingerprint may leave out those that a kernel does not import."""
    for node in body(name):
        assert isinstance(node, DEFINITIONS) or ast.unparse(node).startswith("if TYPE_CHECKING:")
        for target in node.targets if isinstance(node, ast.Assign) else []:
            assert isinstance(target, ast.Name)


def test_the_package_does_nothing_but_hand_on():
    *imports, typed, files, file_of, names, function, listing = body("__init__")
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    assert isinstance(typed, ast.If) and all(isinstance(node, ast.ImportFrom) for node in typed.body)
    told = {alias.name: node.module for node in typed.body for alias in node.names}
    assert told == {name: f"registry.contract.{file}" for name, file in contract._FILE_OF.items()}  # to type checkers
    assert [ast.unparse(node.targets[0]) for node in (files, file_of, names)] == ["_FILES", "_FILE_OF", "__all__"]
    assert [function.name, listing.name] == ["__getattr__", "__dir__"] and set(contract.__all__) <= set(dir(contract))


def test_it_imports_a_file_when_one_of_its_names_is_asked_for():
    code = "import sys, registry.contract as c; c.Grid; print(*[n for n in sys.modules if n.startswith(c.__name__)])"
    said = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert "registry.contract.grid" in said.stdout.split() and "registry.contract.index" not in said.stdout.split()
    with pytest.raises(AttributeError, match="has no attribute 'Grids'"):
        _ = contract.Grids


@pytest.mark.parametrize("name", FILES)
def test_files_import_the_standard_library_and_each_other_but_never_the_package(name):
    for node in ast.walk(ast.Module(body(name), [])):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            package, _, file = node.module.rpartition(".")
            assert node.module in sys.stdlib_module_names | {"collections.abc"} or package == "registry.contract"
            assert package != "registry.contract" or file in FILES
