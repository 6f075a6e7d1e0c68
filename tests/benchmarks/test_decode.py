"""The decode benchmark without a GPU: raw launches with the parameters that a kernel reads, rows, bars and failures."""

from __future__ import annotations

import json
import struct

import pytest

pytest.importorskip("torch")

import torch

import runtime
from benchmarks import cubins, decode, decode_cases, decode_raw, measure, ours
from benchmarks.decode_cases import Caches, kv_bytes
from benchmarks.decode_cases import decode as step_of
from registry.contract import PARAM_FORMATS
from runtime.load import kernel, session
from tests.runtime.cache_kernels import KERNELS, write_cache_registry
from tests.runtime.fakes import FakeBackend

PAGED = "fwd_paged-bf16-d128-dv128-m16-n32-w1-s2-q8"
COMBINE = "fwd_combine-bf16-d256-dv256-m4"


class CpuKernel:
    """Stands in for benchmarks.cubins.Kernel: a launch does what its parameters say, on the CPU."""

    wrong = None  # a key whose results are

    def __init__(self, candidate, smem=None, carveout=None):
        self.artifact, self.abi, self.variant = candidate.artifact, candidate.abi, candidate.variant
        self.smem = smem or candidate.artifact.smem
        self.occupancy = 1 if smem else 3

    def bind(self, params, blocks):
        values = {
            p.name: struct.unpack_from("<" + PARAM_FORMATS[p.type], params, at)[0]
            for p, (at, _) in zip(self.abi.params, self.abi.layout, strict=True)
        }
        rows = values.get("rows") or values["batch"] * values["heads_kv"] * values["num_splits"]
        assert blocks == (-(-rows // 4) if self.variant.op == "fwd_combine" else rows)
        if self.variant.key == self.wrong:
            values["scale_log2"] /= 2
        return lambda: KERNELS[self.variant.op](self.variant, values)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode") / "registry.db"
    for arch in ("sm_120", "sm_90"):
        write_cache_registry(path, arch)
    return path


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(session, "BACKEND", lambda: FakeBackend(capability=(9, 0)))
    monkeypatch.setenv("CUBINERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel, "SMEM_PADDING", None)
    for module in (decode, decode_raw, ours):
        monkeypatch.setattr(module, "Kernel", CpuKernel)
    monkeypatch.setattr(decode, "SIZES", ((2, 64),))
    monkeypatch.setattr(decode, "ALONE", (1, 128))
    monkeypatch.setattr(CpuKernel, "wrong", None)
    yield
    runtime.configure()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kv", ["bf16", "e4m3"])
@pytest.mark.parametrize("page", [None, 16])
def test_raw_launches_compute_the_step(registry, page, kv):
    suffix = "-e4m3kv" if kv == "e4m3" else ""
    (candidate,) = decode_raw.candidates(registry, PAGED + suffix)
    (combine,) = cubins.read(registry, "sm_90", "fwd_combine", COMBINE)
    caches, case = Caches(2, 64), step_of(2, 64, page, kv)
    for mode in decode_raw.MODES:
        kernels = [decode_raw.kernel_of(x, mode) for x in (candidate, combine)]
        for count in (1, 3):
            step = decode_raw.Step(*kernels, case, caches, count)
            assert len(step.launches) == (1 if count == 1 else 2)
            assert caches.error(case, step()) < 1e-2
    assert kernels[0].smem == candidate.emulated_smem()


def test_a_reference_is_of_what_the_cache_holds():
    """e4m3 is a coarser cache: far from exact over bf16, exact over itself; a foreign order of pages is seen."""
    caches = Caches(2, 64)
    low, paged = step_of(2, 64, 16, "e4m3"), step_of(2, 64, 16)
    out = torch.stack([caches.exact(low, b) for b in range(2)])
    assert caches.error(low, out) == 0 and 1e-2 < caches.error(low, out, quantised=False) < 0.1
    assert caches.error(paged, out) == caches.error(low, out, quantised=False)
    assert caches.error(step_of(2, 64, 64), out) > 0.5


def test_decode_writes_a_file_per_mode(registry, tmp_path, capsys):
    assert decode.main(["--registry", str(registry), "--out", str(tmp_path), "--repeats", "1"]) == 0
    for mode in ("free", "sm120"):
        value = json.loads((tmp_path / f"decode.{mode}.json").read_text())
        assert list(value)[:8] == ["gpu", "driver", "torch", "commit", "date", "mode", "rows", "geomean"]
        assert value["mode"] == mode and value["read_gb_s"] > 0 and value["flashinfer"].startswith("not measured")
        names = {case.name for case in decode_cases.every(((2, 64), (1, 128)))}
        assert {row["case"] for row in value["rows"]} == names and len(names) == 12
        assert value["geomean"] > 0 and len(value["bars"]) == 5 and value["refused"] == {}
        for row in value["rows"]:
            assert row["variant"] == PAGED + "-e4m3kv" * row["case"].endswith("e4m3") and row["num_splits"] >= 1
            assert ("over_contiguous" in row) == ("/page" in row["case"]) and len(row["ptx_sha256"]) == 64
            assert ("over_bf16" in row) == ("error_from_bf16_cache" in row) == row["case"].endswith("e4m3")
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-2) and row["cudnn"] > 0
    assert "1 of 1" in json.dumps(value["occupancy"])
    assert "share of the read bandwidth >= 0.85" in capsys.readouterr().out


def test_a_wrong_result_fails_its_size_alone(registry, tmp_path, monkeypatch, capsys):
    real = runtime.flash_attn_with_kvcache

    def wrong(q, k, v, **options):
        return real(q, k, v, **options) * (1.1 if len(q) == 2 else 1)

    monkeypatch.setattr(runtime, "flash_attn_with_kvcache", wrong)
    options = ["--registry", str(registry), "--out", str(tmp_path), "--repeats", "1", "--modes", "free"]
    assert decode.main(options) == 1
    assert "2x64: FAILED benchmark: 2x64/contiguous/bf16: ours differs from float64" in capsys.readouterr().out
    assert {row["case"][:3] for row in json.loads((tmp_path / "decode.free.json").read_text())["rows"]} == {"1x1"}


def test_a_peer_that_cannot_run_is_named(registry, tmp_path, monkeypatch):
    def sdpa(q, k, v, causal):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    monkeypatch.setattr(measure, "sdpa", sdpa)
    options = ["--registry", str(registry), "--out", str(tmp_path), "--repeats", "1", "--modes", "free"]
    assert decode.main([*options, "--cases", "2x64/*/bf16"]) == 0
    value = json.loads((tmp_path / "decode.free.json").read_text())
    assert value["refused"] == dict.fromkeys(("fa2", "cudnn"), "No available kernel. Aborting execution.")
    assert value["geomean"] is None and all(row["ratio"] is None for row in value["rows"])
    assert len(value["bars"]) == 2  # no case of batch 1, no e4m3, no peer


def row(case, **more):
    return {"case": case, "share": 0.9, "over_contiguous": 1.05, **more}


def test_bars_are_judged_by_the_worst_case(monkeypatch):
    monkeypatch.setattr(decode, "ALONE", decode_cases.ALONE)
    rows = [
        row("32x8192/page16/bf16"),
        row("32x8192/page64/bf16", share=0.86, over_contiguous=1.09),
        row("32x8192/contiguous/bf16", share=0.1),
        row("1x131072/page16/bf16", share=0.75),
        row("32x8192/page16/e4m3", share=0.2, over_bf16=1.7, over_contiguous=2.0),
        row("32x8192/contiguous/e4m3", share=0.2, over_bf16=0.3),
    ]
    found = decode.verdicts(rows, 1.4)
    assert [(bar["value"], bar["met"]) for bar in found] == [
        (0.86, True), (0.75, True), (1.7, True), (1.09, True), (1.4, True)
    ]  # fmt: skip
    rows[3]["share"], rows[4]["over_bf16"], rows[0]["over_contiguous"], rows[0]["share"] = 0.74, 1.69, 1.11, 0.84
    assert not any(bar["met"] for bar in decode.verdicts(rows, 1.39))


def test_the_cases_are_those_of_the_issue():
    names = [case.name for case in decode_cases.every()]
    assert len(names) == 30 and "256x4096/page64/e4m3" in names and "1x131072/contiguous/bf16" in names
    assert kv_bytes(step_of(32, 32768)) == 4 << 30 and kv_bytes(step_of(32, 32768, 16, "e4m3")) == 2 << 30


def test_a_sweep_prints_every_variant_and_marks_what_is_wrong(registry, monkeypatch, capsys):
    monkeypatch.setattr(decode_raw, "every", lambda: decode_cases.every(((2, 64),)))
    options = ["--sweep", "--registry", str(registry), "--splits", "1", "2", "--repeats", "1", "--modes", "free"]
    assert decode.main([*options, "--cases", "*/page16/*"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and all("3 blocks/SM" in line and "*" in line for line in out)
    monkeypatch.setattr(CpuKernel, "wrong", PAGED)
    assert decode.main([*options, "--cases", "*/page16/bf16", "--op-variants", "*q8"]) == 1
    assert capsys.readouterr().out.count("WRONG") == 2
    with pytest.raises(cubins.BenchmarkError, match="matches 'fwd_paged-fp16"):
        decode.main([*options, "--op-variants", "fwd_paged-fp16*"])
