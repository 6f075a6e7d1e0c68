"""python -m runtime: what it prints and how it exits. In-process but for one real start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry import ops
from registry.contract import Condition, DispatchRow
from runtime.cli import commands as cli
from runtime.sources import source as embedded
from tests.runtime.backward_kernels import KERNELS
from tests.runtime.cache_kernels import write_cache_registry
from tests.runtime.fakes import TABLE, rows, toy_index, write_registry
from tests.support.cli import holding_server, program, run, usage
from tests.support.sources import URL, Server, server

__all__ = ["server"]  # a fixture


def test_doctor_without_a_gpu_says_so(registry: Path, capsys):
    code, report = run(capsys, "doctor", "--registry", registry)
    assert code == 0 and report["problems"] == []
    assert report["gpu"]["devices"] == [] and "no GPU" in report["gpu"]["note"]
    assert report["registry"] == {"where": str(registry), "remote": None}
    digest = toy_index()[0].digest
    assert report["indexes"] == {"sm_120": digest}
    assert len(report["would_load"]["sm_120"]["variants"]) == len(TABLE)
    assert report["would_load"]["sm_120"]["sample"] == "fwd-bf16-d128-dv128-m128-n64-w4-s1"
    assert {"resolve", "index", "fetch", "verify"} <= {record["stage"] for record in report["ledger"]}
    assert cli.main(["doctor", "--registry", str(registry)]) == 0
    text = capsys.readouterr().out
    assert "no GPU" in text and digest in text and "all is well" in text


def test_doctor_names_what_is_wrong(tmp_path: Path, capsys):
    code, report = run(capsys, "doctor")
    assert code == 1 and "no registry at" in report["problems"][0]
    code, report = run(capsys, "doctor", "--registry", URL)
    assert code == 1 and "UntrustedError" in report["problems"][0] and report["registry"]["remote"] == "it is a server"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    code, report = run(capsys, "doctor", "--registry", URL, "--cache", tmp_path / "cache")
    assert code == 1 and "nobody else can write" in report["problems"][0]


def test_doctor_starts_as_a_program_without_torch(registry: Path):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['runtime', 'doctor', '--json', '--registry', %r]; "
    code += "import runpy; runpy.run_module('runtime', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code % str(registry)], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in json.loads(done.stdout)["torch"]["note"]


def test_prefetch_fills_an_empty_cache_by_digest(server: Server, tmp_path: Path, capsys):
    given = ("--registry", URL, "--index", server.index.digest, "--cache", tmp_path / "cache")
    code, report = run(capsys, "prefetch", *given, "--arch", "sm_120", "--head-dim", 64, "--dtype", "bf16")
    assert code == 0 and report["verified"] == report["wanted"] == 2 and report["missing"] == []
    assert report["bytes"] == sum(map(len, server.frames.values()))
    assert len([p for p in (tmp_path / "cache" / "v1" / "blobs").rglob("*") if p.is_file()]) == 2
    server.down = True
    code, report = run(capsys, "prefetch", *given, "--offline", "--head-dim", 64, "--dtype", "bf16")
    assert code == 0 and report["verified"] == 2


def test_prefetch_of_everything_reports_what_is_missing(server: Server, tmp_path: Path, capsys):
    """The server's index has 2 of the table's 12 variants; one of their blobs is gone, the other is damaged."""
    _, second = server.frames
    server.frames = {second: server.frames[second][::-1]}
    code, report = run(capsys, "prefetch", "--registry", URL, "--index", server.index.digest, "--cache", tmp_path / "c")
    assert code == 1 and report["verified"] == 0 and report["wanted"] == 2
    reasons = [m["reason"] for m in report["missing"]]
    assert sum("the index lacks it" in r for r in reasons) == 10
    assert sum("404" in r for r in reasons) == 1 and sum("SHA-256" in r for r in reasons) == 1
    code, report = run(capsys, "prefetch", "--registry", URL, "--index", server.index.digest, "--arch", "sm_90",
                       "--cache", tmp_path / "c")  # fmt: skip
    assert code == 1 and "no index for sm_90" in report["missing"][0]["reason"]


def test_prefetch_of_model_shapes(registry: Path, tmp_path: Path, capsys):
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([
        {"dtype": "bf16", "head_dim": 128, "heads_q": 32, "heads_kv": 8, "seqlen_q": 2048},
        {"dtype": "fp16", "head_dim": 64},
    ]))  # fmt: skip
    code, report = run(capsys, "prefetch", "--registry", registry, "--shapes", shapes)
    assert code == 0 and report["verified"] == 3
    shapes.write_text(json.dumps([{"head_dim": 72, "head_dim_v": 40, "heads_q": 4, "heads_kv": 4, "seqlen_q": 65,
                                   "varlen": True, "window": False, "total_q": 99}]))  # fmt: skip
    code, report = run(capsys, "prefetch", "--registry", registry, "--shapes", shapes)
    assert code == 0 and report["verified"] == 2  # of either dtype the long tile of 96
    code, report = run(capsys, "prefetch", "--registry", registry, "--head-dim", 64, "--head-dim-v", 72)
    assert code == 0 and report["verified"] == 4
    code, report = run(capsys, "prefetch", "--registry", registry, "--heads", "32/8", "--head-dim", 136)
    assert code == 1 and "no dispatch row serves it" in report["missing"][0]["reason"]
    code, report = run(capsys, "prefetch", "--registry", registry)
    assert code == 0 and report["verified"] == len(TABLE)
    assert cli.main(["prefetch", "--registry", str(registry)]) == 0
    captured = capsys.readouterr()
    assert f"{len(TABLE)} of {len(TABLE)} kernels" in captured.out and "prefetch 12/12" in captured.err


@pytest.mark.parametrize("text", [
    "[]", "{", '[{"heads": 3}]', '[{"head_dim": "64"}]', "[{}]", '{"head_dim": 64}', '[{"head_dim": true}]',
    '[{"dtype": "bf8"}]', '[{"dtype": ["bf16"]}]', '[{"causal": 2}]', '[{"varlen": 3}]', '[{"window": [1, 2]}]',
    '[{"batch": 0}]', '[{"seqlen_q": 1.5}]',
    '[{"heads_q": 7, "heads_kv": 2}]', '[{"heads_kv": 0}]', pytest.param("[" * 100_000, id="deep"),
])  # fmt: skip
def test_prefetch_refuses_shapes_it_cannot_read(tmp_path: Path, capsys, text):
    (tmp_path / "shapes.json").write_text(text)
    assert "--shapes" in usage(capsys, "prefetch", "--shapes", tmp_path / "shapes.json")
    assert "--shapes" in usage(capsys, "prefetch", "--shapes", tmp_path / "none.json")


def test_usage(capsys):
    assert "--heads" in usage(capsys, "prefetch", "--heads", "32")
    assert "--arch" in usage(capsys, "explain", "--arch", "sm_120a")
    assert "required" in usage(capsys, "explain")
    assert "doctor|prefetch|explain" in usage(capsys)
    for heads in ("3/0", "32/-8", "-32/8", "7/2", "8/16"):
        assert "--heads" in usage(capsys, "prefetch", f"--heads={heads}")
    for count in ("0", "-5", "1.5", "2147483648", "x"):
        for name in ("batch", "head-dim", "head-dim-v", "seqlen-q", "seqlen-k", "total-q", "heads-q", "heads-kv"):
            assert f"--{name}" in usage(capsys, "explain", "--arch", "sm_120", f"--{name}={count}")
    for window in ("garbage,xx", "128", "1,2,3", "1.5,"):
        assert "--window" in usage(capsys, "explain", "--arch", "sm_120", f"--window={window}")


def test_prefetch_shows_a_bar_on_a_terminal_with_rich(monkeypatch, capsys):
    assert list(cli._rich_track()(iter([1, 2]), 2)) == [1, 2]
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli._rich_track() is None


def test_explain_names_the_variant(registry: Path, capsys):
    given = ("explain", "--registry", registry, "--arch", "sm_120", "--dtype", "fp16", "--head-dim", 64)
    code, report = run(capsys, *given, "--seqlen-q", 1, "--seqlen-k", 4096, "--heads-q", 32, "--heads-kv", 8)
    assert code == 0 and report["variant"] == "fwd-fp16-d64-dv64-m64-n64-w4-s1"
    assert report["facts"]["group"] == 4 and report["facts"]["seqlen_k"] == 4096 and report["facts"]["causal"] == 0
    for causal in (("--causal",), ("--window", "128,0")):
        assert run(capsys, *given, *causal)[1]["facts"]["causal"] == 1
    assert run(capsys, *given, "--window", "128,")[1]["facts"]["causal"] == 0
    assert cli.main([*map(str, given)]) == 0
    assert "fwd-fp16-d64-dv64-m128-n64-w4-s1" in capsys.readouterr().out


def test_explain_knows_every_fact(registry: Path, capsys):
    given = ("explain", "--registry", registry, "--arch", "sm_120", "--head-dim", 72, "--heads-q", 8, "--heads-kv", 2)
    code, report = run(capsys, *given, "--head-dim-v", 40, "--batch", 16, "--seqlen-q", 16, "--varlen", "--total-q", 99,
                       "--window", "128,0")  # fmt: skip
    assert code == 0 and report["variant"] == "fwd-bf16-d96-dv96-m64-n64-w4-s1" and report["pack"] is True
    assert report["facts"] == {
        "dtype": "bf16", "head_dim": 72, "head_dim_v": 40, "batch": 16, "heads_q": 8, "heads_kv": 2, "seqlen_q": 16,
        "seqlen_k": 16, "group": 4, "causal": 1, "varlen": 1, "total_q": 99, "packed_rows": 64, "window": 1,
    }  # fmt: skip
    code, report = run(capsys, *given, "--varlen", "--batch", 2, "--seqlen-q", 65)
    assert report["facts"]["total_q"] == 130 and report["pack"] is False
    code, report = run(capsys, *given, "--batch", 2, "--seqlen-q", 65)
    assert (report["facts"]["varlen"], report["facts"]["total_q"], report["facts"]["window"]) == (0, 130, 0)
    code, report = run(capsys, *given, "--total-q", 9)
    assert code == 2 and "--varlen" in report["error"]["message"]
    assert cli.main([*map(str, given), "--seqlen-q", "1"]) == 0
    assert "m64-n64-w4-s1, packed GQA\n" in capsys.readouterr().out


@pytest.mark.parametrize("op", ops.OPS)
def test_explain_knows_every_op(op: str, backward_registry: Path, tmp_path: Path, capsys):
    write_cache_registry(tmp_path / "cache.db")
    codes = []
    for registry in (backward_registry, tmp_path / "cache.db"):
        code, report = run(capsys, "explain", "--registry", registry, "--arch", "sm_120", "--head-dim", 64, "--op", op)
        assert list(report["facts"]) == [fact.name for fact in ops.get(op).facts]
        assert (report["variant"] or report["message"].removeprefix("no ")).startswith(f"{op}{' -'[code == 0]}")
        codes.append(code)
    assert 0 in codes
    code, report = run(capsys, "explain", "--registry", registry, "--arch", "sm_120", "--op", op, "--dtype", "fp32")
    assert (code == 2 and "--dtype" in report["error"]["message"]) or op == "fwd_combine"


def test_explain_and_prefetch_know_the_backward(backward_registry: Path, capsys):
    given = ("explain", "--registry", backward_registry, "--arch", "sm_120", "--head-dim", 72, "--heads-kv", 8)
    for op, variant in (("bwd", "bwd-bf16-d128-dv128-m64-n32-w4-s1"), ("bwd_preprocess", "bwd_preprocess-bf16-d256-"),
                        ("bwd_postprocess", "bwd_postprocess-bf16-d256-"), ("fwd", "fwd-bf16-d96-")):  # fmt: skip
        code, report = run(capsys, *given, "--op", op, "--batch", 3, "--seqlen-q", 50, "--seqlen-k", 70)
        assert code == 0 and report["variant"].startswith(variant) and report["pack"] is False
        dense = {name: report["facts"].get(name) for name in ("varlen_k", "total_k")}
        assert dense == ({"varlen_k": None, "total_k": None} if op == "fwd" else {"varlen_k": 0, "total_k": 210})
    code, report = run(capsys, *given, "--op", "bwd", "--batch", 3, "--seqlen-k", 70, "--varlen")
    assert (report["facts"]["varlen_k"], report["facts"]["total_k"]) == (1, 210)
    assert "--op" in usage(capsys, *given, "--op", "fwd_sideways")
    prefetch = ("prefetch", "--registry", backward_registry, "--dtype", "bf16", "--head-dim", 64)
    code, every = run(capsys, *prefetch)
    assert code == 0 and every["missing"] == [] and every["verified"] == every["wanted"]
    counts = [run(capsys, *prefetch, "--op", op)[1]["wanted"] for op in ("fwd", *KERNELS)]
    assert counts[1:] == [1, 1, 1, 1] and every["wanted"] == sum(counts)


def test_explain_lists_every_rejection(registry: Path, capsys):
    given = ("explain", "--registry", registry, "--arch", "sm_120", "--head-dim", "136")
    code, report = run(capsys, *given)
    assert code == 1 and report["variant"] is None and len(report["rejections"]) == len(rows())
    assert cli.main([*map(str, given)]) == 1
    text = capsys.readouterr().out
    assert text.count(": needs ") == len(rows()) and all(f"  {row.variant}: " in text for row in rows())
    assert "runtime explain" not in text and "python -m builder" in text
    code, report = run(capsys, "explain", "--registry", registry, "--arch", "sm_90")
    assert code == 1 and report["error"]["reason"] == "arch"
    code, report = run(capsys, "explain", "--registry", registry, "--arch", "sm_120", "--heads-kv", "5")
    assert code == 2 and report["error"]["reason"] == "heads"
    code, report = run(capsys, *given, "--seqlen-q", 2**29, "--seqlen-k", 2**29)
    assert code == 2 and report["error"]["reason"] == "too_large"
    code, report = run(capsys, *given, "--window=-1,-7")
    assert code == 2 and "None for an open side" in report["error"]["message"]
    code, report = run(capsys, "doctor", "--registry", "ftp://x")
    assert code == 2 and report["error"]["reason"] == "config"


def test_doctor_without_a_kernel_for_its_sample_call(tmp_path: Path, capsys):
    write_registry(tmp_path / "r.db", only="bf16-d64")
    assert cli.main(["doctor", "--registry", str(tmp_path / "r.db")]) == 0
    text = capsys.readouterr().out
    assert "2 kernels of 0.1, none of them for a call with bf16 and head_dim 128" in text and "e.g. None" not in text


def test_a_reader_that_has_gone(registry: Path):
    reader, writer = os.pipe()
    os.close(reader)
    with program("explain", "--registry", registry, "--arch", "sm_120", "--head-dim", 136, stdout=writer) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 141 and errors == ""


def test_ctrl_c_ends_downloads_under_way(tmp_path: Path):
    """The server gives the index, and then nothing: kernels are being downloaded by a pool of threads."""
    with (
        holding_server("/blobs/") as (given, asked),
        program("prefetch", *given, "--cache", tmp_path / "cache", stdout=subprocess.DEVNULL) as process,
    ):
        assert asked.wait(60)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        spent = time.monotonic() - start
    assert process.returncode == 130 and errors == "" and spent < 5


def test_errors_are_short_on_stderr(capsys):
    assert cli.main(["explain", "--arch", "sm_120"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("SourceError (no_registry): no registry at")


def test_several_architectures(tmp_path: Path, capsys, monkeypatch):
    digests = write_registry(tmp_path / "r.db", "sm_120", "sm_90", only="bf16-d64")
    monkeypatch.setattr(embedded, "MAX_INDEX", 1 << 20)
    code, report = run(capsys, "prefetch", "--registry", tmp_path / "r.db", "--head-dim", 64, "--dtype", "bf16")
    assert code == 0 and report["indexes"] == digests and report["verified"] == 4


def test_a_model_s_kernels_are_those_of_every_op():
    other = DispatchRow("fwd_paged", (Condition("head_dim", "<=", 128),), "fwd_paged-bf16-d128-dv128-m16-n32-w1-s2")
    index, _ = toy_index()
    index = index.replace(rows=(*index.rows, other))
    for shape, lacking in (({}, [other.variant]), ({"op": "fwd"}, []), ({"op": "fwd_paged"}, [other.variant])):
        missing: list[dict[str, str]] = []
        found = list(cli._wanted(index, [shape | {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64}], missing))
        assert [m["key"].split()[-1] for m in missing] == lacking
        assert bool(found) == (shape.get("op") != "fwd_paged")
