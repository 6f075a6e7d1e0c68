"""FlashAttention-2 held to SM120's shared memory: the preload, the process that has it, and what is believed of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import backward, held, measure
from benchmarks.cases import dense
from benchmarks.cubins import BenchmarkError
from registry.contract import MAX_SMEM
from tests.benchmarks.fakes import stand_in_cudart

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
CASE = dense("tiny", 64, True, 4, 2, 64, 1)
ASKED = """
import ctypes, json, sys

def ask(library, attribute, device):
    value = ctypes.c_int(-1)
    status = library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return status, value.value

before = ask(ctypes.CDLL(None), 97, 0) if len(sys.argv) > 2 else None
user = ctypes.CDLL(sys.argv[1])  # by default of the module alone, as Python loads what torch is made of
asked = {"97": user.asks(97, 0), "81": user.asks(81, 0), "no device": user.asks(97, 7)}
print(json.dumps({"asked": asked, "before": before}))
"""


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in_cudart(tmp_path_factory.mktemp("cudart"))


@pytest.fixture
def on_cpu(monkeypatch, cudart):
    """The process on the CPU, with a CUDA runtime that answers what an H200 does."""
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setenv("LD_PRELOAD", str(cudart))


def asked(user: Path, preload: Path | None, *more: str) -> dict:
    env = {**os.environ, "LD_PRELOAD": str(preload or "")}
    command = [sys.executable, "-c", ASKED, str(user), *more]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@needs_compiler
def test_a_library_that_asks_its_cuda_runtime_hears_99_kb(tmp_path, cudart):
    """A library linked against a runtime with versioned symbols, as torch's are, loaded after the start."""
    source, user = tmp_path / "user.c", tmp_path / "user.so"
    source.write_text(
        "int cudaDeviceGetAttribute(int *, int, int);\n"
        "int asks(int attribute, int device) {\n"
        "    int value, failed = cudaDeviceGetAttribute(&value, attribute, device);\n"
        "    return failed ? -failed : value;\n}\n"
    )
    link = [str(source), str(cudart), f"-Wl,-rpath,{cudart.parent}", "-o", str(user)]
    subprocess.run(["cc", "-shared", "-fPIC", *link], check=True)
    free = {"97": 232_448, "81": 233_472, "no device": -101}
    assert asked(user, None)["asked"] == free
    found = asked(user, held.build(tmp_path), "before")
    assert found["asked"] == {**free, "97": MAX_SMEM}, "and all else as the runtime says it"
    assert found["before"] == [3, -1], "without a runtime nothing is answered"


@needs_compiler
def test_the_process_times_forwards_and_backwards_by_turns(on_cpu):
    with held.HeldPeer() as peer:
        for what in ("forward", "backward"):
            peer.prepare(what, CASE, "bf16")
            process = peer._process
            times = [peer.round(repeat) for repeat in range(3)]
            assert [len(ms) for ms in times] == [2, 2, 2] and all(0 < ms < 1000 for both in times for ms in both)
            assert peer.proof == {"bytes": MAX_SMEM, "asked": 0}, "on the CPU there is no FlashAttention-2 to ask"
        assert process.poll() is None
    assert process.returncode == 0, "it ends with its parent's pipe"


@needs_compiler
def test_a_runtime_that_is_not_held_is_noticed(on_cpu, monkeypatch, tmp_path):
    """The preload is there and says something else."""
    source = tmp_path / "held.c"
    source.write_text(held.SOURCE.read_text().replace("*value = HELD", "*value = HELD + 1"))
    monkeypatch.setattr(held, "SOURCE", source)
    with held.HeldPeer() as peer:
        with pytest.raises(BenchmarkError, match="a block may have 101377 bytes, not 101376"):
            peer.prepare("forward", CASE, "bf16")
        assert peer._process is None


@pytest.mark.parametrize(
    ("proof", "problem"),
    [
        ({"bytes": MAX_SMEM, "asked": 1}, None),
        ({"bytes": MAX_SMEM, "asked": 0}, "does not ask the CUDA runtime that is preloaded"),
        ({"bytes": 232_448, "asked": 1}, "a block may have 232448 bytes"),
        ({"bytes": -1, "asked": 0}, "a block may have -1 bytes"),
    ],
)
def test_what_proves_that_flash_attention_is_held(proof, problem):
    found = held.unproven(proof)
    assert found is None if problem is None else problem in found


@needs_compiler
def test_a_fault_in_the_process_fails_one_case_and_a_death_is_told(on_cpu):
    with held.HeldPeer() as peer:
        with pytest.raises(BenchmarkError, match="the held peer: KeyError: 'fp8'"):
            peer.prepare("forward", CASE, "fp8")
        peer.prepare("forward", CASE, "bf16")
        peer._process.kill()
        with pytest.raises(BenchmarkError, match="its process ended with -9"):
            peer.round(0)
        peer.prepare("forward", CASE, "bf16")
        assert len(peer.round(0)) == 2


@needs_compiler
def test_a_process_that_hangs_is_ended(on_cpu, monkeypatch):
    monkeypatch.setattr(held, "ANSWER_S", 0.0)
    with held.HeldPeer() as peer, pytest.raises(BenchmarkError, match="no answer to proof within 0 s"):
        peer.prepare("forward", CASE, "bf16")


@needs_compiler
@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-cc", "CC: no-such-cc cannot be run"), ("cc -fno-such-option", "CC: cc does not compile held.c: ")],
)
def test_without_a_compiler_it_says_so(monkeypatch, tmp_path, compiler, message):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(BenchmarkError, match=message):
        held.build(tmp_path)


def test_another_process_is_asked_before_and_after_our_calls_by_turns(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    order = []
    runs = {"ours": lambda i: order.append("ours")}
    times = measure.interleaved(runs, 2, 4, 0, {"held": lambda repeat: (order.append(f"held {repeat}"), [1.0, 2.0])[1]})
    assert order == ["ours", "held 0", "held 1", "ours", "ours", "held 2", "held 3", "ours"]
    assert times["held"] == [1.0, 2.0] * 4 and len(times["ours"]) == 4


def test_the_call_by_which_flash_attention_is_proven_is_one_that_it_has(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    from benchmarks import held_child

    dq, _, _ = backward.peer(held_child.ASKS, *backward.draw(held_child.ASKS, "bf16"))[0]()
    assert dq.shape == (1, 64, 1, 64)
