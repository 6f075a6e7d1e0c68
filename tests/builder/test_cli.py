import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from builder import ROOT, verified
from builder.__main__ import FIELDS, main
from builder.build import Table
from registry.contract import Index
from registry.store import Store
from tests.builder import toys

pytestmark = pytest.mark.usefixtures("cached_nvdisasm")


def run_json(capsys: pytest.CaptureFixture[str], table: Table, *argv: str) -> tuple[int, dict[str, Any]]:
    code = main([*argv, "--json"], lambda: table)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json_is_printed_last_and_states_the_build(
    good: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.db"
    code, first = run_json(capsys, good, "--registry", str(path))
    assert code == 0
    assert first.keys() == {
        *("variants", "built", "cached", "bytes", "seconds", "failed", "unverified", "verified", "index", "moved"),
        "lacking",
    }
    assert (first["moved"], first["lacking"]) == (["sm_120"], {})
    assert (first["unverified"], first["verified"]) == ([], None)  # that was not asked for
    assert (first["variants"], first["built"], first["cached"], first["failed"]) == (3, 3, 0, [])
    with Store(path, readonly=True) as store:
        index = Index.from_bytes(store.get_index(first["index"]) or b"")
    assert first["bytes"] == sum(a.cubin_size for a in index.artifacts)
    assert isinstance(first["seconds"], float)
    code, second = run_json(capsys, good, "--registry", str(path))
    assert (code, second["built"], second["cached"], second["index"]) == (0, 0, 3, first["index"])
    code, both = run_json(
        capsys, good, "--registry", str(path), "--arch", "sm_120", "--arch", "sm_90", "--arch", "sm_90"
    )
    assert code == 0 and both["index"].keys() == {"sm_120", "sm_90"} and both["index"]["sm_120"] == first["index"]


def test_the_default_registry_and_the_end_table(good: Table, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], lambda: good) == 0
    out = capsys.readouterr().out
    for variant in good.variants:
        assert variant.key in out
    assert Path(os.environ["CUBINERY_REGISTRY"]).exists()
    with Store(os.environ["CUBINERY_REGISTRY"], readonly=True) as store:
        assert store.channel("stable")["sm_120"] in out
    assert "3 built, 0 cached, 0 failed" in out and "now channel stable" in out


def test_a_failure_is_reported_with_its_reason_and_exit_code_1(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = toys.table(toys.variant("raises"), toys.variant(), folder=sources)
    code, found = run_json(capsys, table)
    assert code == 1 and (found["variants"], found["built"]) == (2, 1)
    (failure,) = found["failed"]
    assert failure["key"] == toys.variant("raises").key and failure["reason"].startswith(
        "generate: ValueError: planted"
    )
    assert main([], lambda: table) == 1
    out = capsys.readouterr().out
    assert f"FAILED {failure['key']}: generate: ValueError" in out and "channel stable left as it was" in out


def test_nothing_indexed_gives_no_digest(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, toys.table(toys.variant("raises"), folder=sources))
    assert code == 1 and found["index"] is None


def test_dry_run_lists_and_writes_nothing(good: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "r.db"
    code, found = run_json(capsys, good, "--dry-run", "--registry", str(path))
    assert code == 0 and not path.parent.exists()
    assert found["would_build"] == [{"key": v.key, "archs": ["sm_120"]} for v in good.variants]
    assert (found["variants"], found["built"], found["cached"], found["index"]) == (3, 0, 0, None)
    assert main(["--registry", str(path)], lambda: good) == 0
    capsys.readouterr()
    before = path.read_bytes()
    code, found = run_json(capsys, good, "--dry-run", "--registry", str(path), "--arch", "sm_120", "--arch", "sm_90")
    assert {tuple(w["archs"]) for w in found["would_build"]} == {("sm_90",)}
    assert main(["--dry-run", "--registry", str(path)], lambda: good) == 0
    assert "0 of 3 variants would be built" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_only_and_op_pick_variants(good: Table, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, good, "--op", "toy", "--only", "*-n3?")
    assert code == 0 and (found["variants"], found["built"]) == (1, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "toy-bf16-d64-dv64-m64-n65"], "near: toy-bf16-d64-dv64-m64-n64"),
        (["--only", "*zzz*"], "matches none of 3 variants; near: toy-"),
        (["--op", "fwd"], "--op fwd: the table has toy"),
        (["--arch", "sm_120a"], "--arch sm_120a: not one of sm_80, "),
        (["--arch", "gfx90a"], "--arch gfx90a: not one of"),
        (["--channel", "No Channel"], "--channel: 'No Channel' is not"),
        (["--jobs", "0"], "'0' is not a positive whole number"),
        (["--jobs", "many"], "'many' is not a positive whole number"),
        (["--frobnicate"], "unrecognized arguments"),
        (["--js"], "unrecognized arguments: --js"),
        (["--registry", "http://localhost:8000/"], "'http://localhost:8000/' is a URL; the builder writes a file"),
        (["--dry-run", "--require-verified"], "--require-verified is about PTX that was built"),
    ],
)
def test_usage_errors_exit_2_and_say_what_would_do(
    argv: list[str], message: str, good: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv, lambda: good) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1
    code, found = run_json(capsys, good, *argv)
    assert code == 2 and found["error"]["reason"] == "usage" and message in found["error"]["message"]
    assert found["variants"] is None and found["index"] is None
    assert not Path(os.environ["CUBINERY_REGISTRY"]).exists()


def test_other_errors_exit_1_in_one_line(good: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.db"
    path.write_bytes(b"no database at all" * 1000)
    assert main(["--registry", str(path)], lambda: good) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("builder: not_a_registry: ")
    code, found = run_json(capsys, good, "--registry", str(path))
    assert code == 1 and found.keys() == {*FIELDS, "error"} and found["error"]["reason"] == "not_a_registry"


@pytest.mark.parametrize("name", ["https://example.test/kernels/", "."])
def test_a_registry_in_the_environment_that_cannot_be_written_is_named(
    name: str, good: Table, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBINERY_REGISTRY", name)
    assert main([], lambda: good) == 2
    assert f"CUBINERY_REGISTRY={name} is a URL or a folder" in capsys.readouterr().err
    assert not Path(os.environ["XDG_DATA_HOME"]).exists()


def test_an_error_of_no_known_kind_shows_its_traceback_and_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    def table() -> Table:
        raise OSError("planted: no space left")

    assert main(["--json"], table) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    expected = {"reason": "internal", "message": "OSError: planted: no space left"}
    assert json.loads(captured.out)["error"] == expected


def test_a_source_that_does_not_parse_is_named_with_its_line(
    good: Table, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sources / "kernels" / "helper.py").write_text("VALUE = 1\ndef f(:\n")
    code, found = run_json(capsys, good)
    assert code == 1 and found["error"]["reason"] == "toolchain"
    assert f"{sources / 'kernels' / 'helper.py'}:2: " in found["error"]["message"]


def test_a_part_of_a_changed_table_leaves_the_channel_and_says_so(
    good: Table, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, whole = run_json(capsys, good)
    (sources / "kernels" / "helper.py").write_text("VALUE = 3\n")
    code, part = run_json(capsys, good, "--only", "*-n32")
    others = [v.key for v in good.variants if v.size("n") != 32]
    assert code == 0 and part["moved"] == [] and part["lacking"] == {"sm_120": others}
    with Store(os.environ["CUBINERY_REGISTRY"], readonly=True) as store:
        assert store.channel("stable") == {"sm_120": whole["index"]}
    assert main(["--only", "*-n32"], lambda: good) == 0
    out = capsys.readouterr().out
    assert f"channel stable keeps its sm_120 index, which also has {', '.join(others)}: build these too" in out
    assert "(1 of 3 variants, channel stable left as it was)" in out
    code, forced = run_json(capsys, good, "--only", "*-n32", "--allow-partial")
    assert code == 0 and forced["moved"] == ["sm_120"] and forced["lacking"] == {}
    assert forced["index"] == part["index"] != whole["index"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "channel stable left its sm_120 index of format 1, which this release does not read; it stays in the"),
        (4, "channel stable keeps its sm_120 index of format 4, of a newer release than this (format 3): update the"),
    ],
)
def test_a_channel_of_another_release_is_told_of(
    number: int, message: str, good: Table, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run_json(capsys, good)
    read, body = Store.get_index, f'{{"format":{number}}}'.encode()
    monkeypatch.setattr(Store, "get_index", lambda self, d: body if d == whole["index"] else read(self, d))
    smaller = toys.table(*good.variants[:2], folder=good.folder or Path())
    assert main([], lambda: smaller) == 0
    assert message in capsys.readouterr().out


def test_require_verified_names_each_variant(
    good: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu" / "ledger").mkdir(parents=True)
    (tmp_path / "gpu" / "conformance.json").write_text('{"suite": 1, "ops": {"toy": ["yardstick"]}}')
    monkeypatch.setattr(verified, "FOLDER", tmp_path / "gpu")
    code, found = run_json(capsys, good, "--require-verified")
    assert code == 1 and (found["built"], found["failed"], found["moved"]) == (3, [], [])
    assert [f["key"] for f in found["unverified"]] == [v.key for v in good.variants]
    assert all("yardstick: never run" in f["reason"] for f in found["unverified"])
    assert main(["--require-verified", "--only", "*-n32"], lambda: good) == 1
    out = capsys.readouterr().out
    assert "0 built, 1 cached, 0 failed of 1 variants" in out
    assert "not verified: 3 variants of the index" in out and f"UNVERIFIED {good.variants[2].key}: PTX " in out
    assert "0 variants verified on sm_120\n" in out
    with Store(os.environ["CUBINERY_REGISTRY"], readonly=True) as store:
        assert store.channels() == {}
        rows = [
            {"ptx_sha256": a.ptx_sha256, "variant": a.variant, "arch": "sm_90", "test": "yardstick", "suite": 1}
            | {"result": "pass", "gpu": "H200", "driver": "580", "date": "2026-11-21T00:00:00Z"}
            for a in store.artifacts().values()
        ]
    (tmp_path / "gpu" / "ledger" / "run.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, found = run_json(capsys, good, "--require-verified")
    assert code == 0 and found["failed"] == found["unverified"] == [] and found["moved"] == ["sm_120"]
    assert found["verified"] == {v.key: ["sm_90"] for v in good.variants}
    assert main(["--require-verified"], lambda: good) == 0
    assert "3 variants verified on sm_90; 0 on sm_120\n" in capsys.readouterr().out
    (tmp_path / "gpu" / "ledger" / "new.jsonl").write_text(json.dumps({**rows[0], "arch": "sm_120", "result": "hang"}))
    code, found = run_json(capsys, good, "--require-verified")
    assert code == 1 and [f["key"] for f in found["unverified"]] == [rows[0]["variant"]]
    assert found["verified"] == {v.key: ["sm_90"] for v in good.variants}


@pytest.mark.parametrize(
    ("number", "code", "reason", "unnoticed"),
    [(signal.SIGINT, 130, "interrupted", False), (signal.SIGINT, 130, "interrupted", True),
     (signal.SIGTERM, 143, "terminated", False)],
)  # fmt: skip
def test_an_interrupted_build_keeps_what_was_finished_and_leaves_no_files(
    number: signal.Signals, code: int, reason: str, unnoticed: bool, tmp_path: Path, sources: Path, calls: Path
) -> None:
    """As in a terminal or a container: a signal while one worker hangs and another variant waits for nvdisasm. One that
    is noted by another thread does not wake the main one, as if it came right before that waits."""
    script = (
        "import signal, sys, threading, time; from pathlib import Path; from builder.__main__ import main\n"
        f"if {unnoticed}:\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "from tests.builder import toys\n"
        # A shell starts background jobs with SIGINT ignored, and the test may be part of one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "variants = [toys.variant(n=8), toys.variant('hangs')]\n"
        "table = toys.table(*variants, folder=Path(sys.argv[1]))\n"
        "sys.exit(main(['--registry', sys.argv[2], '--jobs', '1', '--json'], lambda: table))"
    )
    path = tmp_path / "r.db"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(sources), str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    deadline = time.monotonic() + 60
    while "hangs" not in calls.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    message = f"{reason}; 1 of 2 variants are stored, the channel did not move"
    assert f"builder: {message}" in err and "Traceback" not in err
    found = json.loads(out.splitlines()[-1])
    assert found["error"] == {"reason": reason, "message": message}
    assert (found["variants"], found["built"], found["failed"], found["index"]) == (2, 1, [], None)
    assert list(scratch.iterdir()) == [], "no worker's files stay behind"
    with Store(path) as store:
        assert store.verify() == [] and store.channels() == {}
        assert [a.variant for a in store.artifacts().values()] == [toys.variant(n=8).key]


def test_the_real_table_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "builder", "--dry-run", "--json", "--registry", str(tmp_path / "r.db")]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["variants"] == len(found["would_build"]) >= 12
    assert time.monotonic() - started < 10  # it takes 0.5 s; a compiler's import alone would not fit 2
