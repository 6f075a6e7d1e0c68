"""benchmarks/tune.py without a GPU: what it measures, what it makes of it, and what builder.accept then reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import cases, cubins, measure, reference, tune, workloads
from benchmarks.cases import Case, dense
from benchmarks.workloads import Workload
from builder import accept
from kernels.fwd.table import TILES
from kernels.tables import Tiles
from registry import ops
from tests.benchmarks.fakes import FakeKernel, fake_bind, write_registry

DIMS = (64, 64)
TABLE = sorted({t.variant("bf16").key for t in Tiles.read(TILES).tiles if t.dims == DIMS})
RIVAL = "fwd-bf16-d64-dv64-m64-n32-w4-s1"
WRONG = "fwd-bf16-d64-dv64-m64-n16-w4-s1"
WRONG_PACKED = "fwd-bf16-d64-dv64-m32-n32-w2-s1"
DEADLY = "fwd-bf16-d64-dv64-m16-n64-w1-s1"


def tiny(head_dim: int, head_dim_v: int) -> dict[str, Workload]:
    def case(seqlen: int, group: int) -> Case:
        return dense("tiny", seqlen, True, 4, 4 // group, head_dim, 1, head_dim_v=head_dim_v)

    return {
        "packed_decode": Workload((case(2, 4),), (16, 64)),
        "short": Workload((case(8, 1),), (16, 64)),
        "default": Workload((case(65, 1), case(70, 1)), (64, 128)),
    }


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "Kernel", FakeKernel)
    monkeypatch.setattr(tune, "bind_fwd", fake_bind)
    monkeypatch.setattr(tune, "workloads", tiny)
    tune._kernel.cache_clear()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return write_registry(tmp_path / "c.db", [*TABLE, RIVAL, WRONG, WRONG_PACKED, DEADLY])


def options(registry: Path, *more: str) -> Any:
    return tune._parser().parse_args(["--registry", str(registry), "--repeats", "2", "--classes", *tiny(*DIMS), *more])


def events(registry: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *classes: str) -> list[Any]:
    """What a worker says of a candidate, in this process."""
    argv = ["--worker", key, "--lock", str(tmp_path / "lock"), "--registry", str(registry), "--repeats", "2"]
    capsys.readouterr()
    tune.main([*argv, "--classes", *(classes or tiny(*DIMS))])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("on_cpu")
class TestWorker:
    def test_times_every_case_packed_and_not_in_both_modes(self, registry, tmp_path, capsys):
        rows = events(registry, RIVAL, tmp_path, capsys)
        at = [(r["class"], r["case"], r["pack"], r["mode"]) for r in rows]
        assert len(set(at)) == len(at) == 2 * (2 + 1 + 2)  # modes × (decode packed and not, short, two of default)
        assert {r["pack"] for r in rows if r["class"] != "packed_decode"} == {False}
        for r in rows:
            assert r["gain"] == pytest.approx(r["incumbent_ms"] / r["ms"], rel=0.1) and r["spread"] >= 0
            assert r["incumbent"] in TABLE and r["incumbent_pack"] == (r["class"] == "packed_decode")
            assert r.get("blocks_wanted") == (2 if r["mode"] == "sm120" else None)
            assert r["blocks"] == (2 if r["mode"] == "sm120" else 4)

    def test_a_wrong_kernel_is_not_timed(self, registry, tmp_path, capsys):
        (event,) = events(registry, WRONG, tmp_path, capsys)
        assert event["event"] == "failed" and "wrong: relative errors of out and LSE are check/S200" in event["reason"]

    def test_one_that_is_wrong_only_when_packed_is_found_where_packing_is_asked_for(self, registry, tmp_path, capsys):
        (event,) = events(registry, WRONG_PACKED, tmp_path, capsys)
        assert "wrong when packed" in event["reason"]
        assert {e["event"] for e in events(registry, WRONG_PACKED, tmp_path, capsys, "short")} == {"measured"}

    def test_the_tables_choice_must_be_there(self, tmp_path, capsys):
        (event,) = events(write_registry(tmp_path / "c.db", [RIVAL]), RIVAL, tmp_path, capsys)
        assert "the table's choice is not among the candidates" in event["reason"]


@pytest.fixture
def tuning(on_cpu: None, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
           monkeypatch: pytest.MonkeyPatch) -> Any:  # fmt: skip
    """A run whose processes are calls in this one."""
    made = tune.Tuning(options(registry))
    made.started = []

    def start(job: tune.Job, left: float) -> list[dict[str, Any]]:
        made.started.append(job)
        try:
            return events(registry, job.key, tmp_path, capsys, *job.classes)
        except SystemExit as error:
            return [{"event": "failed", "reason": f"its process ended with {error.code}"}]

    made.start = start
    monkeypatch.setattr(tune, "SIDE_BY_SIDE", 1)
    return made


def test_a_run_measures_all_once_and_the_best_again(tuning, tmp_path):
    report = tuning.run()
    first = [job for job in tuning.started if job.run == 0]
    assert {job.key for job in first} == {*TABLE, RIVAL, WRONG, WRONG_PACKED, DEADLY}
    assert {job.key for job in first[: len(TABLE)]} == set(TABLE), "the table's own first, if time runs out"
    classes = {job.key: job.classes for job in first}
    assert classes[DEADLY] == ("packed_decode", "short"), "16 rows are no tile for long queries"
    again = {job.key for job in tuning.started if job.run > 0}  # times of stand-ins: which are best is anybody's guess
    assert again and all({job.run for job in tuning.started if job.key == key} == {0, 1, 2} for key in again)
    assert {f["variant"] for f in report["failed"]} == {WRONG, WRONG_PACKED, DEADLY}
    assert "its process ended with 9" in {f["reason"] for f in report["failed"]}
    path = tmp_path / "results.json"
    path.write_text(tune.text(report))
    origin, found = accept.read(path)
    assert origin["gpu"] == "none (CPU)" and [t.call_class for t in found] == list(tiny(*DIMS))
    accept.check_table(Tiles.read(TILES), found)
    assert {o.runs for t in found for o in t.options} == {1, 3}
    assert {c.name for c in found[2].cases} == {"tiny/S65/causal", "tiny/S70/causal"}
    assert set(found[2].hashes()) <= {*TABLE, RIVAL}
    (own,) = (t.tile for t in Tiles.read(TILES).tiles if (t.dims, t.call_class) == (DIMS, "default"))
    assert f"default: {own}\n" in tune.summary(report)


def test_time_that_runs_out_leaves_candidates_out_and_says_so(tuning):
    tuning.end = time.monotonic() - 1
    report = tuning.run()
    assert tuning.started == [] and report["classes"] == []
    assert {f["reason"] for f in report["failed"]} == {"no time was left for it"}


def test_what_sm120_refused_is_not_measured(on_cpu, tmp_path):
    path = write_registry(tmp_path / "c.db", [RIVAL], archs=("sm_90",))
    report = tune.Tuning(options(path)).run()
    assert report["failed"] == [{"variant": RIVAL, "reason": "no sm_120 cubin of its PTX: refused there"}]


def test_usage(on_cpu, registry):
    with pytest.raises(cubins.BenchmarkError, match="the table has packed_decode"):
        tune.Tuning(options(registry, "--classes", "nonsense"))
    with pytest.raises(cubins.BenchmarkError, match="no bf16 candidates"):
        tune.Tuning(options(registry, "--dims", "96,96")).run()


def row(run: int, gain: float, *, case: str = "tiny/S65/causal", key: str = RIVAL, **more: Any) -> dict[str, Any]:
    return {"run": run, "class": "default", "case": case, "variant": key, "pack": False, "mode": "sm120", "gain": gain,
            "incumbent": TABLE[0], "incumbent_pack": False, **more}  # fmt: skip


def test_runs_that_differ_by_more_than_ten_percent_are_excluded(on_cpu):
    for third, excluded in ((1.19, None), (1.25, "its 3 runs differ by 13%")):
        rows = [row(run, gain) for run, gain in enumerate((1.1, 1.12, third))]
        rows += [{**r, "mode": "free"} for r in rows]
        (entry,) = tune.aggregate(DIMS, rows, {RIVAL: "a", TABLE[0]: "b"})
        (option,) = entry["options"]
        assert (option["runs"], option["sm120"], option["excluded"]) == (3, 1.12, excluded)


def test_a_run_that_lacks_a_case_does_not_count(on_cpu):
    rows = [row(0, 1.1), row(0, 1.2, case="tiny/S70/causal"), row(1, 1.5)]
    assert list(tune.geomeans(rows).values()) == [{0: pytest.approx((1.1 * 1.2) ** 0.5)}]


def test_the_three_fastest_of_a_class_are_measured_again(on_cpu):
    keys = [RIVAL.replace("n32", f"n{n}") for n in (16, 32, 64, 128)]
    rows = [row(0, 1 + i / 10, key=key) for i, key in enumerate(keys)] + [row(0, 9.0, key=TABLE[0])]
    assert tune.best(rows) == dict.fromkeys(keys[:0:-1], ("default",))


def test_a_process_that_dies_or_hangs_is_an_event(registry, monkeypatch):
    job = tune.Job(RIVAL, ("default",), 0)
    script = "import sys; print('{\"event\": \"measured\"}'); print('noise'); sys.exit('planted')"
    real = subprocess.run
    monkeypatch.setattr(tune.subprocess, "run", lambda command, **kw: real([sys.executable, "-c", script], **kw))
    first, last = tune._start(options(registry), job, 10.0)
    assert first == {"event": "measured"} and "its process ended with 1: planted" in last["reason"]
    monkeypatch.setattr(tune, "LIMIT_S", 0)
    script = "import time; time.sleep(60)"
    (event,) = tune._start(options(registry), job, 0.5)
    assert event == {"event": "failed", "reason": "its turn to measure never came"}


def test_a_worker_waits_for_its_turn_and_is_ended_when_it_takes_too_long(tmp_path):
    """The lock and the alarm, in processes as they run: what hangs while it measures ends by itself."""
    script = (
        "import sys, time; from benchmarks import measure, tune\n"
        "tune.LIMIT_S = 1; measure.DEVICE = 'cpu'\n"
        "tune.read = lambda *a, **k: [type('C', (), {'key': sys.argv[2]})()]\n"
        "tune.check = lambda *a: (print(time.time(), flush=True), time.sleep(60))\n"
        "tune.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "--worker", RIVAL, "--classes", "short", "--registry", "x",
               "--lock", str(tmp_path / "lock")]  # fmt: skip
    started = [subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    began = sorted(float(p.communicate(timeout=120)[0]) for p in started)
    assert [p.returncode for p in started] == [-14, -14] and 0.9 <= began[1] - began[0] < 30


# ---- the calls that are measured ----


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_the_cases_of_a_class_are_calls_that_its_rows_serve(dims):
    table, of = Tiles.read(TILES), workloads.workloads(*dims)
    assert of.keys() == table.classes.keys()
    for name, workload in of.items():
        for case in workload.cases:
            facts = case.facts()
            held = [c for c, when in table.classes.items() if all(condition.holds(facts) for condition in when)]
            assert held[0] == name and case.dims == dims, case.name
        assert len({case.name for case in workload.cases}) == len(workload.cases)
    groups = {case.group for workload in of.values() for case in workload.cases}
    assert groups == {1, 4, 7, 8}


def test_packing_is_measured_where_every_call_has_a_group():
    table = Tiles.read(TILES)
    for name in table.classes:
        assert workloads.packings(name, table) == ((False, True) if name.startswith("packed") else (False,))


def test_facts_are_those_that_dispatch_rows_ask_for():
    case = cases.varlen("x", (8, 2, 64), (5, 0, 300), True)
    facts = case.facts("fp16")
    assert {fact.name for fact in ops.get("fwd").facts} == facts.keys()
    assert facts == {
        "dtype": "fp16", "head_dim": 64, "head_dim_v": 64, "batch": 3, "heads_q": 8, "heads_kv": 2, "group": 4,
        "seqlen_q": 300, "seqlen_k": 300, "total_q": 305, "packed_rows": 1200, "causal": 1, "varlen": 1, "window": 0,
    }  # fmt: skip
    windowed = dense("x", 10, False, 2, 2, 64, 3, window=4).facts()
    assert (windowed["causal"], windowed["window"], windowed["total_q"]) == (1, 1, 30)


def test_flops_count_what_is_visible():
    assert dense("x", 8, False, 3, 1, 64, 2, 16, 32).flops == 2 * 3 * (64 + 32) * 2 * 8 * 16
    assert dense("x", 8, True, 3, 1, 64, 2).flops == 2 * 3 * 128 * 2 * 8 * 8 / 2
    assert dense("x", 8, False, 1, 1, 64, 1, window=2).flops == 2 * 128 * (1 + 2 + 6 * 3)
    assert cases.varlen("x", (1, 1, 64), (3, 4), False).flops == 2 * 128 * (9 + 16)
    brute = sum(0 <= j < 9 and i + 4 - 3 <= j <= i + 4 + 2 for i in range(5) for j in range(9))
    assert cases.visible_pairs(5, 9, 3, 2) == brute


def test_lengths_are_drawn_once_and_for_all():
    drawn = workloads.lengths(256)
    assert drawn == workloads.lengths(256) and len(drawn) == 256 and 64 <= min(drawn) < 80 < 380 < max(drawn) <= 400


def test_the_reference_of_packed_sequences_is_that_of_each(monkeypatch):
    import torch

    monkeypatch.setattr(measure, "DEVICE", "cpu")
    case = cases.varlen("x", (4, 2, 64), (5, 0, 30), True)
    q, k, v = measure.make_inputs(case, "bf16")[0]
    assert q.shape == (35, 4, 64) and k.shape == (35, 2, 64)
    out, lse = reference.packed(q, k, v, case)
    alone, alone_lse = reference.attention(q[None, 5:], k[None, 5:], v[None, 5:], True)
    assert torch.equal(out[5:], alone[0]) and torch.equal(lse[:, 5:], alone_lse[0]) and out.shape == (35, 4, 64)
    assert measure.cu_seqlens(case.lengths).tolist() == [0, 5, 5, 35]


def test_a_window_hides_what_is_left_of_it():
    import torch

    q = torch.zeros(1, 3, 1, 8)
    v = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 1, 8)
    assert reference.attention(q, q, v, False, 1)[0][0, :, 0, 0].tolist() == [0.0, 0.5, 1.5]


def test_places_in_a_round_rotate_in_both_directions(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    order: list[str] = []
    runs = {name: (lambda i, name=name: order.append(name)) for name in "abc"}
    measure.interleaved(runs, 2, 6, warmup=0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]
