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


SM_120 = [record(arch="sm_120"), record("lse", arch="sm_120")]
SM_90 = [record(), record("lse")]
LATER = {"arch": "sm_120", "date": "2026-11-22T10:00:00Z"}


@pytest.mark.parametrize(
    ("runs", "archs", "missing"),
    [
        ({"a": SM_90}, ["sm_90"], []),  # nothing is known of sm_120
        ({"a": SM_90, "b": SM_120}, ["sm_120", "sm_90"], []),
        ({"a": SM_90, "b": [record(arch="sm_120"), record("lse", "fail", arch="sm_120")]}, ["sm_90"],
         ["lse: fail on sm_120"]),
        ({"a": [*SM_90, record("lse", "hang", arch="sm_120")]}, ["sm_90"], ["lse: hang on sm_120"]),
        ({"a": [record("lse", "fail", arch="sm_120", date="1")], "b": SM_90}, ["sm_90"], ["lse: fail on sm_120"]),
        ({"a": [*SM_90, record("lse", "fail", arch="sm_120")], "b": [record("lse", **LATER), record(**LATER)]},
         ["sm_120", "sm_90"], []),  # mended since
        ({"a": SM_90, "b": [record("lse", "fail", **LATER), *SM_120]}, ["sm_90"], ["lse: fail on sm_120"]),
        ({"a": [record(), record("lse", arch="sm_120")]}, [], ["yardstick: never run on sm_120"]),  # neither has both
        ({"a": [record("lse", "hang"), record()]}, [], ["lse: hang on sm_90"]),
    ],
)  # fmt: skip
def test_each_architecture_stands_for_itself(
    tmp_path: Path, runs: dict[str, list[str]], archs: list[str], missing: list[str]
) -> None:
    found = Verified.read(folder(tmp_path, **runs))
    assert (found.architectures(SHA, "fwd"), found.lacking(SHA, "fwd")) == (archs, missing)


def test_several_folders_are_one_ledger(tmp_path: Path) -> None:
    for name, lines in {"a": [record()], "b": [record("lse")]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.jsonl").write_text("\n".join(lines))
    found = Verified.read(folder(tmp_path), [tmp_path / "a", tmp_path / "b", tmp_path / "none"])
    assert found.architectures(SHA, "fwd") == ["sm_90"]


def test_nothing_run_and_unknown_ops_are_not_verified(tmp_path: Path) -> None:
    found = Verified.read(folder(tmp_path))
    assert found.lacking(SHA, "fwd") == ["yardstick: never run", "lse: never run"]
    assert "op bwd" in found.lacking(SHA, "bwd")[0]


def test_other_suites_and_other_ptx_do_not_count(tmp_path: Path) -> None:
    lines = [record(suite=1), record(suite=3), record(ptx_sha256="b" * 64), record("lse")]
    assert lacking(tmp_path, one=lines) == ["yardstick: never run on sm_90"]


@pytest.mark.parametrize(
    ("runs", "verified"),
    [
        ({"b": [record(result="fail", date="2026-11-21")], "a": [record(date="2026-11-22")]}, True),  # mended since
        ({"a": [record(date="2026-11-21")], "b": [record(result="fail", date="2026-11-22")]}, False),
        ({"a": [record(result="fail")], "b": [record()]}, False),  # of equal dates a fail counts
        ({"a": [record()], "b": [record(result="fail")]}, False),
        ({"a": [record(result="fail", date="1"), record(date="2")]}, False),  # one case of a test that failed
        ({"a": [record(date="1"), record(result="fail", date="2")]}, False),
    ],
)
def test_the_latest_run_counts(tmp_path: Path, runs: dict[str, list[str]], verified: bool) -> None:
    found = lacking(tmp_path, **runs, lse=[record("lse")])
    assert found == ([] if verified else ["yardstick: fail on sm_90"])


@pytest.mark.parametrize("results", [("hang", "pass"), ("pass", "hang"), ("fail", "hang"), ("hang", "fail")])
@pytest.mark.parametrize("together", [True, False])
def test_a_hang_is_a_fail(tmp_path: Path, results: tuple[str, str], together: bool) -> None:
    """In one run, and in two of the same date."""
    lines = [record(result=result) for result in results]
    runs = {"a": lines} if together else {"a": lines[:1], "b": lines[1:]}
    assert lacking(tmp_path, **runs, lse=[record("lse")]) == ["yardstick: hang on sm_90"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("\udcff", "not JSON"),
        (record(result="maybe"), "result 'maybe' is none of hang, fail, pass"),
        (record(suite="2"), "suite missing or of the wrong type"),
        (record(date=None), "date missing or of the wrong type"),
        (json.dumps({k: v for k, v in json.loads(record()).items() if k not in ("arch", "gpu")}), "arch, gpu missing"),
    ],
)
def test_a_line_that_does_not_read_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = folder(tmp_path, good=[record()]) / "ledger" / "bad.jsonl"
    path.write_bytes(f"{record()}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(LedgerError, match=rf"bad\.jsonl:2: {what}"):
        Verified.read(tmp_path)


def test_a_run_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (folder(tmp_path) / "ledger" / "bad.jsonl").mkdir()
    with pytest.raises(LedgerError, match=r"bad\.jsonl"):
        Verified.read(tmp_path)


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
