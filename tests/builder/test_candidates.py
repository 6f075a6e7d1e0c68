"""python -m builder candidates: the space of tiles, its rules, and the registry that it fills."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.__main__ import main
from builder.build import Table
from builder.candidates import ARCHS, CHANNEL, FWD_SPACE, space
from kernels import dispatch
from kernels.validity import invalid
from registry.contract import Variant
from registry.store import Store
from tests.builder import toys

pytestmark = pytest.mark.usefixtures("cached_nvdisasm")
DIMS = sorted({(v.head_dim, v.head_dim_v) for v in dispatch.variants()})


def generate(variant: Variant, dump_dir: str) -> toys.Toy:
    """In a worker: a toy for each candidate, but for one."""
    if variant.size("n") == 64:
        raise ValueError("planted: it spills")
    return toys.generate(variant, dump_dir)


@pytest.fixture
def table(sources: Path) -> Table:
    incumbent = Variant.parse("fwd-bf16-d128-dv128-m256-n32-w8-s2")
    return Table(
        (incumbent, incumbent.replace(dtype="fp16"), Variant.parse("fwd-bf16-d64-dv64-m64-n64-w4-s1")),
        (), {"fwd": toys.ABI}, {"fwd": ("kernels.toy",)}, f"{__name__}:generate", sources,
    )  # fmt: skip


@pytest.mark.parametrize("dims", DIMS)
def test_every_tile_of_the_space_is_a_candidate_or_has_a_reason(dims: tuple[int, int]) -> None:
    kept, left_out = space(dims)
    total = 1
    for sizes in FWD_SPACE.values():
        total *= len(sizes)
    keys = [v.key for v in kept]
    assert len({*keys, *left_out}) == len(keys) + len(left_out) == total
    assert all(left_out.values()) and 5 <= len(kept) <= 200
    assert all(invalid(v) is None for v in kept)
    assert {v.size("m") for v in kept} >= {32, 64, 128}, "for short queries as well as long ones"


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        ("m128-n64-w4-s1", "accumulators a thread"),  # it did spill, see docs/tuning.md
        ("m128-n32-w2-s1", "more than 32 query rows a warp"),
        ("m16-n128-w1-s1", "fewer than 4 warps an SM"),
        ("m64-n16-w4-s1", "twice the barriers for nothing"),
        ("m128-n128-w8-s2", "bytes of shared memory, a block has"),
        ("m64-n32-w4-s2-q8", "one stage"),
    ],
)
def test_reasons(tile: str, reason: str) -> None:
    _, left_out = space((128, 128))
    assert reason in left_out[f"fwd-bf16-d128-dv128-{tile}"]


def test_the_tables_own_long_tiles_are_in_the_space_unless_the_table_knows_better() -> None:
    for dims in DIMS:
        keys = {v.key for v in space(dims)[0]}
        own = {v.key for v in dispatch.variants() if (v.dtype, v.head_dim, v.head_dim_v) == ("bf16", *dims)}
        assert own & keys, dims


def test_candidates_and_incumbents_are_built_for_both_architectures_and_faults_named(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.db"
    argv = ["candidates", "--dims", "128,128", "--registry", str(path), "--only", "*-m64-n[36]?-w4-s1"]
    assert main(argv, lambda: table) == 0
    out = capsys.readouterr().out
    assert "left out: fwd-bf16-d128-dv128-m64-n64-w4-s1: generate: ValueError: planted: it spills" in out
    assert "2 of 3 candidates in" in out
    keys = {"fwd-bf16-d128-dv128-m64-n32-w4-s1", "fwd-bf16-d128-dv128-m256-n32-w8-s2"}
    with Store(path, readonly=True) as store:
        assert {(a.variant, a.arch) for a in store.artifacts().values()} == {(k, a) for k in keys for a in ARCHS}
        assert store.channels().keys() <= {CHANNEL}


def test_a_dry_run_lists_and_writes_nothing(table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.db"
    assert main(["candidates", "--dims", "128", "--registry", str(path), "--dry-run"], lambda: table) == 0
    out = capsys.readouterr().out
    assert "fwd-bf16-d128-dv128-m64-n32-w4-s1\n" in out and "-d64-" not in out and not path.exists()
    assert "left out: fwd-bf16-d128-dv128-m128-n64-w4-s1: more than" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "bwd"], "tiles are declared for fwd alone"),
        (["--dims", "80,80"], "--dims 80,80: the table has 64,64 128,128"),
        (["--dims", "x"], "'x' is not a positive whole number"),
        (["--dtype", "fp8"], "--dtype fp8: not one of bf16, fp16"),
        (["--registry", "https://example.test"], "is a URL"),
    ],
)
def test_usage(argv: list[str], message: str, table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["candidates", *argv], lambda: table) == 2
    assert message in capsys.readouterr().err


def test_a_registry_that_is_served_is_refused(
    good: Table, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.db"
    assert main(["--registry", str(path)], lambda: good) == 0
    assert main(["candidates", "--registry", str(path)], lambda: table) == 2
    assert "it has the channel stable; name another file" in capsys.readouterr().err
