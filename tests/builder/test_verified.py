import json
from pathlib import Path
from typing import Any

import pytest

from builder.errors import LedgerError
from builder.verified import FOLDER, Conformance, Verified

SHA = "a" * 64


def record(
    test: str = "yardstick", result: str = "pass", date: str | None = "2026-11-21T10:00:00Z", **changed: Any
) -> str:
    fields = {"ptx_sha256": SHA, "variant": "k", "arch": "sm_90", "suite": 2, "gpu": "H200", "driver": "580"}
    return json.dumps({**fields, "test": test, "result": result, "date": date, **changed})


def folder(tmp_path: Path, **runs: list[str]) -> Path:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "conformance.json").write_text('{"suite": 2, "ops": {"fwd": ["yardstick", "lse"]}}')
    for name, lines in runs.items():
        (tmp_path / "ledger" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def lacking(tmp_path: Path, **runs: list[str]) -> list[str]:
    return Verified.read(folder(tmp_path, **runs)).lacking(SHA, "fwd")


def test_a_pass_of_every_test_verifies(tmp_path: Path) -> None:
    assert lacking(tmp_path, one=[record()], two=["", record("lse"), record("unlisted", "fail")]) == []


def test_nothing_run_and_unknown_ops_are_not_verified(tmp_path: Path) -> None:
    found = Verified.read(folder(tmp_path))
    assert found.lacking(SHA, "fwd") == ["yardstick: never run", "lse: never run"]
    assert "op bwd" in found.lacking(SHA, "bwd")[0]


def test_other_suites_and_other_ptx_do_not_count(tmp_path: Path) -> None:
    lines = [record(suite=1), record(suite=3), record(ptx_sha256="b" * 64), record("lse")]
    assert lacking(tmp_path, one=lines) == ["yardstick: never run"]


@pytest.mark.parametrize(
    ("runs", "verified"),
    [
        ({"b": [record(result="fail", date="2026-11-21")], "a": [record(date="2026-11-22")]}, True),  # mended since
        ({"a": [record(date="2026-11-21")], "b": [record(result="fail", date="2026-11-22")]}, False),
        ({"a": [record(result="fail")], "b": [record()]}, False),  # of equal dates a fail counts
        ({"a": [record()], "b": [record(result="fail")]}, False),
        ({"a": [record(result="fail", date="1"), record(date="2")]}, False),  # one case of a test that failed
    ],
)
def test_the_latest_run_counts(tmp_path: Path, runs: dict[str, list[str]], verified: bool) -> None:
    found = lacking(tmp_path, **runs, lse=[record("lse")])
    assert found == ([] if verified else ["yardstick: fail"])


@pytest.mark.parametrize("line", ["{", "[]", record(result="maybe"), record(suite="2"), record(date=None)])
def test_a_line_that_does_not_read_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(LedgerError, match=r"bad\.jsonl:2"):
        Verified.read(folder(tmp_path, bad=[record(), line]))


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"suite": 1}', '{"suite": "1", "ops": {}}', '{"suite": 1, "ops": {"fwd": [1]}}']
)
def test_a_conformance_list_that_does_not_read_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "conformance.json").write_text(text)
    with pytest.raises(LedgerError, match=r"conformance\.json"):
        Conformance.read(tmp_path)


def test_the_checkouts_own_files_read() -> None:
    assert Verified.read(FOLDER).conformance.ops["fwd"]
