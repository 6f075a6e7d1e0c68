"""The rooms' walls, and that docs/design.md speaks of files that exist."""

import graphlib
import re
import sys
from pathlib import Path

import grimp
import pytest

from registry import ops
from tests.project.shell import ROOT, environment, run

DESIGN = (ROOT / "docs/design.md").read_text()
ROOMS = ("registry", "kernels", "builder", "server", "runtime")


def test_imports_keep_to_the_contracts():
    said = run([Path(sys.executable).parent / "lint-imports", "--no-cache"])
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", said), said


def test_no_module_imports_itself_in_the_end():
    """Imports inside functions count too."""
    graph = grimp.build_graph(*ROOMS)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the circle


def test_contract_needs_the_standard_library_only():
    # -S leaves site-packages out.
    of_registry = (
        "sorted(n for n in sys.modules if n.startswith('registry.') and n.split('.')[1] not in ('contract', 'ops'))"
    )
    code = f"import sys, registry.contract, kernels.validity, kernels.dispatch; print({of_registry})"
    assert run([sys.executable, "-S", "-c", code]).strip() == "[]"


def test_runtime_imports_no_compiler():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('cutlass', 'triton', 'numba', 'kernels', 'builder')));"
    run([sys.executable, "-c", blocked + "import runtime; runtime.flash_attn"], env=environment(PYTHONPATH=str(ROOT)))


def test_design_lists_each_room():
    listed = re.findall(r"^\| `(\w+)/` \|", DESIGN, re.MULTILINE)
    assert sorted(listed) == sorted(ROOMS)
    assert all((ROOT / room / "__init__.py").is_file() for room in ROOMS)


FOLDERS = ("registry/contract", "registry/ops", "kernels", "kernels/trunk", "builder", "runtime", "benchmarks")
LAYERS = ("api", "call", "load", "trust", "sources", "cli")


def listed(heading):
    """The files in the tables' first column under a heading of docs/design.md."""
    section = re.split(rf"\n##+ {heading}\n", DESIGN)[1]
    section = re.split(r"\n##+ (?!The backward)", section)[0]
    first_cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return sorted(name for cell in first_cells for name in re.findall(r"`(\w+\.(?:py|json))`", cell))


def files(folder):
    return {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".json")} - {"__init__.py"}


@pytest.mark.parametrize("folder", [*FOLDERS, *(f"runtime/{layer}" for layer in LAYERS)])
def test_design_names_every_file(folder):
    assert listed(folder) == sorted(files(folder))


def test_design_names_every_file_of_an_op_and_each_op_has_a_folder():
    folders = {path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"trunk"} == set(ops.OPS)
    assert listed("kernels of an op") == sorted(set().union(*(files(f"kernels/{op}") for op in ops.OPS)))
    assert all({"kernel.py", "table.py"} <= files(f"kernels/{op}") for op in ops.OPS)


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`?((?:[a-z]+/)+\w+\.(?:py|json))\b", DESIGN))))
def test_design_names_files_that_exist(named):
    assert (ROOT / named).is_file()


@pytest.mark.parametrize("dotted", sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)})(?:\.\w+)+)", DESIGN))))
def test_design_names_things_that_exist(dotted):
    # In a fresh process: some of these modules want their environment set before the first import.
    run([sys.executable, "-c", "import pkgutil, sys; pkgutil.resolve_name(sys.argv[1])", dotted])


def test_helpers_come_from_no_test_file():
    """What tests share lies in tests/support, or in a module of its own beside them."""
    taken = re.compile(r"^\s*from tests[.\w]*\.test_\w+ import", re.MULTILINE)
    assert [str(path) for path in (ROOT / "tests").rglob("*.py") if taken.search(path.read_text())] == []
