"""The ledger of CPU execution: what has a record is left out, and a record that is stale or forged is noticed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels import dispatch
from tests.kernels import conftest, executed
from tests.kernels.executed import Ledger, Record

MODULE = "tests.kernels.test_sum_cpu"  # the smallest, of two variants
VARIANTS = [v.key for v in dispatch.variants() if v.op == "bwd_sum"]


def record(**changes: str) -> Record:
    made = Record(VARIANTS[0], executed.fingerprints()[VARIANTS[0]], "1" * 64, MODULE, executed.suite(MODULE))
    return made._replace(**changes)


def test_a_record_speaks_of_its_own_sources_alone():
    ledger = Ledger([record()])
    assert ledger.ptx(VARIANTS[0], record().fingerprint) == "1" * 64 and ledger.has("1" * 64, MODULE)
    assert not ledger.has("2" * 64, MODULE) and not ledger.has("1" * 64, "tests.kernels.test_combine_cpu")
    assert Ledger([record(fingerprint="f" * 64)]).ptx(VARIANTS[0], record().fingerprint) is None
    assert not Ledger([record(suite="f" * 64)]).has("1" * 64, MODULE), "a record of other tests"


def test_a_suite_is_all_that_its_tests_import():
    of = executed.closure([MODULE], packages=("tests",), folder=executed.ROOT)
    assert {"tests.ptx.machine", "tests.ptx.races", "tests.kernels.launch", MODULE} <= of.keys()
    assert executed.suite(MODULE) != executed.suite("tests.kernels.test_combine_cpu")


def test_a_test_that_asks_for_no_kernel_has_none_compiled():
    """The table's own tests have each variant as a parameter: for them alone, all were compiled."""
    variant = dispatch.variants()[0]

    def item(*fixtures: str) -> SimpleNamespace:
        found = SimpleNamespace(callspec=SimpleNamespace(params={"variant": variant}), fixturenames=fixtures)
        found.iter_markers = lambda _: ()
        return found

    assert list(conftest._needs(item("variant_of"))) == [variant.key] and list(conftest._needs(item())) == []


def test_writing_replaces_what_was_executed_anew(tmp_path: Path):
    path = tmp_path / "executed.jsonl"
    other = record(variant=VARIANTS[1])
    Ledger([record(), other]).write([record(suite="e" * 64)], path)
    assert Ledger.read(path).records == {other, record(suite="e" * 64)}
    for line in ("{}", "[]", "x", json.dumps(record()._asdict() | {"suite": 1})):
        path.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"executed\.jsonl:1: is no record"):
            Ledger.read(path)


def test_a_commit_picks_a_tenth_and_all_commits_together_everything():
    keys = [v.key for v in dispatch.variants()]
    commits = [f"{n:040x}" for n in range(200)]
    picked = [{key for key in keys if executed.is_picked(key, commit)} for commit in commits]
    assert set().union(*picked) == set(keys)
    assert 0.08 < sum(map(len, picked)) / len(picked) / len(keys) < 0.12
    assert all(executed.is_picked(key, "") for key in keys), "who cannot say which commit it is executes all"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Runs the tests of MODULE under a ledger of its own: (exit code, output)."""
    folder = tmp_path_factory.mktemp("executed")
    ledger = folder / "executed.jsonl"

    def run(commit: str, *options: str) -> tuple[int, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CUBINERY_"))}
        env |= {"CUBINERY_TEST_BUILD": str(folder), "CUBINERY_EXECUTED": str(ledger), "CUBINERY_COMMIT": commit}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        tests = f"{MODULE.replace('.', '/')}.py"
        done = subprocess.run([*command, tests], cwd=executed.ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return SimpleNamespace(ledger=ledger, tests=run)


def commit_that(picks: bool) -> str:
    found = (f"{n:040x}" for n in range(10_000))
    return next(c for c in found if all(executed.is_picked(key, c) == picks for key in VARIANTS))


def count(said: str, what: str) -> int:
    found = re.search(rf"(\d+) {what}", said)
    return int(found[1]) if found else 0


@pytest.mark.xdist_group("executed")
def test_only_a_run_writes_records_and_forged_or_stale_ones_are_noticed(run):
    idle, trying = commit_that(picks=False), commit_that(picks=True)
    code, said = run.tests(idle)
    every = count(said, "passed")
    assert code == 0 and every > len(VARIANTS) and not run.ledger.exists(), "a run of what is new records nothing"
    code, said = run.tests(idle, "--executed", "all")
    records = Ledger.read(run.ledger).records
    assert code == 0 and {r.variant for r in records} == set(VARIANTS) and {r.module for r in records} == {MODULE}
    code, said = run.tests(idle)
    assert code == 0 and count(said, "deselected") + count(said, "passed") == every > 2 * count(said, "passed")
    code, said = run.tests(trying)
    assert code == 0 and count(said, "passed") == every, "the commit picks both"
    # A fingerprint that gives PTX with a record: compiled, not executed.
    Ledger().write([r._replace(fingerprint="f" * 64) for r in records], run.ledger)
    code, said = run.tests(idle)
    assert code == 0 and count(said, "skipped") > len(VARIANTS) and count(said, "deselected") == 0
    # Tests that have changed since: executed.
    Ledger().write([r._replace(suite="e" * 64) for r in records], run.ledger)
    code, said = run.tests(idle)
    assert code == 0 and count(said, "passed") == every
    # Somebody wrote a record of PTX that these sources do not give: noticed when a commit picks it.
    Ledger().write([r._replace(ptx_sha256="d" * 64) for r in records], run.ledger)
    code, said = run.tests(trying)
    assert code == 1 and f"{VARIANTS[0]}: the ledger says that its sources give PTX dddd" in said
    code, said = run.tests(trying, "--executed", "all", "-k", "sum")
    assert code != 0 and "takes no -k" in said


BROKEN = f"""
def pytest_runtest_call(item):
    if item.name.startswith("test_parameters") and "{VARIANTS[0]}" in item.name:
        raise AssertionError("broken")
"""


@pytest.mark.xdist_group("executed")
def test_a_failure_leaves_no_record(run, monkeypatch: pytest.MonkeyPatch):
    run.ledger.unlink(missing_ok=True)
    (run.ledger.parent / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(run.ledger.parent))
    code, said = run.tests("0" * 40, "--executed", "all", "-p", "broken")
    assert code == 1 and count(said, "failed") == 1
    assert {r.variant for r in Ledger.read(run.ledger).records} == {VARIANTS[1]}
