"""tests/gpu/sanitize.py without a sanitizer: how logs are read and verdicts found; and the planting of races."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import pytest

from registry.contract import Variant
from tests.benchmarks.fakes import artifact, write_registry
from tests.gpu import ledger, plant_race, sanitize, small_calls, verify
from tests.gpu.sanitize import TOOLS, Run, judge, parse, read_output
from tests.support.sanitize import PTX, scripted

SYMBOLS = {"a": "cubinery_a_0", "ab": "cubinery_a_b_0", "c": "cubinery_c_0"}
PLANT = {"cubinery_planted0_a_0"}
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at cubinery_planted0_a_0+0x140 in kernel.ptx
=========     and Read access at cubinery_planted0_a_0+0x200 [32 hazards]
=========
not of the tool: cubinery_c_0
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
MEMORY = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at cubinery_a_b_0+0x1230
=========     by thread (0,0,0) in block (1,0,0)
=========         Host Frame: cubinery_c_0 [0x12] in x.so
========= ERROR SUMMARY: 1 error
"""


def test_findings_are_read_from_the_log():
    assert parse(RACE) == (PLANT, "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "")
    assert parse(MEMORY)[0] == {"cubinery_a_b_0"}
    assert parse("========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer\n")[2]
    assert parse("")[2] == "it wrote no log"


def test_a_refusal_counts_only_when_nothing_ran():
    log = "========= COMPUTE-SANITIZER\n========= Unable to find symbols\n========= ERROR SUMMARY: 0 errors\n"
    device = {"event": "device", "gpu": "G", "arch": "sm_90"}
    ran = "\n".join([json.dumps(device), "noise", '{"event": "end", "variant": "a"}'])
    assert read_output("", log).refused
    seen = read_output(ran, log)
    assert (seen.refused, seen.ended, seen.device) == ("", {"a"}, {"gpu": "G", "arch": "sm_90"})


def test_clean_variants_pass_once_the_plant_is_seen():
    run, asked = scripted(Run(ended={"a", "ab", "c"}, named=set(PLANT)))
    verdict = judge(run, SYMBOLS, "racecheck")
    assert (verdict.passed, verdict.failed, verdict.blind) == (["a", "ab", "c"], [], "")
    assert verdict.planted_seen == sorted(PLANT) and len(asked) == 1


def test_a_tool_that_misses_the_plant_gives_no_verdict():
    verdict = judge(scripted(Run(ended=set(SYMBOLS)))[0], SYMBOLS, "racecheck")
    assert not verdict.passed and not verdict.failed and "did not see" in verdict.blind


def test_a_tool_that_refuses_the_device_gives_no_verdict():
    verdict = judge(scripted(Run(refused="Device not supported"))[0], SYMBOLS, "memcheck")
    assert not verdict.passed and not verdict.failed and "Device not supported" in verdict.blind


def test_a_finding_fails_its_own_variant_alone():
    broke = Run(ended={"a"}, named={"cubinery_a_b_0"})
    run, asked = scripted(broke, Run(ended={"a", "c"}, named=set(PLANT)))
    verdict = judge(run, SYMBOLS, "memcheck")
    assert (verdict.passed, verdict.failed) == (["a", "c"], ["ab"])
    assert asked == [["a", "ab", "c"], ["a", "c"]]


def test_a_variant_that_ends_the_process_fails():
    run, asked = scripted(Run(ended={"a"}), Run(ended={"a", "c"}, named=set(PLANT)))
    verdict = judge(run, SYMBOLS, "memcheck")
    assert (verdict.passed, verdict.failed) == (["a", "c"], ["ab"]) and len(asked) == 2


def test_a_finding_in_a_variant_that_ended_fails_it_too():
    run, _ = scripted(Run(ended=set(SYMBOLS), named={*PLANT, "cubinery_c_0"}), Run(ended={"a", "ab"}, named=set(PLANT)))
    verdict = judge(run, SYMBOLS, "racecheck")
    assert (verdict.passed, verdict.failed) == (["a", "ab"], ["c"])


def test_a_variant_that_hangs_is_told_from_one_that_fails():
    run, asked = scripted(Run(ended={"a"}, hung=True), Run(ended={"a"}), Run(ended={"a"}, named=set(PLANT)))
    verdict = judge(run, SYMBOLS, "memcheck")
    assert (verdict.passed, verdict.failed, verdict.hung) == (["a"], ["c"], ["ab"])
    assert asked == [["a", "ab", "c"], ["a", "c"], ["a"]]


def test_a_planted_fault_may_hang_once_it_is_seen():
    seen = judge(scripted(Run(ended=set(SYMBOLS), named=set(PLANT), hung=True))[0], SYMBOLS, "racecheck")
    assert (seen.passed, seen.hung, seen.blind) == (list(SYMBOLS), [], "")
    unseen = judge(scripted(Run(ended=set(SYMBOLS), hung=True))[0], SYMBOLS, "racecheck")
    assert not unseen.passed and not unseen.hung and "did not see" in unseen.blind and "hung" in unseen.blind


@pytest.mark.parametrize("hung", [True, False])
def test_a_process_that_launched_nothing_is_no_variants_fault(hung):
    verdict = judge(scripted(Run(hung=hung))[0], SYMBOLS, "memcheck")
    assert not verdict.failed and not verdict.hung and "before it launched anything" in verdict.blind


def test_variants_for_which_there_was_no_time_are_left():
    run, asked = scripted(Run(ended={"a"}, named={"cubinery_c_0"}), Run(ended={"a"}, named=set(PLANT), stopped=True))
    verdict = judge(run, SYMBOLS, "memcheck")
    assert (verdict.passed, verdict.failed, verdict.left) == (["a"], ["c"], ["ab"]) and len(asked) == 2
    blind = judge(scripted(Run(ended={"a"}, stopped=True))[0], SYMBOLS, "memcheck")
    assert not blind.passed and "did not see" in blind.blind
    none = judge(scripted(Run(stopped=True))[0], SYMBOLS, "memcheck")
    assert (none.passed, none.left, none.blind) == ([], list(SYMBOLS), "")


@pytest.mark.parametrize("key", ["fwd-bf16-d64-dv64-m64-n64-w4-s1", "fwd-fp16-d192-dv128-m128-n64-w8-s1"])
def test_the_small_calls_take_every_path(key):
    """Each optional input of the ABI is given at least once, and at least once not; packed heads too."""
    calls = []

    class Recorder:
        def attn(self, **given):
            calls.append(given)

        varlen = attn

    small_calls.launch(Recorder(), key, device="cpu")
    optional = {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k"}
    optional |= {"sink", "alibi_slopes", "softcap", "window"}
    assert all(0 < sum(name in given for given in calls) < len(calls) for name in optional)
    variant, dims = Variant.parse(key), {(given["q"].shape[-1], given["v"].shape[-1]) for given in calls}
    full = (variant.head_dim, variant.head_dim_v)
    assert dims == {full, tuple(dim - 8 for dim in full)}
    groups = {given["q"].shape[-2] // given["k"].shape[-2] for given in calls}
    assert groups == {1, 2, 3}
    tensors = [x for given in calls for x in given.values() if hasattr(x, "untyped_storage")]
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)  # memcheck sees its end


def test_the_small_calls_are_served_rightly():
    """But for the last, whose lengths lie."""
    from tests.gpu.harness import made
    from tests.gpu.stand_in import Stand

    key, stand = "fwd-bf16-d64-dv64-m64-n64-w4-s1", Stand()
    stand.force(key, pack=True)
    for call in small_calls.calls(key):
        run = made(call, "cpu")
        assert run.problems(*run(stand)) == []


PAGED, PAGED_LOW = "fwd_paged-bf16-d64-dv64-m16-n32-w1-s2-q4", "fwd_paged-fp16-d64-dv32-m64-n64-w4-s2-q4-e4m3kv"


@pytest.mark.parametrize("key", [PAGED, PAGED_LOW])
def test_the_small_calls_over_caches_take_every_path(key):
    """Each optional input of the ABIs is given at least once, and at least once not."""
    calls = []

    class Recorder:
        def kvcache(self, **given):
            calls.append(given)

        varlen = kvcache

    small_calls.launch(Recorder(), key, device="cpu")
    optional = {"cu_seqlens_q", "seqused_q", "sink", "alibi_slopes", "softcap", "block_table", "k", "rotary_cos"}
    optional |= {"cache_leftpad"}
    optional |= {"k_descale"} if key.endswith("kv") else set()
    assert all(0 < sum(name in given for given in calls) < len(calls) for name in optional)
    assert {given.get("num_splits", 0) for given in calls} >= {0, 1, 3}
    assert {given.get("rotary_interleaved") for given in calls} == {None, True, False}
    tensors = [x for given in calls for x in given.values() if hasattr(x, "untyped_storage")]
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("key", [PAGED, "kv_append-fp16-d256-dv256-m4-e4m3kv"])
def test_the_small_calls_over_caches_are_served_rightly(key):
    from tests.gpu import paged_small_calls
    from tests.gpu.harness import made
    from tests.gpu.paged_stand_in import PagedStand

    stand = PagedStand()
    stand.force(key, pack=True)
    for call in paged_small_calls.calls(key):
        run = made(call, "cpu")
        assert run.problems(*run(stand)) == []


def test_the_small_sums_of_partials_take_every_layout():
    shapes = []

    class Recorder:
        def combine(self, out, lse, **options):
            shapes.append((out.dim(), lse.shape == out.shape[:-1], options.get("return_lse", True)))

    small_calls.launch(Recorder(), "fwd_combine-fp32-d256-dv256-m4", device="cpu")
    assert set(shapes) == {(n, True, lse) for n in (4, 5) for lse in (True, False)}


def test_one_barrier_goes_and_the_rest_stays():
    first = plant_race.without_barrier(PTX, 0)
    assert "bar.sync \t0;" not in first and "barrier.sync 0;" in first and "mov.u32" in first
    assert "bar.sync \t0;" in plant_race.without_barrier(PTX, 1)
    with pytest.raises(ValueError, match="none of the 2 barriers"):
        plant_race.without_barrier(PTX, 2)


def test_the_summary_counts_by_test(tmp_path):
    run = ledger.Ledger(tmp_path / "r.jsonl", "G", "1")
    for key, result in (("fwd-a", "pass"), ("fwd-b", "fail"), ("fwd-c", "hang")):
        run.add(SimpleNamespace(ptx_sha256="0" * 64, variant=key, arch="sm_90"), "lse", result)
    text = verify.summary(run.path)
    assert "3 results for 3 variants" in text and "1 passed, 2 failed fwd-b fwd-c (hang)" in text


FWD = ledger.CONFORMANCE["ops"]["fwd"]
ON_PYTEST = [test for test in FWD if test not in TOOLS]
VARIANTS = [Variant.parse(f"fwd-bf16-d64-dv64-m{m}-n64-w4-s1") for m in (64, 128)]


def record(path, variants, tests, result="pass", arch="sm_120"):
    run = ledger.Ledger(path, "G", "1")
    for variant, test in product(variants, tests):
        run.add(artifact(variant.key, arch)[0], test, result)


def test_what_a_run_lacks_is_told():
    def missing(*done):
        return verify.missing({(v.key, test) for variants, tests in done for v, test in product(variants, tests)},
                              VARIANTS, "sm_120")  # fmt: skip

    told = "NOT verified on sm_120: memcheck, racecheck missing for"
    assert missing() == [f"NOT verified on sm_120: {', '.join(FWD)} missing for all 2 variants"]
    assert missing((VARIANTS, ON_PYTEST)) == [f"{told} all 2 variants"]
    assert missing((VARIANTS, ON_PYTEST), (VARIANTS[:1], TOOLS)) == [f"{told} {VARIANTS[1].key}"]
    assert missing((VARIANTS, FWD)) == []


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """`verify` where everything that it starts passes: (its ledger file, the commands of the sanitizers)."""
    path, commands = tmp_path / "r.jsonl", []
    registry = write_registry(tmp_path / "r.db", [variant.key for variant in VARIANTS])
    monkeypatch.setenv("CUBINERY_GPU_RUN", str(path))
    monkeypatch.setenv("CUBINERY_LEDGER_DIR", str(tmp_path))
    monkeypatch.setenv("CUBINERY_REGISTRY", str(registry))
    monkeypatch.setattr(verify, "why_not", lambda: None)
    monkeypatch.setattr(verify.measure, "device_arch", lambda: "sm_120")
    monkeypatch.setattr(verify.dispatch, "variants", lambda: VARIANTS)
    monkeypatch.setattr(verify, "run_pytest", lambda *_: record(path, VARIANTS, ON_PYTEST) or 0)

    def sanitizers(command, **_):
        commands.append(command)
        record(path, VARIANTS, TOOLS)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verify.subprocess, "run", sanitizers)
    return path, commands


def test_without_sanitizers_nothing_counts_as_verified(on_gpu, capsys):
    assert verify.main([]) == 1 and not on_gpu[1]
    *_, where, what, hint = capsys.readouterr().out.splitlines()
    assert (
        where == "0 variants verified on sm_120"
        and what == "NOT verified on sm_120: memcheck, racecheck missing for all 2 variants"
    )
    assert "give --planted" in hint


def test_with_sanitizers_all_is_verified(on_gpu, capsys):
    assert verify.main(["--planted", "planted.db", "--hang-after", "7", "--ops", "fwd,bwd", "--resume"]) == 0
    (command,) = on_gpu[1]
    options = sanitize._parser().parse_args(command[3:])
    assert (options.arch, options.ops, options.resume) == ("sm_120", ("fwd", "bwd"), True)
    assert (options.hang_after, options.stop_after) == (14, float("inf"))
    out = capsys.readouterr().out
    assert "NOT verified" not in out and out.endswith("\n2 variants verified on sm_120\n")


def test_what_is_verified_elsewhere_is_told_from_what_is_verified_here(on_gpu, tmp_path, capsys):
    record(tmp_path / "before.jsonl", VARIANTS, FWD, arch="sm_90")
    assert verify.main([]) == 1
    assert "\n2 variants verified on sm_90; 0 on sm_120\nNOT verified on sm_120: " in capsys.readouterr().out


@pytest.mark.parametrize("result", ["fail", "hang"])
def test_a_failed_test_is_no_missing_one(result, on_gpu, monkeypatch, capsys):
    """Not even where no process of this call failed: the run's ledger has it from an earlier one."""
    monkeypatch.setattr(verify, "run_pytest", lambda *_: record(on_gpu[0], VARIANTS, ON_PYTEST, result) or 0)
    assert verify.main(["--planted", "planted.db"]) == 1
    out = capsys.readouterr().out
    assert "NOT verified" not in out and "0 passed, 2 failed" in out


def test_what_earlier_runs_show_on_this_architecture_is_not_missing(on_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "run_pytest", lambda *_: 0)
    record(tmp_path / "before.jsonl", VARIANTS, FWD, arch="sm_90")
    assert verify.main(["--resume"]) == 1 and "missing for all 2 variants" in capsys.readouterr().out
    record(tmp_path / "before.jsonl", VARIANTS, FWD)
    assert verify.main(["--resume"]) == 0
    assert verify.main([]) == 1  # nothing in this run
    assert verify.main(["--ops", "bwd"]) == 0  # of which the table has no variant here


def test_when_the_time_is_over_the_sanitizers_wait(on_gpu, monkeypatch, capsys):
    monkeypatch.setattr(verify, "run_pytest", lambda *_: verify.UNFINISHED)
    assert verify.main(["--planted", "planted.db", "--stop-after", "9"]) == verify.UNFINISHED and not on_gpu[1]
    out = capsys.readouterr().out
    assert "go on with --resume" in out and "NOT verified" in out


def test_sanitizers_that_did_not_come_to_their_end_leave_it_unfinished(on_gpu, monkeypatch):
    unfinished = SimpleNamespace(returncode=verify.UNFINISHED)
    monkeypatch.setattr(verify.subprocess, "run", lambda command, **_: on_gpu[1].append(command) or unfinished)
    assert verify.main(["--planted", "planted.db", "--stop-after", "900"]) == verify.UNFINISHED
    options = sanitize._parser().parse_args(on_gpu[1][0][3:])
    assert 0 < options.stop_after <= 900


def test_a_ledger_that_does_not_read_ends_it_at_once(on_gpu, capsys):
    on_gpu[0].write_text("{}\n")
    assert verify.main([]) == 2 and "r.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--ops", "fwd,bvd"), ("--hang-after", "-1"), ("--stop-after", "soon")])
def test_options_that_make_no_sense_are_refused(option, on_gpu, capsys):
    with pytest.raises(SystemExit) as ended:
        verify.main(list(option))
    assert ended.value.code == 2 and option[0] in capsys.readouterr().err


def test_the_report_lies_beside_the_run(tmp_path, monkeypatch, capsys):
    """compute-sanitizer is not there, so that no tool gives a verdict: the report says so, the ledger has no row."""
    registry = write_registry(tmp_path / "r.db", [variant.key for variant in VARIANTS])
    path = tmp_path / "ledger" / "2026-11-21T0538-h200.jsonl"
    monkeypatch.setenv("CUBINERY_GPU_RUN", str(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main(["--registry", str(registry), "--logs", str(tmp_path / "logs")]) == 1
    (report,) = path.parent.iterdir()
    assert report.name == "2026-11-21T0538-h200.sanitizers.json" and str(report) in capsys.readouterr().out
    told = json.loads(report.read_text())
    assert set(told) == {"version", *TOOLS}
    assert all("is not installed" in told[tool]["blind"] and not told[tool]["passed"] for tool in TOOLS)


def test_without_a_gpu_nothing_is_verified(monkeypatch, capsys):
    monkeypatch.setattr(verify, "why_not", lambda: "no CUDA device")
    assert verify.main([]) == 2 and "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["fwd_paged-bf16-d64-dv64-m16-n32-w1-s2-q8", "kv_append-bf16-d256-dv256-m4"])
def test_a_planted_kernel_stands_among_what_its_calls_launch_too(key, tmp_path, monkeypatch):
    from benchmarks.derived import read_index
    from tests.runtime import fakes
    from tests.runtime.cache_kernels import write_cache_registry

    made = fakes.toy_artifact
    monkeypatch.setattr(fakes, "toy_artifact", lambda v, *a, **more: made(v, *a, symbol=f"cubinery_{v.key}", **more))
    write_cache_registry(tmp_path / "r.db", "sm_90")
    monkeypatch.setattr(plant_race.Store, "ptx_text", lambda store, digest: PTX)
    monkeypatch.setattr(plant_race.nvjitlink, "assemble", lambda ptx, arch: SimpleNamespace(cubin=ptx.encode()))
    options = ["--registry", str(tmp_path / "r.db"), "--out", str(tmp_path / "planted.db"), "--variant", key]
    assert plant_race.main(options) == 0
    assert sanitize.channels(tmp_path / "planted.db") == ["planted0", "planted1"]
    index = read_index(tmp_path / "planted.db", "sm_90", "planted1")
    assert {row.op for row in index.rows} == {"fwd_paged", "fwd_combine", "kv_append"}
    assert index.by_variant[key].ptx_sha256 != read_index(tmp_path / "r.db", "sm_90").by_variant[key].ptx_sha256
    assert [row.variant for row in index.rows if row.op == key.split("-")[0]] == [key]
