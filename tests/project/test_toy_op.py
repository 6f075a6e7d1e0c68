"""How much a new op costs: one is added to a copy of the checkout, and does all that an op does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.project.shell import ROOT, environment, run

TOY = Path(__file__).with_name("toy_op")  # the new files, each with .txt behind its name
MOST = 8  # existing files that a new op may touch, generated ones included


def insert(before: str, text: str) -> Callable[[str], str]:
    """An edit: `text` in front of the first `before`."""

    def edit(source: str) -> str:
        assert before in source, before
        return source.replace(before, text + before, 1)

    return edit


# The tables of files of the folders that get one.
TABLE = re.compile(r"(\n##+ (?:registry/ops|runtime/api|runtime/call)\n.*?\n\|---\|---\|\n)", re.DOTALL)
EDITS: dict[str, Callable[[str], str]] = {
    "registry/ops/catalogue.py": insert('"bwd_preprocess"', '"toy_scale", '),
    "runtime/__init__.py": lambda source: insert("from runtime.api.varlen", "from runtime.api.toy import toy_scale\n")(
        insert('"ledger"]', '"toy_scale", ')(source)
    ),
    "runtime/call/autograd.py": lambda source: insert("from runtime.call import", "from runtime.call import toy\n")(
        insert('"bwd": backward.gradients', '"toy_scale": toy.gradients, ')(source)
    ),
    "tests/gpu/conformance.json": insert('    "bwd_preprocess"', '    "toy_scale": [],\n'),
    "docs/design.md": lambda source: TABLE.sub(r"\1| `toy.py`, `toy_scale.py` | a toy |\n", source),
}  # fmt: skip


def copy(folder: Path) -> None:
    """The checkout's files as git has them, changes included."""
    for name in run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith(("benchmarks/results", "tests/gpu/ledger")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def texts(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in str(p)
    }


def test_a_toy_op_from_its_description_to_a_public_function(tmp_path):
    folder = tmp_path / "checkout"
    copy(folder)
    before = texts(folder)
    for path in TOY.rglob("*.txt"):
        target = folder / path.relative_to(TOY).with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, edit in EDITS.items():
        (folder / name).write_text(edit((folder / name).read_text()))

    def python(*arguments: str | Path) -> str:
        given = environment(PYTHONPATH=str(folder))
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=folder, env=given, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    python("-m", "tests.project.described")
    touched = [name for name, text in texts(folder).items() if name in before and before[name] != text]
    assert set(EDITS) == set(touched) and len(touched) <= MOST, touched
    registry = tmp_path / "toy.db"
    python("-m", "builder", "--arch", "sm_120", "--op", "toy_scale", "--registry", registry)
    assert "the toy op works" in python("-m", "tests.toy_program", registry)
    told = python("-m", "runtime", "explain", "--op", "toy_scale", "--arch", "sm_120", "--head-dim", "64", "--registry",
                  registry, "--json")  # fmt: skip
    assert json.loads(told)["variant"] == "toy_scale-bf16-d256-dv256-m4"
    # what no new op may break: layers, descriptions in the documents, the names of tests on the GPU
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/project/test_described.py",
           "tests/kernels/test_validity.py")  # fmt: skip
    run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=folder,
        env=environment(PYTHONPATH=str(folder)),
    )
