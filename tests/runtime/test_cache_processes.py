"""The disk cache under many processes: a cold start together, and kill −9 in the middle of writing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.sources.cache import DiskCache
from tests.project.shell import ROOT
from tests.soak.size import size


def program(name: str, **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.runtime.cache_programs", name, json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_many_processes_starting_cold_download_each_kernel_once(tmp_path: Path, record_property):
    """Bar 3: 64 processes, 100 kernels, one cache: 100 blob downloads (and one of the index)."""
    processes, kernels = 64, 100
    report = program("cold", processes=processes, kernels=kernels, locks="work", folder=str(tmp_path / "c"))
    assert report["failed"] == []
    assert len(report["downloads"]) == kernels + 1 and set(report["downloads"].values()) == {1}
    record_property("cold_start", f"{processes} processes, {kernels} kernels, {report['seconds']} s")


@pytest.mark.parametrize("locks", ["refused", "ignored"])
def test_without_working_locks_a_cold_start_still_succeeds(tmp_path: Path, locks: str):
    processes, kernels = size(8, 64), size(10, 100)
    report = program("cold", processes=processes, kernels=kernels, locks=locks, folder=str(tmp_path / "c"))
    assert report["failed"] == [] and len(report["downloads"]) == kernels + 1
    assert max(report["downloads"].values()) > 1, "the stub did stand in for the locks"


def test_processes_that_share_a_small_cache_take_each_others_entries_away(tmp_path: Path):
    """Each load is still right, and in the end the limit holds."""
    report = program("cold", processes=8, kernels=20, locks="work", folder=str(tmp_path / "c"), limit=40_000)
    assert report["failed"] == [] and len(report["downloads"]) == 21
    assert DiskCache(str(tmp_path / "c")).usage().nbytes <= 40_000


def test_kill_9_in_the_middle_of_writing_leaves_whole_entries(tmp_path: Path, record_property):
    """Bar 2, the client's part: killed in system calls between a temporary file's opening and the folder's fsync."""
    count = size(60, 500)
    report = program("crash", seed=6, count=count, kernels=8, lives=10, folder=str(tmp_path))
    assert report["problems"] == []
    assert sum(report["killed"].values()) == count
    assert {"open", "write", "fsync", "close", "rename"} <= report["killed"].keys()
    record_property("kills", json.dumps(report["killed"]))
