"""registry.store with several processes at once, and with one that dies."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from registry.store import Store
from tests.registry.samples import KEYS, artifact, fill

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]


def _start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_four_processes_open_a_new_file_at_once_and_write(tmp_path):
    """On five files, one after the other: a deferred BEGIN or an unguarded migration fails on nearly each."""
    for round_ in range(5):
        path, count = tmp_path / f"{round_}" / "r.db", 10
        path.parent.mkdir()
        workers = [_start("together", path, f"w{k}", count) for k in range(4)]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        Path(f"{path}.go").touch()
        for worker in workers:
            _, errors = worker.communicate(timeout=60)
            assert worker.returncode == 0, errors
        with Store(path, readonly=True) as store:
            counts = store.counts()
            assert (counts["ptx"], counts["artifacts"]) == (4 * count + 1, 4 * count)
            # The samples' artifacts name PTX that these writers never stored; nothing else is wrong.
            assert [line for line in store.verify() if "PTX" not in line] == []


def test_readers_never_fail_nor_see_half_a_release_while_another_process_writes(tmp_path):
    path = tmp_path / "r.db"
    writer = _start("write", path)
    try:
        assert writer.stdout.readline()
        seen = set()
        with Store(path, readonly=True, busy_timeout_s=0.5) as reader:
            deadline = time.monotonic() + 30
            while len(seen) < 20 and time.monotonic() < deadline:
                digest = reader.channel("stable")["sm_120"]
                seen.add(digest)
                for a in reader.index(digest).artifacts:
                    assert len(reader.get_frame(a.frame_sha256)) == a.frame_size
            assert len(seen) == 20
            assert reader.verify() == []
    finally:
        writer.kill()
        writer.communicate(timeout=10)


def test_a_killed_writer_leaves_a_sound_file_with_all_that_it_reported(tmp_path):
    path = tmp_path / "r.db"
    for round_ in range(3):
        writer = _start("write", path)
        reported = [writer.stdout.readline().strip() for _ in range(10 + round_)]
        writer.send_signal(signal.SIGKILL)
        reported += writer.communicate(timeout=10)[0].split()
        assert writer.returncode == -signal.SIGKILL
        with Store(path) as store:
            assert store.verify() == []
            assert {digest for digest in reported if len(digest) == 64} <= store.indexes().keys()
            store.put_artifact(f"after:{round_}", *artifact(KEYS[1], ptx_sha256=store.get_ptx("ptx:0").ptx_sha256))
            assert store.verify() == []


@pytest.mark.parametrize("readonly", ["readonly", "writable"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_user_without_rights_is_told_so(readonly, what):
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: only its owner may enter that
        path = Path(folder) / "r.db"
        with Store(path) as store:
            fill(store, KEYS[:1])
        path.chmod(0o000 if what == "file" else 0o444)
        Path(folder).chmod(0o755 if what == "file" else 0o555)
        worker = _start("unprivileged", path, readonly)
        output, errors = worker.communicate(timeout=30)
        Path(folder).chmod(stat.S_IRWXU)
    assert (output, errors) == ("permission\n", "")
