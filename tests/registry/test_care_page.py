"""Every command of docs/care.md works, in its order, in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from registry import gc
from registry.__main__ import main
from registry.releases.publish import DAYS
from registry.store import Store
from tests.registry.releases import keys, release
from tests.registry.samples import fill

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/care.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def test_the_commands_do_what_the_page_says(tmp_path, monkeypatch):
    with Store(tmp_path / "registry.db") as store:
        digest = fill(store)["sm_120"]
        (tmp_path / "root.json").write_bytes(keys(store, tmp_path / "keys"))
        release(store, tmp_path / "keys")
        channels = store.channels()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBINERY_REGISTRY", "registry.db")
    assert {shlex.split(command)[3] for command in COMMANDS} == {"gc", "export", "import", "backup", "verify"}
    for command in COMMANDS:
        words = shlex.split(command.replace("DIGEST", digest))
        assert words[:3] == ["python", "-m", "registry"]
        assert main(words[3:]) == 0, command
    for name in ("release.db", "inside.db", "backup.db"):
        with Store(tmp_path / name, readonly=True) as store:
            assert store.channels() == channels and store.verify() == []
    with Store(tmp_path / "pinned.db", readonly=True) as store:
        assert store.channels() == {"stable": {"sm_120": digest}}
    assert len(list((tmp_path / "mirror/v1/indexes/sha256").iterdir())) == 2
    assert [p.name for p in (tmp_path / "stable-mirror/v1/indexes/sha256").iterdir()] == [digest]


OPTIONS = {"--keep": "gc", "--hours": "gc", "--channel": "export", "--arch": "export", "--root": "import"}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_options_in_its_prose_exist(option, capsys):
    with pytest.raises(SystemExit):
        main([OPTIONS[option], "--help"])
    assert f"`{option}" in PAGE and option in capsys.readouterr().out


def test_what_it_says_of_numbers():
    assert f"last {gc.KEEP_INDEXES} indexes" in PAGE and f"last {gc.KEEP_S / 3600:.0f} hours" in PAGE
    assert f"timestamps live for {DAYS['timestamp']}" in PAGE


def test_the_pages_that_it_names_exist():
    assert [name for name in re.findall(r"`(\w+\.md)`", PAGE) if not (ROOT / "docs" / name).exists()] == []
