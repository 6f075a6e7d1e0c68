"""Releases through real registries, servers and processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import runtime
from registry.__main__ import main
from registry.releases import publish, signing
from registry.releases.client import Known
from registry.store import Store
from runtime.errors import UntrustedError
from runtime.load import session
from tests.runtime.fakes import write_registry
from tests.soak.size import size

ROOT = Path(__file__).parents[2]


# -- a real registry, from a real server ------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder with a signed registry: r.db, keys, root.json."""
    write_registry(tmp_path / "r.db", only="bf16-d64")
    with Store(tmp_path / "r.db") as store:
        keys = signing.make_keys(tmp_path / "keys", dict.fromkeys(signing.ROLES, 1))
        now = publish.datetime.datetime.now(publish.datetime.timezone.utc)
        root = publish.create_root(store, keys, dict.fromkeys(signing.ROLES, 1), now)
    (tmp_path / "root.json").write_bytes(root)
    release(tmp_path)
    return tmp_path


def release(folder: Path) -> int:
    """Sign `stable` anew; returns the targets' version."""
    with Store(folder / "r.db") as store:
        draft = publish.Draft(store, signing.read_keys([folder / "keys"]))
        draft.publish("stable")
        draft.sign_targets()
        draft.commit()
        return draft.versions["targets"]


@contextlib.contextmanager
def serving(folder: Path, **environment: str):
    """The URL of `python -m server` on the folder's registry."""
    command = [sys.executable, "-m", "server", "--registry", folder / "r.db", "--port", "0"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env={**os.environ, **environment}, cwd=ROOT, **output)
    try:
        assert process.stdout is not None
        yield next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    finally:
        process.kill()
        process.communicate()


def test_a_cold_start_from_a_server_and_a_warm_one_without_it(released):
    settings = {"root": released / "root.json", "state": released / "state", "cache": released / "cache"}
    with serving(released) as url:
        runtime.configure(registry=url, **settings)
        cold = session.current().digests()
        index = session.current().index_for_arch("sm_120").whole
        session.current().cubin(index.artifacts[0])
    code = (
        "import json, sys, runtime\n"
        "from runtime.load import session\n"
        "now = session.current()\n"
        "index = now.index_for_arch('sm_120').whole\n"
        "now.cubin(index.artifacts[0])\n"
        "heavy = [n for n in sys.modules if n.split('.')[0] in ('tuf', 'securesystemslib', 'httpx2', 'urllib3')]\n"
        "print(json.dumps([now.digests(), heavy]))\n"
    )
    names = {f"CUBINERY_{name.upper()}": str(value) for name, value in settings.items()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBINERY_REGISTRY": url, **names}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [cold, []], "the server is gone, and neither TUF nor HTTP is imported"


def test_a_release_is_pushed_to_a_real_server(released, monkeypatch, capsys):
    """The server holds the timestamp key, the publisher the others and the token."""
    key = (released / "keys" / "timestamp-1.pem").rename(released / "timestamp.pem")
    with Store(released / "r.db") as store:
        release(released)
        expected = store.channel("stable")
    (released / "server").mkdir()
    token = "a token of some length"
    with serving(released / "server", CUBINERY_TOKEN=token, CUBINERY_TIMESTAMP_KEY=str(key)) as url:
        monkeypatch.setenv("CUBINERY_TOKEN", "another token of some length")
        assert main(["push", url, "--registry", str(released / "r.db")]) == 2
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("CUBINERY_TOKEN", token)
        assert main(["push", url, "--registry", str(released / "r.db")]) == 0
        runtime.configure(registry=url, root=released / "root.json", state=released / "s", cache=released / "c")
        index = session.current().index_for_arch("sm_120").whole
        assert session.current().digests() == expected and session.current().cubin(index.artifacts[0])


def test_a_foreign_file_and_a_mirror_s_folder_are_sources_too(released):
    from registry.export import to_folder

    with Store(released / "r.db", readonly=True) as store:
        to_folder(store, released / "mirror", [], [])
        expected = store.channel("stable")
    (released / "r.db").chmod(0o666)
    for registry in (released / "r.db", f"{released / 'mirror'}/"):
        runtime.configure(registry=registry, state=released / "state")
        with pytest.raises(UntrustedError) as error:
            session.current().digests()
        assert error.value.reason == "untrusted"
        runtime.configure(registry=registry, root=released / "root.json", state=released / "state")
        assert session.current().digests() == expected
        index = session.current().index_for_arch("sm_120").whole
        assert session.current().cubin(index.artifacts[0])


def test_session_refresh_brings_the_next_release(released):
    with serving(released) as url:
        runtime.configure(registry=url, root=released / "root.json", state=released / "s", cache=released / "c")
        now = session.current()
        first = now.digests()
        second = write_registry(released / "r.db", only="fp16-d64")
        release(released)
        assert now.digests() == first
        assert now.refresh() == now.digests() == second != first


WORKER = """
import json, sys, runtime
from runtime.load import session
from runtime.trust import resolve
runtime.configure(registry=sys.argv[1], root=sys.argv[2], state=sys.argv[3], cache=sys.argv[4])
now = session.current()
seen = []
for _ in range(int(sys.argv[5])):
    now.refresh()
    found = resolve.trusted(now.source, "stable", now.config)
    seen.append(found.version)
print(json.dumps(seen))
"""


def test_processes_that_refresh_at_once_neither_fail_nor_go_back(released):
    """16 processes on one state folder, while new releases and a new timestamp key come."""
    processes, rounds = 16, size(2, 40)
    folder = released / "state"
    seen: list[dict[str, int]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found = [path.read_bytes() for path in folder.glob("tuf-*.json")]
            seen.extend(Known.from_bytes(text).versions() for text in found)
            time.sleep(0.01)

    with serving(released) as url:
        arguments = [url, released / "root.json", folder, released / "cache", rounds]
        command = [sys.executable, "-c", WORKER, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        workers = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        watcher = threading.Thread(target=watch)
        watcher.start()
        releases = 1
        while any(worker.poll() is None for worker in workers):
            releases = release(released)
            time.sleep(0.1)
        stop.set()
        watcher.join()
        results = [(worker.communicate(timeout=60), worker.returncode) for worker in workers]
    assert [code for _, code in results] == [0] * processes, [error for (_, error), _ in results]
    for (output, _), _ in results:
        versions = json.loads(output)
        assert len(versions) == rounds and versions == sorted(versions)
    assert releases > 1 and seen, "releases came meanwhile, and were watched"
    for role in ("root", "timestamp", "snapshot", "targets"):
        found = [versions[role] for versions in seen]
        assert found == sorted(found), role
    assert not list(folder.glob("*.tmp"))
