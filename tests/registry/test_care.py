"""gc, export, import and backup from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from registry.__main__ import main
from registry.store import Store
from tests.registry.releases import keys, one_index, release
from tests.registry.samples import fill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Store(tmp_path / "r.db") as store:
        fill(store)
        keys(store, tmp_path / "keys")
        (tmp_path / "root.json").write_bytes(store.tuf("1.root.json") or b"")
        release(store, tmp_path / "keys")
        one_index(store, "gone", None)
        for table in ("blobs", "ptx", "artifacts", "indexes"):
            store._db.execute(f"UPDATE {table} SET added = added - 90000")
    return tmp_path / "r.db"


def run(capsys, *arguments: object, code: int = 0) -> str:
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr()
    return printed.out or printed.err


def test_gc(path, capsys):
    would = run(capsys, "gc", "--registry", path, "--dry-run")
    assert "would forget 1 indexes, 1 artifacts, 1 ptx, 2 blobs" in would
    found = json.loads(run(capsys, "gc", "--registry", path, "--dry-run", "--json"))
    assert found["dry_run"] is True and len(found["indexes"]) == 1
    assert "forgot 0 indexes" in run(capsys, "gc", "--registry", path, "--hours", "26")
    assert json.loads(run(capsys, "gc", "--registry", path, "--json")) == {**found, "dry_run": False}
    with Store(path) as store:
        for n in range(3):
            one_index(store, str(n))
    assert "forgot 1 indexes" in run(capsys, "gc", "--registry", path, "--hours", "0", "--keep", "2")


def test_export_and_import(path, capsys, tmp_path):
    assert "3 indexes, 7 blobs, 5 files of metadata, 1 channels" in run(
        capsys, "export", "--registry", path, tmp_path / "m"
    )
    done = json.loads(
        run(capsys, "export", "--registry", path, "--db", tmp_path / "b.db", "--channel", "stable", "--json")
    )
    assert (done["indexes"], done["files"], done["path"]) == (2, 1, str(tmp_path / "b.db"))
    for n, source in enumerate(("m", "b.db")):
        arguments = ("import", tmp_path / source, "--registry", tmp_path / f"{n}.db")
        assert "took in 6 blobs, 5 files" in run(capsys, *arguments, "--root", tmp_path / "root.json")
        assert run(capsys, "verify", "--registry", tmp_path / f"{n}.db")
    with Store(path, readonly=True) as store:
        digest = store.channel("stable")["sm_90"]
    arguments = ("import", tmp_path / "m", "--registry", tmp_path / "one.db", "--index", digest, "--channel", "mine")
    assert json.loads(run(capsys, *arguments, "--json"))["channels"] == {"mine": {"sm_90": digest}}


def test_backup(path, capsys, tmp_path):
    assert "sound" in run(capsys, "backup", "--registry", path, tmp_path / "b.db")
    run(capsys, "verify", "--registry", tmp_path / "b.db")
    assert json.loads(run(capsys, "backup", "--registry", path, tmp_path / "b.db", "--json"))["bytes"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "x.db"],
        ["import", "x.db", "--root", "r", "--index", "0" * 64],
        ["export"],
        ["export", "m", "--db", "x.db"],
        ["gc", "--keep", "0"],
        ["gc", "--hours", "-1"],
        ["gc", "--hours", "nan"],
        ["backup"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_errors_are_one_line_with_their_reason(path, capsys, tmp_path):
    for arguments, code, reason in (
        (["export", "--registry", path, tmp_path / "m", "--channel", "nope"], 1, "not_found"),
        (["export", "--registry", tmp_path / "none.db", tmp_path / "m"], 2, "missing"),
        (["export", "--registry", path, path], 2, "store"),
        (["import", "--registry", path, tmp_path / "none", "--index", "0" * 64], 2, "missing"),
        (["import", "--registry", path, tmp_path, "--root", tmp_path / "none"], 2, "missing"),
        (["import", "--registry", path, path, "--index", "0" * 64, "--channel", "a", "--channel", "b"], 2, "argument"),
        (["backup", "--registry", path, path], 2, "argument"),
    ):
        text = run(capsys, *arguments, code=code)
        assert text.endswith(f"[{reason}]\n") and text.count("\n") == 1, text
