"""Processes that hang, die or run out of time, with stand-ins for the GPU's tests and for compute-sanitizer."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.benchmarks.fakes import artifact, write_registry
from tests.gpu import ledger, sanitize, verify, watchdog

KEY, OTHER = "fwd-bf16-d64-dv64-m64-n64-w4-s1", "kv_append-bf16-d256-dv256-m4"
SPIN = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # in C, with the interpreter's lock, for ages
HANG = 10.0  # s: longer than a process takes to begin on a busy machine


def program(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", textwrap.dedent(text)]


# ---- watch ----


@pytest.mark.parametrize("body", [SPIN, "import time; time.sleep(600)"])
def test_what_makes_no_progress_is_killed(body):
    began = time.monotonic()
    assert watchdog.watch(program(body), 0.5) is None
    assert time.monotonic() - began < 30


def test_what_ends_by_itself_gives_its_exit_code():
    assert watchdog.watch(program("raise SystemExit(76)"), 60) == 76
    assert watchdog.watch(program("import os; os.abort()"), 60) == -signal.SIGABRT


def test_each_change_of_a_file_begins_the_wait_anew(tmp_path):
    body = f"""
        import pathlib, time
        path = pathlib.Path({str(tmp_path / "progress")!r})
        for _ in range(8):
            path.unlink() if path.exists() else path.write_text("row")
            time.sleep(0.5)
    """
    assert watchdog.watch(program(body), 3, tmp_path / "progress") == 0


def gone(pid: int) -> bool:
    """Whether a process has ended; as an orphan it may be a zombie for good where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def soon(holds) -> bool:
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


PARENT = """
    import pathlib, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    pathlib.Path({path!r}).write_text(str(child.pid))
    {then}
"""


@pytest.mark.parametrize(("then", "code"), [("time.sleep(600)", None), ("raise SystemExit(3)", 3)])
def test_what_it_started_ends_with_it(then, code, tmp_path):
    path = tmp_path / "pid"
    assert watchdog.watch(program(PARENT.format(path=str(path), then=then)), 2) == code
    assert soon(lambda: gone(int(path.read_text())))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_watcher_ends_what_it_watches(number, tmp_path):
    path = tmp_path / "pid"
    command = program(PARENT.format(path=str(path), then="time.sleep(600)"))
    watcher = f"from tests.gpu import watchdog; watchdog.watch({command!r}, 600)"
    with subprocess.Popen([sys.executable, "-c", watcher], cwd=verify.ROOT, stderr=subprocess.DEVNULL) as process:
        assert soon(lambda: path.exists() and path.read_text() != "")
        process.send_signal(number)
        assert process.wait(60) != 0
    assert soon(lambda: gone(int(path.read_text())))


# ---- pytest ----

CONFTEST = f"""
    import sys, types
    from types import SimpleNamespace

    import pytest

    from tests.benchmarks.fakes import artifact
    from tests.gpu import conftest, ledger
    from tests.gpu.conftest import done, pytest_collection_modifyitems, recorded

    KEYS = {[KEY, OTHER]!r}
    conftest._context_lost = lambda: False
    import bodies
    sys.modules["tests.gpu.checks"] = SimpleNamespace(OPS=bodies.OPS, FULL=None)

    @pytest.fixture(scope="session")
    def dut():
        made = {{key: artifact(key, "sm_90")[0] for key in KEYS}}
        return SimpleNamespace(artifacts=made, force=lambda key: None)

    @pytest.fixture(scope="session")
    def run():
        import os, pathlib
        return ledger.Ledger(pathlib.Path(os.environ["CUBINERY_GPU_RUN"]), "a GPU", "1")
"""
TESTS = """
    import bodies, pytest
    from tests.gpu import every_variant

    @pytest.mark.parametrize(("key", "name"), bodies.CASES)
    def test_conformance(dut, done, recorded, key, name):
        every_variant.run(dut, done, recorded, key, name)
"""
BODIES = """
    import os, pathlib, time
    HERE = pathlib.Path(__file__).parent

    def body(key, name, code):
        def check(dut, key, scale):
            with (HERE / "began").open("a") as file:
                file.write(f"{{key}} {{name}}\\n")
            exec(code, globals())
        return check

    CHECKS = {checks!r}
    CASES = [(key, name) for key, checks in CHECKS.items() for name in checks]
    OPS = {{key.split("-")[0]: {{name: body(key, name, code) for name, code in checks.items()}}
           for key, checks in CHECKS.items()}}
"""


class Stand:
    """A folder of conformance tests that do as they are told, and `verify.run_pytest` over it."""

    def __init__(self, folder: Path, checks: dict[str, dict[str, str]]):
        self.folder, self.run = folder, folder / "ledger" / "run.jsonl"
        for name, text in (("conftest", CONFTEST), ("test_stand_in", TESTS)):
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        (folder / "bodies.py").write_text(textwrap.dedent(BODIES).format(checks=checks))

    def verify(self, ops: tuple[str, ...] = ("fwd", "kv_append"), resume: bool = False) -> int:
        options = argparse.Namespace(hang_after=HANG, ops=ops, resume=resume, pytest=["-p", "no:cacheprovider"])
        return verify.run_pytest(options, self.run, float("inf"))

    def results(self) -> list[tuple[str, str]]:
        return [(row["test"], row["result"]) for row in ledger.read(self.run)]

    def began(self) -> list[str]:
        return (self.folder / "began").read_text().splitlines()


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """Makes a Stand, whose ledger folder is the one that `--resume` reads."""
    monkeypatch.setattr(verify, "TESTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(verify.ROOT), str(tmp_path)]))
    monkeypatch.setenv("CUBINERY_LEDGER_DIR", str(tmp_path / "ledger"))

    def make(checks):
        made = Stand(tmp_path, checks)
        monkeypatch.setenv("CUBINERY_GPU_RUN", str(made.run))
        return made

    return make


def test_a_test_that_hangs_or_dies_costs_only_itself(stand, capfd):
    made = stand(
        {KEY: {"yardstick": "pass", "lse": SPIN, "strided": "os.abort()", "windows": "1 / 0", "empty": "pass"}}
    )
    assert made.verify() == 1
    found = [("yardstick", "pass"), ("lse", "hang"), ("strided", "fail"), ("windows", "fail"), ("empty", "pass")]
    assert made.results() == found
    assert made.began() == [f"{KEY} {test}" for test, _ in found]  # each once
    rows = ledger.read(made.run)
    assert {tuple(row) for row in rows} == {tuple(rows[0])} and {row["ptx_sha256"] for row in rows} == {
        artifact(KEY, "sm_90")[0].ptx_sha256
    }
    assert f"hung in lse of {KEY}" in capfd.readouterr().err


def test_when_the_time_is_over_the_running_test_ends_and_the_rest_waits(stand, tmp_path, monkeypatch):
    over = "os.environ['CUBINERY_GPU_STOP_AT'] = '0'"
    made = stand({KEY: {"yardstick": over, "lse": "pass", "strided": "1 / 0"}, OTHER: {"rotary": "pass"}})
    assert made.verify() == verify.UNFINISHED and made.results() == [("yardstick", "pass")]
    made.run = tmp_path / "ledger" / "next.jsonl"
    monkeypatch.setenv("CUBINERY_GPU_RUN", str(made.run))
    assert made.verify(ops=("fwd",), resume=True) == 1
    assert made.results() == [("lse", "pass"), ("strided", "fail")]  # and none of the other op
    assert made.verify(ops=("kv_append",), resume=True) == 0 and made.results()[2:] == [("rotary", "pass")]
    assert made.began() == [f"{KEY} yardstick", f"{KEY} lse", f"{KEY} strided", f"{OTHER} rotary"]
    monkeypatch.setenv("CUBINERY_GPU_RUN", str(tmp_path / "ledger" / "last.jsonl"))
    assert made.verify(resume=True) == 1 and made.began()[4:] == [f"{KEY} strided"]  # only what has not passed


def test_pytest_is_started_again_after_a_lost_context(tmp_path, monkeypatch):
    codes = [verify.LOST, verify.LOST, 0]
    options = verify._parser().parse_args([])
    monkeypatch.setattr(verify.watchdog, "watch", lambda *a, **k: codes.pop(0))
    assert verify.run_pytest(options, tmp_path / "run.jsonl", float("inf")) == 1 and not codes


@pytest.mark.parametrize("code", [1, 2, -signal.SIGSEGV, None])
def test_an_end_outside_any_test_is_a_failure(code, tmp_path, monkeypatch, capsys):
    options = verify._parser().parse_args([])
    monkeypatch.setattr(verify.watchdog, "watch", lambda *a, **k: code)
    assert verify.run_pytest(options, tmp_path / "run.jsonl", float("inf")) == 1
    assert ("pytest hung outside any conformance test" in capsys.readouterr().err) == (code is None)


def test_no_process_begins_once_the_time_is_over(tmp_path, monkeypatch):
    """A test that hangs beyond --stop-after is the last."""
    options = verify._parser().parse_args([])
    row = ledger.Ledger(tmp_path / "run.jsonl", "a GPU", "1").row(artifact(KEY, "sm_90")[0], "lse", "hang")

    def hung(command, hang_after, path, running, **how):
        running.write_text(json.dumps({**row, "date": "2026-11-21T05:38:00Z"}))

    monkeypatch.setattr(verify.watchdog, "watch", hung)
    assert verify.run_pytest(options, tmp_path / "run.jsonl", time.time()) == verify.UNFINISHED
    (found,) = ledger.read(tmp_path / "run.jsonl")
    assert found["result"] == "hang" and found["date"] >= row["date"]  # when it was killed, not when it began


# ---- sanitizers ----

KEYS = [f"fwd-bf16-d64-dv64-m{m}-n64-w4-s1" for m in (128, 32, 64)]  # in the order in which they are launched
SANITIZER = """\
#!{python} -S
import json, pathlib, sys, time
words = sys.argv[1:]
if "--keys" not in words:
    raise SystemExit(print("--kernel-name"))
log = pathlib.Path(words[words.index("--log-file") + 1])
stop = time.monotonic() + float(words[words.index("--stop-after") + 1])
def say(**event):
    print(json.dumps(event), flush=True)
say(event="device", gpu="G", arch="sm_90")
for key in words[words.index("--keys") + 1:]:
    if key.startswith("--"):
        break
    if time.monotonic() >= stop:
        say(event="stop")
        break
    {body}
    say(event="end", variant=key)
log.write_text("========= Error at cubinery_planted0_a_0\\n========= ERROR SUMMARY: 1 error\\n")
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on the PATH that does `body` for each `key`; gives `sanitize.main` with options."""
    registry = write_registry(tmp_path / "r.db", KEYS)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUBINERY_LEDGER_DIR", str(tmp_path / "ledger"))
    (tmp_path / "bin").mkdir()

    def make(body):
        script = tmp_path / "bin" / "compute-sanitizer"
        script.write_text(SANITIZER.format(python=sys.executable, body=body))
        script.chmod(0o755)
        return lambda *more: sanitize.main(
            ["--registry", str(registry), "--logs", str(tmp_path / "logs"), "--tools", "memcheck", *more]
        )

    return make


def start(name: str, tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "ledger" / f"{name}.jsonl"
    monkeypatch.setenv("CUBINERY_GPU_RUN", str(path))
    return path


def verdicts(path: Path) -> dict[str, str]:
    return {row["variant"]: row["result"] for row in ledger.read(path)}


def test_a_variant_that_hangs_under_a_sanitizer(sanitizer, tmp_path, monkeypatch, capsys):
    path = start("run", tmp_path, monkeypatch)
    run = sanitizer(f"key == {KEYS[1]!r} and time.sleep(600)")
    assert run("--hang-after", "3") == 1
    assert verdicts(path) == {KEYS[0]: "pass", KEYS[1]: "hang", KEYS[2]: "pass"}
    report = json.loads(ledger.sanitizers_report(path).with_name("run.sanitizers.json").read_text())["memcheck"]
    assert (report["hung"], report["failed"], report["left"]) == ([KEYS[1]], [], [])
    assert f"{KEYS[1]} (hang)" in capsys.readouterr().out


def test_sanitizers_in_pieces(sanitizer, tmp_path, monkeypatch, capsys):
    first = start("first", tmp_path, monkeypatch)
    run = sanitizer("time.sleep(max(0, stop + 0.1 - time.monotonic()) if stop < 1e9 else 0)")
    assert run("--stop-after", "0") == sanitize.UNFINISHED and verdicts(first) == {}
    run_slow = sanitizer(f"time.sleep(5 if key == {KEYS[1]!r} else 0)")
    assert run_slow("--stop-after", "4") == sanitize.UNFINISHED
    assert verdicts(first) == {KEYS[0]: "pass", KEYS[1]: "pass"}  # the one that ran to its end, and what was before
    second = start("second", tmp_path, monkeypatch)
    assert run("--resume", "--ops", "fwd") == 0 and verdicts(second) == {KEYS[2]: "pass"}
    assert run("--resume") == 0 and "the ledger has all of it already" in capsys.readouterr().out
    assert run("--ops", "bwd") == 1  # there is no such variant here, so that nothing was seen


@pytest.mark.parametrize("module", ["verify", "sanitize"])
def test_help_says_what_a_hang_is(module):
    command = [sys.executable, "-m", f"tests.gpu.{module}", "--help"]
    text = subprocess.run(command, cwd=verify.ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--hang-after SECONDS", "--stop-after SECONDS", "--resume", "--ops OP,OP"):
        assert option in text
    default = watchdog.HANG_AFTER * (watchdog.SLOWER if module == "sanitize" else 1)
    assert f"(default {default:.0f})" in re.sub(r"\s+", " ", text)
