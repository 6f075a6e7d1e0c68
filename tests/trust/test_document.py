"""docs/trust.md: its commands are run, in their order, against a registry and a server; its links and figures hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import registry.__main__
import runtime.cli.commands
import server.__main__
from registry.releases import push
from registry.releases.publish import DAYS
from registry.store import Store
from runtime.sources import remote as server_source
from server.app import create_app
from server.upload import Settings
from tests.runtime.fakes import write_registry

PAGE = Path(__file__).parents[2] / "docs" / "trust.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
URL = "https://kernels.example.com"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with a registry, and at URL a server that has nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBINERY_REGISTRY", str(tmp_path / "registry.db"))
    monkeypatch.setenv("CUBINERY_TOKEN", "a token of some length")
    application = create_app(tmp_path / "server.db", Settings("a token of some length"))
    with TestClient(application, base_url=URL) as client:
        real = push.Push.__init__
        monkeypatch.setattr(client, "close", lambda: None)  # it is asked again after the push
        monkeypatch.setattr(push.Push, "__init__", lambda self, *given: real(self, *given, client))

        def get(self, path: str, cap: int) -> bytes:
            answer = client.get(path)
            if answer.status_code == 404:
                raise server_source.SourceError(f"no {path}", reason="missing")
            return answer.content

        monkeypatch.setattr(server_source.HttpSource, "_get", get)
        yield tmp_path


def test_every_command_works(machine, monkeypatch, capsys):
    built = iter([write_registry(machine / "registry.db", only=only)["sm_120"] for only in ("fp16-d64", "bf16", "")])
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "export":
            name, value = words[1].split("=")
            # The page names a folder of root's; here the root lies where `keys` wrote it.
            monkeypatch.setenv(name, value.replace("/etc/cubinery/", str(machine / "keys") + "/"))
            continue
        while "=" in words[0] or words[0] == "token)":  # settings before the command, of which one is $(cat token)
            words.pop(0)
        assert words[:2] == ["python", "-m"], command
        module, arguments = words[2], words[3:]
        if module == "server":
            server.__main__._parser().parse_args(arguments)
            continue
        arguments = [next(built) if word == "DIGEST" else word for word in arguments]
        if "rollback" in arguments and "--to" not in arguments:
            write_registry(machine / "registry.db", only="bf16-d64")
            assert registry.__main__.main(["publish", "--keys", "keys"]) == 0
        code = {"registry": registry.__main__, "runtime": runtime.cli.commands}[module].main(arguments)
        said = capsys.readouterr()
        assert code == 0, f"{command}: {said.out}{said.err}"
        if "keys" in arguments[:1]:
            assert (machine / "keys" / "root.json").is_file()
    with Store(machine / "registry.db", readonly=True) as store:
        assert store.tuf("4.root.json") is not None, "three rotations"


def test_settings_before_a_command_are_real_ones():
    named = set(re.findall(r"\bCUBINERY_[A-Z_]+\b", TEXT))
    folders = [path for room in ("runtime", "server", "registry") for path in (PAGE.parents[1] / room).rglob("*.py")]
    sources = "".join(path.read_text() for path in folders)
    known = {f"CUBINERY_{name.upper()}" for name in runtime.config._READERS}
    assert named and not [name for name in named if name not in sources and name not in known]


def test_lives_are_those_of_the_code():
    stated = dict(re.findall(r"^\| (\w+) \| .* \| (\d+) days", TEXT, re.MULTILINE))
    assert {role: int(days) for role, days in stated.items()} == DAYS


def test_pages_that_it_names_exist():
    names = set(re.findall(r"`(\w+\.md)`", TEXT))
    assert names and all((PAGE.parent / name).is_file() for name in names)
