"""A copy of the checkout that a test may change, and what it changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.project.shell import ROOT, environment, run

Edit = Callable[[str], str]


def insert(before: str, text: str) -> Edit:
    """An edit: `text` in front of the first `before`."""

    def edit(source: str) -> str:
        assert before in source, before
        return source.replace(before, text + before, 1)

    return edit


def both(*edits: Edit) -> Edit:
    """One after the other."""

    def edit(source: str) -> str:
        for one in edits:
            source = one(source)
        return source

    return edit


class Checkout:
    """The checkout's files as git has them, changes included, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).splitlines():
            if (ROOT / name).is_file() and not name.startswith(("benchmarks/results", "tests/gpu/ledger")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._before = self._texts()

    def _texts(self) -> dict[str, bytes]:
        files = (p for p in self.folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in files}

    def add(self, files: Path) -> None:
        """New files: each of `files` has .txt behind its name."""
        for path in files.rglob("*.txt"):
            target = self.folder / path.relative_to(files).with_suffix("")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)

    def edit(self, edits: dict[str, Edit]) -> None:
        for name, edit in edits.items():
            (self.folder / name).write_text(edit((self.folder / name).read_text()))

    def touched(self) -> set[str]:
        """Existing files that changed."""
        now = self._texts()
        return {name for name, text in self._before.items() if now.get(name) != text}

    def python(self, *arguments: str | Path) -> str:
        command = [sys.executable, *map(str, arguments)]
        given = environment(PYTHONPATH=str(self.folder))
        done = subprocess.run(command, cwd=self.folder, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def lint_imports(self) -> None:
        command: list[str | Path] = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
        run(command, cwd=self.folder, env=environment(PYTHONPATH=str(self.folder)))
