import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from builder import build as build_module
from builder import inspect, nvjitlink
from builder.build import Build, Result, Table
from builder.examine import Candidate, Examined, examine
from builder.toolchain import Toolchain
from builder.verified import Conformance, Verified
from registry import __version__, gc
from registry.contract import Index, Variant, sha256_hex
from registry.store import Store
from tests.builder import toys

pytestmark = pytest.mark.usefixtures("cached_nvdisasm")

ARCHS = ("sm_120", "sm_90")


def run(store: Store, table: Table, archs: tuple[str, ...] = ("sm_120",), **options: object) -> Result:
    return Build(table, archs, store).run(**{"jobs": 2, **options})  # type: ignore[arg-type]


def index_of(store: Store, arch: str = "sm_120", channel: str = "stable") -> Index:
    body = store.get_index(store.channel(channel)[arch])
    assert body is not None
    return Index.from_bytes(body)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "registry.db")


def test_a_build_fills_store_index_and_channel(store: Store, good: Table) -> None:
    result = run(store, good)
    keys = [v.key for v in good.variants]
    assert (result.variants, sorted(result.built), result.cached, result.failed) == (3, keys, [], {})
    assert store.channel("stable") == result.indexes == {"sm_120": index_of(store).digest}
    index = index_of(store)
    assert (index.arch, index.release, index.rows, index.abis) == ("sm_120", __version__, good.rows, (toys.ABI,))
    assert [a.variant for a in index.artifacts] == keys
    assert store.verify() == []
    a = index.by_variant[toys.variant("mma", n=96).key]
    ptx = store.ptx_text(a.ptx_sha256)
    assert ptx == toys.ptx(a.symbol, {"mma"}, 96)
    assert (a.threads, a.smem, a.static_smem, a.spills, a.stack, a.min_driver) == (128, 1024, 0, 0, 0, 12080)
    assert (a.abi, a.grid.tile_m, a.blocks_per_sm) == (toys.ABI.digest, 64, 12)
    assert dict(a.hot_loop)["HMMA"] > 0 and a.registers > 8
    assert a.cubin_sha256 == sha256_hex(nvjitlink.assemble(ptx, "sm_120").cubin)
    assert "nvidia-cutlass-dsl" in a.toolchain and "nvidia-nvjitlink-cu12 12.9" in a.toolchain


def test_an_unchanged_variant_costs_nothing(
    store: Store, good: Table, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(store, good)
    monkeypatch.setattr(build_module, "Pool", None)  # no worker is ever started
    again = run(store, good)
    assert (again.built, sorted(again.cached)) == ([], [v.key for v in good.variants])
    assert again.indexes == first.indexes and again.artifacts == first.artifacts
    assert len(calls.read_text().splitlines()) == 3


def test_another_architecture_is_assembled_from_the_stored_ptx(store: Store, good: Table, calls: Path) -> None:
    run(store, good)
    result = run(store, good, ARCHS)
    assert len(result.built) == 3 and len(calls.read_text().splitlines()) == 3
    there, here = index_of(store, "sm_120"), index_of(store, "sm_90")
    assert store.channel("stable") == result.indexes == {"sm_120": there.digest, "sm_90": here.digest}
    assert [a.ptx_sha256 for a in here.artifacts] == [a.ptx_sha256 for a in there.artifacts]
    assert {a.min_driver for a in here.artifacts} == {12000}
    assert not {a.cubin_sha256 for a in here.artifacts} & {a.cubin_sha256 for a in there.artifacts}


def test_builds_in_different_folders_and_orders_give_equal_digests(tmp_path: Path) -> None:
    digests = []
    for n, jobs in enumerate((1, 2)):
        folder = tmp_path / f"checkout{n}"
        table = toys.table(*(toys.variant("mma", n=k) for k in (8, 16, 24)), folder=toys.write_sources(folder))
        with Store(folder / "registry.db") as store:
            digests.append(run(store, table, ARCHS, jobs=jobs).indexes)
    assert digests[0] == digests[1]
    assert str(tmp_path) not in json.dumps(digests)


def test_every_failing_variant_fails_alone(store: Store, sources: Path) -> None:
    reasons = {
        "raises": "generate: ValueError: planted: no such tile",
        "dies": "worker: its process died of SIGKILL",
        "wrong_symbol": "symbol: ",
        "wrong_threads": "threads: ",
        "swapped_params": "abi: parameter n is .f32",
        "bad_target": "target: ",
        "path": "path: ",
        "two_kernels": "symbol: ",
        "big_smem": "smem: 204,800 bytes",
        "big_total": "sm_120: smem: 65,536 dynamic + 40,000 static",
        "spills": "sm_120: spills: ",
        "bad_ptx": "sm_120: assemble: ",
    }
    fine = [toys.variant(n=8), toys.variant("mma", n=16)]
    table = toys.table(*(toys.variant(name) for name in reasons), *fine, folder=sources)
    result = run(store, table)
    assert sorted(result.built) == sorted(v.key for v in fine)
    assert result.failed.keys() == {toys.variant(name).key for name in reasons}
    for name, reason in reasons.items():
        found = result.failed[toys.variant(name).key]
        assert found.startswith(reason), f"{name}: {found}"
    assert store.channel("stable") == {}, "a build with failures moves no channel"
    index = Index.from_bytes(store.get_index(result.indexes["sm_120"]) or b"")
    assert sorted(index.by_variant) == sorted(v.key for v in fine)
    assert store.verify() == []


def test_a_failure_leaves_the_channel_where_it_was(store: Store, good: Table, sources: Path) -> None:
    before = run(store, good).indexes
    bad = toys.table(*good.variants, toys.variant("raises"), folder=sources)
    after = run(store, bad)
    assert after.failed and after.indexes != before
    assert store.channel("stable") == before


def test_spills_in_the_loop_fail_sm_120_and_not_the_test_architecture(store: Store, sources: Path) -> None:
    result = run(store, toys.table(toys.variant("spills"), folder=sources), ARCHS)
    (reason,) = result.failed.values()
    assert reason.startswith("sm_120: spills: ") and "sm_90" not in reason
    assert result.indexed == {"sm_90": 1}


def test_one_cubin_that_nvdisasm_cannot_read_fails_alone(
    store: Store, good: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = inspect.read_elf
    marked = nvjitlink.assemble(toys.ptx("toy_" + good.variants[0].key.replace("-", "_"), n=32), "sm_120").cubin

    def read_damaged(cubin: bytes) -> inspect.Elf:
        elf = read(cubin)
        if cubin == marked:
            elf.kernels.update({name: b"\xff" * 64 for name in elf.kernels})
        return elf

    monkeypatch.setattr(inspect, "read_elf", read_damaged)
    result = run(store, good)
    assert result.failed.keys() == {good.variants[0].key}
    assert "inspect: nvdisasm" in result.failed[good.variants[0].key]
    assert len(result.built) == 2


def test_batches_are_settled_while_the_build_runs(store: Store, good: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "BATCH", 1)
    seen = []
    result = run(store, good, progress=lambda done, total, key: seen.append((done, len(store.artifacts()))))
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)] and not result.failed


def test_a_changed_source_rebuilds_and_an_unrelated_one_does_not(
    store: Store, good: Table, sources: Path, calls: Path
) -> None:
    first = run(store, good)
    (sources / "kernels" / "unrelated.py").write_text("VALUE = 3\n")
    assert len(run(store, good).cached) == 3
    (sources / "kernels" / "helper.py").write_text("VALUE = 3\n")
    changed = run(store, good)
    assert len(changed.built) == 3 and len(calls.read_text().splitlines()) == 6
    assert changed.indexes == first.indexes, "equal PTX gives an equal index, whatever the sources"


def test_a_changed_assembler_reassembles_without_generating(store: Store, good: Table, calls: Path) -> None:
    run(store, good)
    now = Toolchain.current()
    later = dataclasses.replace(now, assemble={**now.assemble, "nvidia-cuda-nvdisasm": "99"})
    assert len(Build(good, ["sm_120"], store, toolchain=later).run().built) == 3
    assert len(calls.read_text().splitlines()) == 3


def test_a_selection_builds_a_part_and_the_index_covers_what_is_there(store: Store, good: Table) -> None:
    def only(variant: Variant) -> bool:
        return variant.size("n") == 32

    result = run(store, good, select=only)
    assert (result.variants, len(result.built), result.indexed) == (1, 1, {"sm_120": 1})
    assert index_of(store).rows == good.rows
    assert run(store, good).indexed == {"sm_120": 3}
    again = run(store, good, select=only)
    assert (again.variants, again.cached, again.indexed) == (1, [good.variants[0].key], {"sm_120": 3})
    assert [key for key, _ in again.artifacts] == again.cached


def test_channels_are_apart(store: Store, good: Table) -> None:
    digest = run(store, good, channel="next").indexes["sm_120"]
    assert store.channels() == {"next": {"sm_120": digest}}


def test_an_interrupted_build_leaves_a_sound_registry_and_is_resumed(store: Store, good: Table, calls: Path) -> None:
    def interrupt(done: int, total: int, key: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, good, jobs=1, progress=interrupt)
    assert store.verify() == [] and store.channels() == {}
    again = run(store, good)
    assert (len(again.built), len(again.cached)) == (1, 2), "what was finished is stored, nvdisasm and all"
    assert len(calls.read_text().splitlines()) == 3


def test_an_interruption_of_nvdisasm_loses_nothing(store: Store, good: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def interrupted(batch: Sequence[Candidate], arch: str) -> Iterator[tuple[Candidate, Examined | list[str]]]:
        for n, found in enumerate(examine(batch, arch)):
            reads.append(len(batch))
            if n == len(reads) - 1 == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(build_module, "examine", interrupted)
    builder = Build(good, ["sm_120"], store)
    monkeypatch.setattr(build_module, "BATCH", 3)
    with pytest.raises(KeyboardInterrupt):
        builder.run(jobs=1)
    assert builder.result is not None and len(builder.result.built) == len(store.artifacts()) == 3
    assert reads == [3, 3, 2, 2]


def test_a_channel_never_loses_variants_of_the_table_unasked(store: Store, good: Table, sources: Path) -> None:
    whole = run(store, good).indexes
    (sources / "kernels" / "helper.py").write_text("VALUE = 3\n")

    def only(variant: Variant) -> bool:
        return variant.size("n") == 32

    part = run(store, good, select=only)
    assert part.lacking == {"sm_120": [v.key for v in good.variants[1:]]} and part.moved == []
    assert store.channel("stable") == whole
    new = run(store, good, ("sm_90",), select=only)
    assert (new.moved, new.lacking) == (["sm_90"], {}), "an architecture's first index may be a part"
    smaller = toys.table(good.variants[0], folder=sources)
    assert run(store, smaller).moved == ["sm_120"], "variants that the table dropped are not missed"


def rewrite(store: Store, digest: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the index of this digest has these bytes, as another release would have written them."""
    read = Store.get_index
    monkeypatch.setattr(Store, "get_index", lambda self, d: body if d == digest else read(self, d))


@pytest.mark.parametrize(("body", "number"), [(b'{"format":1}', 1), (b'{"format":"x"}', 0), (b"[]", 0)])
def test_a_channel_at_an_index_of_an_older_format_moves_on_and_keeps_it(
    body: bytes, number: int, store: Store, good: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = run(store, good).indexes["sm_120"]
    rewrite(store, digest, body, monkeypatch)
    result = run(store, toys.table(*good.variants[:2], folder=good.folder or Path()))
    assert (result.moved, result.formats, result.lacking) == (["sm_120"], {"sm_120": number}, {})
    assert store.channel("stable")["sm_120"] != digest and digest in store.indexes()
    assert run(store, good).formats == {}


def test_a_channel_at_an_index_of_a_newer_format_moves_only_if_allowed(
    store: Store, good: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(store, good).indexes
    rewrite(store, before["sm_120"], b'{"format":4}', monkeypatch)
    smaller = toys.table(*good.variants[:2], folder=good.folder or Path())
    result = run(store, smaller)
    assert (result.moved, result.formats) == ([], {"sm_120": 4}) and store.channel("stable") == before
    assert run(store, smaller, allow_partial=True).moved == ["sm_120"]


def test_a_conflict_with_another_build_fails_its_variant_alone(
    store: Store, good: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = Build(good, ["sm_120"], store)
    job = builder.jobs[good.variants[0].key]
    store.put_ptx(job.ptx_fingerprint, job.key, "another text", {"symbol": "x", "threads": 32, "smem": 0, "grid": {}})
    monkeypatch.setattr(Store, "get_ptx", lambda self, fingerprint: None)  # it came in between
    result = builder.run(jobs=1)
    assert result.failed.keys() == {job.key} and result.failed[job.key].startswith("conflict: ")
    assert len(result.built) == 2


def test_verification_is_required_of_every_indexed_variant(store: Store, good: Table) -> None:
    conformance = Conformance(1, {"toy": ("yardstick",)})
    nothing = run(store, good, verified=Verified(conformance, {}))
    assert nothing.unverified.keys() == {v.key for v in good.variants} and store.channels() == {}
    assert all("yardstick: never run" in reason for reason in nothing.unverified.values())
    assert (len(nothing.built), nothing.failed, nothing.moved) == (3, {}, [])
    assert nothing.verified == {v.key: [] for v in good.variants}
    passes = {(a.ptx_sha256, "yardstick", "sm_90"): "pass" for a in nothing.artifacts.values()}
    failing = {**passes, (next(iter(passes))[0], "yardstick", "sm_120"): "fail"}
    (reason,) = run(store, good, verified=Verified(conformance, failing)).unverified.values()
    assert reason.endswith("yardstick: fail on sm_120") and store.channels() == {}
    result = run(store, good, verified=Verified(conformance, passes))
    assert result.unverified == {} and result.verified == {v.key: ["sm_90"] for v in good.variants}
    assert store.channel("stable") == nothing.indexes


def test_a_build_after_gc_compiles_nothing(store: Store, good: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when no channel names what was built, and it is old."""
    first = run(store, good)
    store._db.execute("DELETE FROM channels")
    store._db.execute("DELETE FROM history")
    plan = gc.collect(store, keep_s=0.0)
    assert plan.indexes == tuple(first.indexes.values()) and plan.artifacts == plan.ptx == plan.blobs == ()
    monkeypatch.setattr(build_module, "Pool", None)  # no worker is ever started
    again = run(store, good)
    assert (again.built, sorted(again.cached), again.indexes) == ([], [v.key for v in good.variants], first.indexes)


def test_what_gc_takes_before_a_build_begins_is_built_again(store: Store, good: Table) -> None:
    """The plan was made before: what it found in the store no longer counts."""
    run(store, good)
    late = Build(good, ("sm_120",), store)
    store.set_wanted("sm_120", [])
    store._db.execute("DELETE FROM channels")
    store._db.execute("DELETE FROM history")
    assert len(gc.collect(store, keep_s=0.0).artifacts) == 3
    result = late.run(jobs=2)
    assert len(result.built) == 3 and store.verify() == [] and store.channel("stable") == result.indexes
