import re
from typing import Any

import pytest

from builder import checks
from builder.checks import elf_reasons, ptx_reasons, usage_reasons
from builder.inspect import Elf, Usage
from builder.sass import Loops
from registry.contract import MAX_SMEM, Abi, Param
from tests.builder import toys
from tests.support.abis import ABIS

GRID = {"rule": "tiles_heads_batch", "tile_m": 64}
FACTS: dict[str, Any] = {"symbol": "toy", "threads": 128, "smem": 1024, "grid": GRID}
FINE = Usage(registers=100, spills=0, stack=0, static_smem=0)


def reasons(*features: str, **changed: Any) -> list[str]:
    return ptx_reasons(toys.ptx("toy", set(features)), FACTS | changed, toys.ABI, "sm_80")


def test_a_sound_ptx_has_no_reasons() -> None:
    assert reasons() == [] == reasons("mma")


@pytest.mark.parametrize(
    ("features", "changed", "reason"),
    [
        (("bad_target",), {}, r"^target: .*sm_90a.*expected sm_80"),
        (("path",), {}, r"^path: .*/home/somebody/checkout/kernels/toy.py"),
        ((), {"symbol": "other"}, r"^symbol: .*\['toy'\].*other"),
        (("two_kernels",), {}, r"^symbol: .*'toy', 'toy_b'"),
        ((), {"threads": 256}, r"^threads: .*128 threads.*256"),
        (("swapped_params",), {}, r"^abi: parameter n is \.f32 of 4 bytes at offset 8"),
        (("short_params",), {}, r"^abi: the entry has 3 parameters, toy v1 has 4"),
        ((), {"smem": MAX_SMEM + 1}, r"^smem: 101,377 bytes"),
        ((), {"smem": -1}, r"^smem: -1"),
        ((), {"grid": {"rule": "spiral", "tile_m": 64}}, r"^grid: rule 'spiral'"),
    ],
)
def test_each_planted_fault_is_named(features: tuple[str, ...], changed: dict[str, Any], reason: str) -> None:
    found = reasons(*features, **changed)
    assert len(found) == 1
    assert re.search(reason, found[0])


def test_threads_that_no_launch_takes() -> None:
    for threads in (0, 100, 2048):
        text = toys.ptx("toy").replace(".reqntid 128, 1, 1\n", "")
        assert ptx_reasons(text, FACTS | {"threads": threads}, toys.ABI, "sm_80")[0].startswith("threads: ")
    assert ptx_reasons(toys.ptx("toy").replace("128, 1, 1", "64, 2"), FACTS, toys.ABI, "sm_80") == []


def test_a_ptx_without_an_entry() -> None:
    found = ptx_reasons(".version 8.0\n.target sm_80\n", FACTS, toys.ABI, "sm_80")
    assert [reason.split(":")[0] for reason in found] == ["symbol", "abi"]


def test_comments_and_relative_paths_are_no_paths() -> None:
    for line in ("// begin inline asm", "//----- a/b ----", "/* x/y */", "a/b"):
        assert checks.paths(line) is None, line
    for line in ('.file 1 "/tmp/x.py"', "// from /root/k/x.py", "(/usr/lib)"):
        assert checks.paths(line) is not None, line


def test_parameters_at_other_offsets_or_of_other_sizes() -> None:
    abi = Abi("toy", 1, (Param("a", "i32"), Param("b", "ptr")))

    def entry(*params: str) -> str:
        return ".visible .entry k(" + ",\n".join(f".param {p} k_param_{i}" for i, p in enumerate(params)) + ")\n{\n}"

    assert checks.params(entry(".u32", ".u64 .ptr .global .align 16"), abi) is None
    assert checks.params(entry(".b32", ".u64"), abi) is None
    assert "at offset 16" in str(checks.params(entry(".u32", ".align 16 .b64"), abi))
    assert "a is .u64" in str(checks.params(entry(".u64", ".u64"), abi))
    assert "a is .u64" in str(checks.params(entry(".u64", ".u32"), abi))
    struct_param = checks.params(".entry k(.param .align 8 .b8 k_param_0[48], .param .u64 k_param_1)\n{\n}", abi)
    assert "of 48 bytes at offset 0" in str(struct_param)
    assert checks.params(".entry k()\n{\n}", Abi("none", 1, ())) is None


def test_the_forward_abi_is_checked_in_full() -> None:
    types = {"ptr": ".u64 .ptr .global .align 16", "i64": ".u64", "i32": ".u32", "f32": ".f32"}
    abi = ABIS["fwd"]
    listed = [f".param {types[p.type]} k_param_{i}" for i, p in enumerate(abi.params)]
    assert checks.params(f".entry k({', '.join(listed)})\n{{\n}}", abi) is None
    for i in range(len(listed)):
        without = listed[:i] + listed[i + 1 :]
        assert checks.params(f".entry k({', '.join(without)})\n{{\n}}", abi) is not None


@pytest.mark.parametrize(
    ("elf", "reason"),
    [
        (Elf(190, "sm_120", {"toy": b""}), None),
        (Elf(62, "sm_120", {"toy": b""}), "sm_120: elf: machine 62"),
        (Elf(190, "sm_90", {"toy": b""}), "sm_120: elf: machine 190 and sm_90"),
        (Elf(190, "sm_120", {"toys": b""}), "sm_120: kernels: the cubin holds ['toys']"),
        (Elf(190, "sm_120", {}), "sm_120: kernels: the cubin holds []"),
        (Elf(190, "sm_120", {"toy": b"", "other": b""}), "sm_120: kernels: the cubin holds ['other', 'toy']"),
    ],
)
def test_cubin_headers(elf: Elf, reason: str | None) -> None:
    found = elf_reasons(elf, FACTS, "sm_120")
    assert (found == []) if reason is None else (len(found) == 1 and found[0].startswith(reason))


def test_shared_memory_counts_both_kinds() -> None:
    most = {**FACTS, "smem": MAX_SMEM - 512}
    quiet = Loops((), False)
    assert usage_reasons(Usage(100, 0, 0, 512), quiet, most, "sm_120") == []
    assert "100,864 dynamic + 513 static" in usage_reasons(Usage(100, 0, 0, 513), quiet, most, "sm_120")[0]


def test_spills_fail_only_in_a_loop_with_hmma_and_only_on_sm12x() -> None:
    spilled = Usage(255, 64, 32, 0)
    assert usage_reasons(spilled, Loops((), False), FACTS, "sm_120") == []
    assert usage_reasons(FINE, Loops((), True), FACTS, "sm_120") == []  # local arrays that are no spills
    assert usage_reasons(spilled, Loops((), True), FACTS, "sm_90") == []
    for arch in ("sm_120", "sm_121"):
        assert usage_reasons(spilled, Loops((), True), FACTS, arch) == [
            f"{arch}: spills: 64 bytes with 255 registers, in a loop with HMMA"
        ]
