import os
import time
from pathlib import Path

import pytest

from builder import nvjitlink, worker
from builder.worker import Answer, Pool, Task, environment
from registry.frames import decompress
from tests.builder import toys


def task(*features: str, archs: tuple[str, ...] = ("sm_120",), n: int = 64) -> Task:
    return Task(toys.variant(*features, n=n).key, archs, toys.GENERATOR)


def answers(pool: Pool, *tasks: Task) -> dict[str, Answer]:
    found = list(pool.run(tasks))
    assert len(found) == len(tasks)
    return {answer.key: answer for answer in found}


def test_a_worker_generates_once_and_assembles_for_every_architecture(calls: Path) -> None:
    with Pool(1) as pool:
        (answer,) = pool.run([task("mma", archs=("sm_120", "sm_90"))])
    assert answer.error is None and answer.errors == {} and answer.ptx is not None
    assert answer.facts is not None and answer.facts["threads"] == 128
    assert answer.facts["grid"] == {"rule": "tiles_heads_batch", "tile_m": 64}
    for arch in ("sm_120", "sm_90"):
        cubin = answer.cubins[arch]
        assert cubin.cubin == nvjitlink.assemble(answer.ptx, arch).cubin
        assert decompress(cubin.frame, len(cubin.cubin)) == cubin.cubin
    assert calls.read_text() == f"{answer.key} sm_80 []\n"


def test_stored_ptx_is_assembled_as_it_is(calls: Path) -> None:
    given = toys.ptx("toy_stored")
    with Pool(1) as pool:
        (answer,) = pool.run([Task(toys.variant().key, ("sm_90",), "no.such:module", given)])
    assert answer.cubins["sm_90"].cubin == nvjitlink.assemble(given, "sm_90").cubin
    assert answer.facts is None and calls.read_text() == ""


def test_every_way_to_fail_takes_one_variant(calls: Path) -> None:
    bad = [task("raises"), task("dies"), task("exits"), task("bad_ptx", archs=("sm_90", "sm_120"))]
    fine = [task(n=n) for n in (8, 16, 24, 32)]
    with Pool(2) as pool:
        found = answers(pool, *[t for pair in zip(bad, fine, strict=True) for t in pair])
    for t in fine:
        assert found[t.key].error is None and found[t.key].cubins.keys() == {"sm_120"}
    raised, died, exited, refused = (found[t.key] for t in bad)
    assert raised.error is not None and raised.error.startswith("generate: ValueError: planted: no such tile (toys.py:")
    assert died.error is not None and "died of SIGKILL" in died.error and "planted: last words" in died.error
    assert exited.error is not None and "ended with exit code 3" in exited.error
    assert refused.error is None and refused.cubins == {}
    assert [refused.errors[a].split(":")[:2] for a in ("sm_90", "sm_120")] == [
        ["sm_90", " assemble"],
        ["sm_120", " assemble"],
    ]


def test_a_variant_that_takes_too_long_is_ended() -> None:
    started = time.monotonic()
    with Pool(1, time_limit=2.0) as pool:
        found = answers(pool, task("hangs"), task())
    assert str(found[task("hangs").key].error).startswith("timeout: ")
    assert found[task().key].error is None
    assert time.monotonic() - started < 60


def test_a_worker_that_hangs_up_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE", 0.2)
    with Pool(1) as pool:
        found = answers(pool, task("hangs_up"), task())
        process = next(iter(pool._workers)).process
    assert "died of SIGKILL" in str(found[task("hangs_up").key].error)
    assert found[task().key].error is None and process.returncode is not None


def test_leaving_the_pool_ends_workers_and_removes_their_files() -> None:
    with pytest.raises(KeyboardInterrupt), Pool(2) as pool:
        for _ in pool.run([task(), task("hangs")]):
            processes = [w.process for w in pool._workers]
            folder = pool._folder
            assert folder.is_dir() and len(processes) == 2
            raise KeyboardInterrupt
    assert not folder.exists()
    assert all(p.returncode is not None for p in processes)
    for p in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(p.pid, 0)


def test_a_worker_sees_no_setting_of_the_dsl_but_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = environment(tmp_path)
    assert {name: value for name, value in found.items() if name.startswith("CUTE_DSL_")} == {"CUTE_DSL_ARCH": "sm_80"}
    assert found["TMPDIR"] == str(tmp_path)
    assert found["PYTHONPATH"].endswith(":/elsewhere") and not found["PYTHONPATH"].startswith("/elsewhere")
    assert found["PATH"] == os.environ["PATH"]
