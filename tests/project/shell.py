"""Running commands as a newcomer's shell would, and reading the files that hold them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without settings of Cubinery, make or Python that would leak into a command."""
    leaks = ("CUBINERY_", "MAKE", "MFLAGS", "PYTHON", "VIRTUAL_ENV", "TORCH", "VENV", "JOBS")
    return {name: value for name, value in os.environ.items() if not name.startswith(leaks)} | changes


def run(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Standard output of a command that must exit 0; else AssertionError with all that it said."""
    done = attempt(command, env=env, cwd=cwd)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def attempt(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A finished command, whatever its exit code."""
    env = environment() if env is None else env
    return subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(keyword, arguments) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(parts[0], parts[1]) for line in joined.splitlines() if len(parts := line.split(None, 1)) == 2]


def only(pairs: list[tuple[str, str]], keyword: str) -> str:
    """The arguments of the one instruction with this keyword."""
    (found,) = [arguments for name, arguments in pairs if name == keyword]
    return found


def exec_form(arguments: str) -> list[str]:
    """The words of `CMD [...]`, also behind HEALTHCHECK's options."""
    words = json.loads(arguments[arguments.index("[") :])
    assert isinstance(words, list)
    return words


def stage(pairs: list[tuple[str, str]], target: Path) -> None:
    """Lay the files that COPY names under `target`, as WORKDIR of the image would have them."""
    target.mkdir()
    for arguments in (rest for name, rest in pairs if name == "COPY"):
        *sources, destination = arguments.split()
        for source in sources:
            origin = ROOT / source
            if origin.is_dir():
                shutil.copytree(origin, target / destination, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
            else:
                shutil.copy(origin, target / destination)
