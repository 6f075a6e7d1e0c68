"""Where settings come from: configure, environment, configuration file, defaults. And docs/settings.md, executed."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from registry.store import StoreError, default_path
from runtime import config
from runtime.cli import commands as cli
from runtime.errors import ConfigError
from runtime.load import session
from runtime.sources.cache import LIMIT
from tests.project.shell import ROOT, environment

PAGE = (ROOT / "docs/settings.md").read_text()
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64

# name: (what configure gets, what the variable says, what the file says, and what each of them becomes); /f is the
# file's folder
VALUES: dict[str, tuple[Any, str, str, tuple[Any, Any, Any]]] = {
    "registry": ("/a.db", "https://b.test/", '"c/"', ("/a.db", "https://b.test", "/f/c/")),
    "index": (
        ONE,
        f"sm_120={TWO}",
        f'{{sm_90 = "{THREE}"}}',
        (((None, ONE),), (("sm_120", TWO),), (("sm_90", THREE),)),
    ),
    "cache": ("/a", "/b", '"c"', ("/a", "/b", "/f/c")),
    "channel": ("a", "b", '"c"', ("a", "b", "c")),
    "offline": (False, "1", "true", (False, True, True)),
    "root": ("/a", "/b", '"/c"', ("/a", "/b", "/c")),
    "state": ("/a", "/b", '"./c"', ("/a", "/b", "/f/c")),
    "max_age": (0, "2.5", "3", (0.0, 2.5, 3.0)),
    "lock": ("/a", "/b", '"c"', ("/a", "/b", "/f/c")),
    "cache_limit": (0, "2K", '"3 "', (0, 2048, 3)),
}
FIELDS = {"index": "pins"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the user's configuration file is looked for."""
    path = tmp_path / "home" / "config" / "cubinery" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def found(name: str) -> Any:
    return getattr(config.current(), FIELDS.get(name, name))


@pytest.mark.parametrize("name", VALUES)
def test_configure_over_environment_over_file_over_default(name: str, file: Path, monkeypatch: pytest.MonkeyPatch):
    given, variable, line, becomes = VALUES[name]
    expected = str(file.parent) + becomes[2][2:] if str(becomes[2]).startswith("/f/") else becomes[2]
    default = found(name)
    file.write_text(f"{name} = {line}\n")
    assert found(name) == expected != default
    monkeypatch.setenv(f"CUBINERY_{name.upper()}", variable)
    assert found(name) == becomes[1]
    runtime.configure(**{name: given})
    assert found(name) == becomes[0]
    runtime.configure()
    monkeypatch.setenv(f"CUBINERY_{name.upper()}", "")
    assert found(name) == expected, "an empty variable says nothing"


def test_every_setting_is_covered_and_documented():
    assert VALUES.keys() == config._READERS.keys()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (`--(\S+)`)? ?\|", PAGE, re.MULTILINE)
    assert [row[0] for row in rows] == list(dict.fromkeys(row[0] for row in rows)) and {row[0] for row in rows} == {
        *VALUES
    }
    for name, variable, _, option in rows:
        assert variable == f"CUBINERY_{name.upper()}" and option in ("", name.replace("_", "-"))


def test_the_page_has_every_variable_that_the_runtime_reads():
    read = {
        name
        for path in (ROOT / "runtime").glob("*.py")
        for name in re.findall(r"CUBINERY_[A-Z_]*[A-Z]", path.read_text())
    }
    assert read and read <= set(re.findall(r"CUBINERY_[A-Z_]+", PAGE))


def test_a_file_named_by_the_environment(tmp_path: Path, file: Path, monkeypatch):
    file.write_text('channel = "users"')
    other = tmp_path / "other.toml"
    other.write_text('channel = "others"')
    monkeypatch.setenv("CUBINERY_CONFIG", str(other))
    assert config.current().channel == "others"
    other.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        config.current()


@pytest.mark.parametrize("text", [
    b"channel", b"\xff", b"#" * 70_000, b"[" * 60_000, b'chanel = "x"', b"[channel]\nx = 1", b"channel = 3",
    b"offline = 1", b'max_age = "soon"', b"max_age = -1", b"max_age = true", b'cache_limit = "4X"',
    b"cache_limit = -1", b"cache_limit = 1.5", b'index = "123"', b'registry = "ftp://x"',
    b'registry = ""', b"cache = 5", b'lock = "a\\u0000b"',
], ids=lambda text: repr(text[:20]))  # fmt: skip
def test_files_that_cannot_be_used(file: Path, text: bytes):
    file.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        config.current()
    assert str(file) in str(error.value) or b"ftp" in text


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_threat_a_configuration_file_that_others_can_write(file: Path, mode: int, capsys):
    file.write_text('channel = "x"')
    file.chmod(mode)
    with pytest.raises(ConfigError, match="nobody else can write"):
        config.current()
    assert cli.main(["explain", "--arch", "sm_120"]) == 2


def test_threat_a_configuration_file_of_another_user(file: Path, monkeypatch):
    file.write_text('channel = "x"')
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:4], 12345, *real(fd)[5:])))
    with pytest.raises(ConfigError, match="nobody else can write"):
        config.current()


@pytest.mark.parametrize("value, nbytes", [
    ("0", 0), ("5", 5), ("1K", 1024), ("2M", 2 << 20), ("3G", 3 << 30), ("1T", 1 << 40), (" 7 ", 7), (9, 9),
])  # fmt: skip
def test_sizes(value: Any, nbytes: int):
    runtime.configure(cache_limit=value)
    assert config.current().cache_limit == nbytes


@pytest.mark.parametrize("value", ["", "G", "1.5G", "-1", "4 G", "1KB", -1, 1.5, True, None.__class__, "9" * 99])
def test_sizes_that_are_none(value: Any):
    with pytest.raises(ConfigError, match="cache_limit"):
        runtime.configure(cache_limit=value)
    assert config.current().cache_limit == LIMIT


@pytest.mark.parametrize("text, value", [("0", False), ("1", True), ("true", True), ("False", False)])
def test_flags_of_the_environment(text: str, value: bool, monkeypatch):
    monkeypatch.setenv("CUBINERY_OFFLINE", text)
    assert config.current().offline is value
    monkeypatch.setenv("CUBINERY_OFFLINE", "maybe")
    with pytest.raises(ConfigError, match="CUBINERY_OFFLINE"):
        config.current()


def test_the_limit_reaches_the_cache(tmp_path: Path):
    runtime.configure(registry="http://registry.test", cache=tmp_path, cache_limit="5M", index=ONE)
    assert session.current().source.cache.limit == 5 << 20


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a uid without a passwd entry, as containers have them."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "CUBINERY_REGISTRY"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)


@pytest.mark.usefixtures("homeless", "backend")
def test_without_a_home_folder_what_needs_none_works(registry: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~/.config/cubinery").mkdir(parents=True)  # no file of the working folder is taken for the user's
    (tmp_path / "~/.config/cubinery/config.toml").write_text("nonsense")
    runtime.configure(registry=registry)
    q = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16)
    assert runtime.flash_attn(q, q, q).shape == q.shape
    runtime.configure(registry="http://registry.test", cache=tmp_path / "cache", index=ONE)
    assert session.current().source.cache.root == str(tmp_path / "cache")


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(("given", "named"), [({}, "CUBINERY_REGISTRY"), ({"registry": "http://registry.test"},
                                                                          "CUBINERY_CACHE")])  # fmt: skip
def test_without_a_home_folder_what_needs_one_is_named(given, named: str):
    runtime.configure(**given, index=ONE)
    with pytest.raises(ConfigError, match=f"{named} is not set, and this user has no home folder"):
        session.current()


@pytest.mark.usefixtures("homeless")
def test_nor_has_the_builder_a_default_file():
    with pytest.raises(StoreError, match="no home folder: name one with --registry"):
        default_path()


def test_the_commands_of_the_page_work(registry: Path, tmp_path: Path):
    """In the order of the page, in a folder of their own, with a registry of toy kernels."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 6
    work = tmp_path / "work"
    work.mkdir(mode=0o700)
    (work / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (work / "python").chmod(0o755)
    env = environment(
        CUBINERY_REGISTRY=str(registry), HOME=str(tmp_path), PATH=f"{work}:{os.environ['PATH']}", PYTHONPATH=str(ROOT)
    )
    env = {name: value for name, value in env.items() if not name.startswith("XDG_")}
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=work, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (work / "cubinery.lock").is_file()


def test_the_example_file_of_the_page_is_one(file: Path):
    (example,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    file.write_text(example)
    found = config.current()
    assert found.registry == "https://kernels.example.com" and found.root == str(file.with_name("root.json"))
    assert found.cache_limit == 2 << 30 and found.max_age == 604800
