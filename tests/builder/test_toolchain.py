import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import ROOT, misplaced, nvjitlink
from builder.build import Table
from builder.errors import ToolchainError
from builder.toolchain import Toolchain, closure, min_driver, nvdisasm_path
from registry import ops
from tests.builder import toys


def package(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_closure_follows_every_form_of_import_inside_the_packages(tmp_path: Path) -> None:
    package(
        tmp_path,
        kernels__main="import cutlass\nfrom kernels import a\nimport kernels.b\nfrom . import c\nfrom .sub.d import X",
        kernels__a="def f():\n    from kernels.e import Y  # also where it hides\n",
        kernels__b="from registry.contract import Grid\nfrom registry.store import Store\n",
        kernels__c="",
        kernels__e="from kernels import main  # a cycle\n",
        kernels__unused="import kernels.c",
        kernels__sub__d="from ..f import Z\n",
        kernels__f="",
        registry__contract__grid="import json\n",
        registry__store="import kernels.unused\n",
    )
    (tmp_path / "kernels" / "__init__.py").write_text("")
    (tmp_path / "kernels" / "sub" / "__init__.py").write_text("from . import g\n")
    (tmp_path / "kernels" / "sub" / "g.py").write_text("")
    (tmp_path / "registry" / "contract" / "__init__.py").write_text("from registry.contract.grid import Grid\n")
    found = closure(["kernels.main"], folder=tmp_path)
    letters = {f"kernels.{x}" for x in "abcef"}
    assert found.keys() == letters | {"kernels", "kernels.main", "kernels.sub", "kernels.sub.d", "kernels.sub.g"} | {
        "registry.contract",
        "registry.contract.grid",
    }


def test_closure_depends_on_contents_and_not_on_the_folder(tmp_path: Path) -> None:
    here, there = toys.write_sources(tmp_path / "here"), toys.write_sources(tmp_path / "there")
    before = closure(["kernels.toy"], folder=here)
    assert before == closure(["kernels.toy"], folder=there)
    (there / "kernels" / "unrelated.py").write_text("VALUE = 3\n")
    assert before == closure(["kernels.toy"], folder=there)
    (there / "kernels" / "helper.py").write_text("VALUE = 3\n")
    after = closure(["kernels.toy"], folder=there)
    assert {name for name in after if after[name] != before[name]} == {"kernels.helper"}


def test_closure_of_the_forward_covers_its_device_code_and_not_the_table() -> None:
    found = closure(Table.ours().sources["fwd"])
    assert {"kernels.fwd.kernel", "kernels.trunk.softmax", "kernels.trunk.mask", "registry.ops.fwd"} <= found.keys()
    others = {"kernels.dispatch", "kernels.generate", "kernels.fwd.table", "registry.store", "registry"}
    assert not others & found.keys()


@pytest.mark.parametrize(
    ("statement", "whole"),
    [
        ("from registry.contract.abi import Abi", False),
        ("import registry.contract.abi as abi", False),
        ("import registry.contract.abi", True),  # registry.contract.index is in reach
        ("from registry.contract import Abi", True),
        ("from registry.contract import abi", True),
        ("from registry import contract", True),
    ],
)
def test_closure_leaves_a_facade_out_of_which_nothing_is_taken(statement: str, whole: bool, tmp_path: Path) -> None:
    package(
        tmp_path,
        kernels__toy=statement,
        registry__contract__abi="from registry.contract.errors import E\n",
        registry__contract__errors="",
        registry__contract__index="from registry.contract.abi import Abi\n",
    )
    hands_on = "from registry.contract.abi import Abi\nfrom registry.contract.index import Index\n"
    (tmp_path / "registry" / "contract" / "__init__.py").write_text(hands_on)
    parts = {"kernels.toy", "registry.contract.abi", "registry.contract.errors"}
    rest = {"registry.contract", "registry.contract.index"}
    assert closure(["kernels.toy"], folder=tmp_path).keys() == (parts | rest if whole else parts)


def test_closure_takes_the_package_where_there_is_a_module_of_that_name_too(tmp_path: Path) -> None:
    package(tmp_path, kernels__toy="from kernels import two", kernels__two="import kernels.stale", kernels__stale="")
    before = closure(["kernels.toy"], folder=tmp_path)
    package(tmp_path, kernels__two__part="")
    (tmp_path / "kernels" / "two" / "__init__.py").write_text("")
    assert before.keys() - closure(["kernels.toy"], folder=tmp_path).keys() == {"kernels.stale"}


@pytest.fixture
def changed_by(tmp_path: Path) -> Callable[[str], set[str]]:
    """The ops whose fingerprints change when a file of a copy of our sources does."""
    for package in ("kernels", "registry/contract", "registry/ops"):
        shutil.copytree(ROOT / package, tmp_path / package)
    table, toolchain = Table.ours(), Toolchain.current()

    def fingerprints() -> dict[str, str]:
        found = {op: closure(modules, folder=tmp_path) for op, modules in table.sources.items()}
        return {op: toolchain.ptx_fingerprint(op, sources) for op, sources in found.items()}

    before = fingerprints()

    def changed_by(file: str) -> set[str]:
        text = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(text + b"\n")
        after = fingerprints()
        (tmp_path / file).write_bytes(text)
        return {op for op in before if after[op] != before[op]}

    return changed_by


def test_which_files_of_the_contract_change_a_kernels_fingerprint(changed_by: Callable[[str], set[str]]) -> None:
    for file, touched in (("index", set()), ("dispatch", set()), ("__init__", set()), ("abi", set(ops.OPS))):
        assert changed_by(f"registry/contract/{file}.py") == touched, file


def test_an_op_can_change_and_another_be_added_while_the_others_fingerprints_stay(
    changed_by: Callable[[str], set[str]],
) -> None:
    for op in ops.OPS:
        files = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / op).iterdir() if path.is_file()}
        touched = {file: changed_by(file) for file in (*files, f"registry/ops/{op}.py")}
        assert all(found <= {op} for found in touched.values()), touched
        assert {f"kernels/{op}/kernel.py", f"registry/ops/{op}.py"} <= {file for file in touched if touched[file]}
        assert not touched[f"kernels/{op}/table.py"]
    for file in ("registry/ops/catalogue.py", "registry/ops/__init__.py", *by_convention()):
        assert changed_by(file) == set(), file


def by_convention() -> list[str]:
    """The files that find an op's parts."""
    return [str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py") if path.name != "__init__.py"]


def test_closure_of_a_missing_module_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"kernels\.nowhere"):
        closure(["kernels.nowhere"], folder=tmp_path)


@pytest.mark.parametrize(("text", "where"), [("x = 1\nif:\n", ":2: "), ("x = '\0'\n", "toy.py:")])
def test_closure_of_a_source_that_does_not_parse_is_a_typed_error(text: str, where: str, tmp_path: Path) -> None:
    path = toys.write_sources(tmp_path, text) / "kernels" / "toy.py"
    with pytest.raises(ToolchainError) as error:
        closure(["kernels.toy"], folder=tmp_path)
    assert str(error.value).startswith(str(path)) and where in str(error.value)


def test_fingerprints_cover_all_that_shapes_the_result() -> None:
    toolchain = Toolchain.current()
    base = toolchain.ptx_fingerprint("k", {"m": "1"})
    assert base == toolchain.ptx_fingerprint("k", {"m": "1"})
    others = [
        toolchain.ptx_fingerprint("l", {"m": "1"}),
        toolchain.ptx_fingerprint("k", {"m": "2"}),
        *(
            Toolchain({**toolchain.generate, name: "other"}, toolchain.assemble, (12, 9)).ptx_fingerprint(
                "k", {"m": "1"}
            )
            for name in toolchain.generate
        ),
    ]
    assert len({base, *others}) == 1 + len(others)
    artifact = toolchain.artifact_fingerprint(base, "sm_120", "abi")
    others = [
        toolchain.artifact_fingerprint("x", "sm_120", "abi"),
        toolchain.artifact_fingerprint(base, "sm_121", "abi"),
        toolchain.artifact_fingerprint(base, "sm_120", "other"),
        *(
            Toolchain(toolchain.generate, {**toolchain.assemble, name: "other"}, (12, 9)).artifact_fingerprint(
                base, "sm_120", "abi"
            )
            for name in toolchain.assemble
        ),
    ]
    assert len({artifact, *others}) == 1 + len(others)
    assert {"nvidia-cutlass-dsl", "python"} <= toolchain.generate.keys()
    assert {"nvidia-nvjitlink-cu12", "nvidia-cuda-nvdisasm", "checks.py", "sass.py"} <= toolchain.assemble.keys()


def test_oldest_driver_of_each_architecture() -> None:
    assert [min_driver(a, (12, 9)) for a in ("sm_90", "sm_120", "sm_121")] == [12000, 12080, 12090]
    assert [min_driver(a, (13, 1)) for a in ("sm_90", "sm_120")] == [13000, 13000]
    assert all(12000 <= min_driver(arch, nvjitlink.version()) <= 12090 for arch in nvjitlink.ARCHS)


def test_nvdisasm_is_the_wheels() -> None:
    assert nvdisasm_path().is_file()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.toolchain._version", lambda name: None)
    with pytest.raises(ToolchainError, match=r"nvidia-cutlass-dsl, nvidia-nvjitlink-cu12.*pip install"):
        Toolchain.current()


def test_planning_the_real_table_imports_no_compiler() -> None:
    code = (
        "import sys; from builder.build import Table, plan; from builder.toolchain import Toolchain\n"
        "jobs = plan(Table.ours(), ['sm_120'], Toolchain.current(), None)\n"
        "assert jobs and all(job.missing == ('sm_120',) for job in jobs)\n"
        "print([name for name in ('cutlass', 'torch', 'triton', 'elftools') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_own_packages_are_beside_the_builder(tmp_path: Path) -> None:
    assert misplaced("kernels") is None
    assert misplaced("registry") is None
    message = misplaced("kernels", tmp_path)
    assert message is not None
    assert str(ROOT / "kernels" / "__init__.py") in message and str(tmp_path / "kernels" / "__init__.py") in message
    assert "nowhere" in str(misplaced("no_such_package_here"))


@pytest.mark.parametrize("name", ["kernels", "registry"])
def test_a_foreign_package_of_the_same_name_is_refused_with_both_paths(name: str, tmp_path: Path) -> None:
    foreign = tmp_path / name / "__init__.py"
    foreign.parent.mkdir()
    foreign.write_text("")
    code = "import sys; sys.path[:0] = sys.argv[1:3]; from builder.__main__ import main; sys.exit(main(['--dry-run']))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert str(foreign) in done.stderr and str(ROOT / name / "__init__.py") in done.stderr
    assert "Traceback" not in done.stderr
