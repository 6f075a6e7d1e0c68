"""What the benchmarks share: reading candidates, emulating SM120's occupancy, result files and the grid."""

import json

import pytest

pytest.importorskip("torch")

from benchmarks import cases, cubins, measure
from benchmarks.occupancy import SM90_RESERVED, SM90_SMEM, padded_smem
from builder.inspect import blocks_per_sm
from tests.benchmarks.fakes import write_registry
from tests.support.abis import FWD

GOOD = "fwd-bf16-d64-dv64-m64-n64-w4-s1"
ALSO = "fwd-fp16-d64-dv64-m128-n64-w8-s1"


def test_read_takes_what_is_there_and_checks_bytes(tmp_path):
    path = write_registry(tmp_path / "r.db", [GOOD, ALSO])
    found = cubins.read(path, "sm_90")
    assert [c.key for c in found] == [GOOD, ALSO]
    assert found[0].sm120 is not None and found[0].sm120.arch == "sm_120"
    assert found[0].abi == FWD
    with pytest.raises(cubins.BenchmarkError, match="no sm_120 artifact"):
        cubins.Candidate(found[0].artifact, None, FWD, b"").target_blocks()


def test_forward_parameters_name_the_whole_abi():
    import torch

    q, k = torch.zeros(2, 5, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 7, 2, 64, dtype=torch.bfloat16)
    o, lse = torch.zeros_like(q), torch.zeros(2, 4, 5)
    values = cubins.fwd_values(FWD, q, k, k, o, lse, scale=0.125)
    assert len(FWD.pack(values)) == FWD.nbytes
    assert values["k_stride_b"] == 7 * 2 * 64 and values["seqlen_k"] == 7 and values["lse_stride_h"] == 5
    assert values["window_right"] == values["window_left"] == 2**30 and values["pack"] == 1


@pytest.mark.parametrize("threads", [32, 128, 256])
@pytest.mark.parametrize("registers", [96, 128, 168, 255])
@pytest.mark.parametrize("smem", [16_384, 33_792, 49_152, 65_536, 98_304, 101_376])
def test_padding_emulates_sm120_whenever_registers_allow(threads, registers, smem):
    target = blocks_per_sm(threads, registers, smem)
    assert target >= 1
    padded = padded_smem(target, static=0)
    assert padded >= smem
    assert SM90_SMEM // (padded + SM90_RESERVED) == target


def test_no_block_cannot_be_emulated():
    with pytest.raises(ValueError, match="target"):
        padded_smem(0, 0)


def test_result_files_have_the_agreed_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    rows = [
        {"case": "a", "ours": 1.0, "peer": 2.0, "ratio": 2.0, "variant": GOOD, "ptx_sha256": "0" * 64},
        {"case": "b", "ours": 2.0, "peer": 1.0, "ratio": 0.5, "variant": GOOD, "ptx_sha256": "0" * 64},
    ]
    value = json.loads(measure.write(tmp_path, "forward.free", measure.result("free", rows)).read_text())
    assert list(value) == ["gpu", "driver", "torch", "commit", "date", "mode", "rows", "geomean"]
    assert value["geomean"] == 1.0
    assert measure.result("free", [])["geomean"] is None


def test_the_grid_is_that_of_the_issue():
    grid = cases.grid()
    assert len(grid) == 6 * 6 * 2
    names = {case.name: case for case in grid}
    assert names["llama3-8b/S2048/causal"].batch == 4
    assert names["hd64/S512/full"].batch == 16 and names["hd256/S16384/causal"].batch == 1
    assert names["qwen2.5-7b/S8192/full"].flops == 4 * 28 * 8192**2 * 128
    assert names["qwen2.5-7b/S8192/causal"].flops == 2 * 28 * 8192**2 * 128
