from collections.abc import Mapping
from pathlib import Path

import pytest

from builder import sass
from builder.build import Table
from tests.builder import toys


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes the user's registry."""
    monkeypatch.setenv("CUBINERY_REGISTRY", str(tmp_path / "default.db"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return toys.write_sources(tmp_path / "src")


@pytest.fixture
def good(sources: Path) -> Table:
    """Three variants without a fault, one of them with a loop of mma.sync."""
    return toys.table(toys.variant(n=32), toys.variant(n=64), toys.variant("mma", n=96), folder=sources)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line for every PTX generation."""
    path = tmp_path / "calls"
    path.touch()
    monkeypatch.setenv(toys.CALLS, str(path))
    return path


DISASSEMBLE = sass.disassemble
_KNOWN: dict[tuple[bytes, str], list[sass.Instruction]] = {}


@pytest.fixture
def cached_nvdisasm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every distinct code is given to nvdisasm once a session: it takes 0.4 s to start, and toys come back often."""

    def disassemble(codes: Mapping[str, bytes], arch: str) -> dict[str, list[sass.Instruction]]:
        new = {name: code for name, code in codes.items() if (code, arch) not in _KNOWN}
        for name, instructions in (DISASSEMBLE(new, arch) if new else {}).items():
            _KNOWN[new[name], arch] = instructions
        return {name: _KNOWN[code, arch] for name, code in codes.items()}

    monkeypatch.setattr(sass, "disassemble", disassemble)
