"""The prefill benchmark without a GPU: rows, the bar, and that pages which change the result are seen."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")


from benchmarks import measure, prefill
from benchmarks.cubins import BenchmarkError
from benchmarks.prefill import prefill as call_of
from benchmarks.reference import attention

CASES = (call_of(2, 64, 64, 4, 2, 64), call_of(1, 16, 128, 2, 1, 64))


class PlainRuntime:
    """Attention in PyTorch behind the two functions that are compared."""

    ordered = False  # whether pages are taken in their order in memory, which is wrong

    def flash_attn(self, q, k, v, causal):
        return attention(q, k, v, causal, None)[0].to(q.dtype)

    def flash_attn_with_kvcache(self, q, k_cache, v_cache, *, block_table, cache_seqlens, causal):
        table = block_table.sort().values if self.ordered else block_table
        k, v = (x[table.long()].flatten(1, 2) for x in (k_cache, v_cache))
        assert k.shape[1] == int(cache_seqlens[0])
        return self.flash_attn(q, k, v, causal)


@pytest.fixture
def plain(monkeypatch):
    made = PlainRuntime()
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(prefill, "CASES", CASES)
    monkeypatch.setattr(prefill, "Ours", lambda registry, mode: SimpleNamespace(runtime=made, mode=mode))
    return made


def test_a_file_per_mode(plain, tmp_path):
    registry = tmp_path / "registry.db"
    registry.touch()
    assert prefill.main(["--registry", str(registry), "--out", str(tmp_path), "--repeats", "1"]) == 0
    for mode in ("free", "sm120"):
        value = json.loads((tmp_path / f"prefill.{mode}.json").read_text())
        names = [f"{case.name}/page{page}" for case in CASES for page in (16, 64)]
        assert [row["case"] for row in value["rows"]] == names and value["mode"] == mode
        assert [row["ratio"] is None for row in value["rows"]] == [False, False, True, True]
        (bar,) = value["bars"]
        assert bar["value"] == max(row["over_contiguous"] for row in value["rows"])


def test_pages_in_another_order_are_a_wrong_result(plain):
    plain.ordered = True
    with pytest.raises(BenchmarkError, match="page16: differs"):
        prefill.one_case(SimpleNamespace(runtime=plain), CASES[0], 1)
