"""One variant of the real table, compiled by the real DSL in two folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder import ROOT
from kernels import dispatch
from registry.contract import MAX_SMEM, Index
from registry.store import Store

KEY = next(v.key for v in dispatch.variants() if v.op == "fwd" and v.head_dim == 64)


def build(folder: Path, registry: Path, *argv: str) -> dict[str, Any]:
    """Run the builder in a checkout as a user would, under settings that must not matter."""
    scratch = registry.parent / "scratch 'of' $HOME \"ü\""
    scratch.mkdir(exist_ok=True)
    env = {**os.environ, "CUTE_DSL_ARCH": "sm_100a", "CUTE_DSL_LINEINFO": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env["TMPDIR"] = str(scratch)
    command = [sys.executable, "-m", "builder", "--registry", str(registry), "--only", KEY, "--json", *argv]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert list(scratch.iterdir()) == []
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "another" / "checkout"
    for name in ("builder", "kernels", "registry"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_two_folders_give_equal_digests_and_a_second_run_compiles_nothing(tmp_path: Path, copy: Path) -> None:
    archs = ("--arch", "sm_120", "--arch", "sm_90")
    first = build(ROOT, tmp_path / "first.db", *archs)
    other = build(copy, tmp_path / "other.db", *archs)
    assert first["variants"] == first["built"] == 1 and first["cached"] == 0
    assert first["index"] == other["index"] and first["bytes"] == other["bytes"]
    again = build(ROOT, tmp_path / "first.db", *archs)
    assert (again["built"], again["cached"], again["index"]) == (0, first["variants"], first["index"])
    assert again["seconds"] < 2
    with Store(tmp_path / "first.db") as store:
        assert store.verify() == []
        for arch, digest in first["index"].items():
            index = Index.from_bytes(store.get_index(digest) or b"")
            for a in index.artifacts:
                assert a.arch == arch and a.symbol.startswith("cubinery_fwd_bf16_d64_")
                assert a.smem + a.static_smem <= MAX_SMEM and a.blocks_per_sm >= 1
                assert dict(a.hot_loop)["HMMA"] >= 16
                assert str(ROOT) not in store.ptx_text(a.ptx_sha256)
