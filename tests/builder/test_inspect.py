import pytest

from builder import nvjitlink
from builder.errors import AssembleError, InspectError
from builder.inspect import Usage, blocks_per_sm, read_elf, read_log
from registry.frames import ELF_MACHINE_CUDA
from tests.builder import toys


def test_nvjitlink_is_deterministic_and_of_toolkit_12() -> None:
    text = toys.ptx("toy")
    assert nvjitlink.version() == (12, 9)
    assert nvjitlink.assemble(text, "sm_120").cubin == nvjitlink.assemble(text, "sm_120").cubin


def test_nvjitlink_errors_carry_its_log() -> None:
    with pytest.raises(AssembleError, match=r"sm_120: PTX compile: (?s:.*)known instruction: 'no'"):
        nvjitlink.assemble(toys.ptx("toy", {"bad_ptx"}), "sm_120")
    with pytest.raises(AssembleError, match="sm_12345"):
        nvjitlink.assemble(toys.ptx("toy"), "sm_12345")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "sm_121"])
def test_elf_header_of_every_architecture(arch: str) -> None:
    elf = read_elf(nvjitlink.assemble(toys.ptx("toy"), arch).cubin)
    assert (elf.machine, elf.arch) == (ELF_MACHINE_CUDA, arch)
    assert list(elf.kernels) == ["toy"]
    assert len(elf.kernels["toy"]) % 16 == 0 and len(elf.kernels["toy"]) >= 128


def test_elf_lists_every_kernel() -> None:
    elf = read_elf(nvjitlink.assemble(toys.ptx("toy", {"two_kernels"}), "sm_120").cubin)
    assert sorted(elf.kernels) == ["toy", "toy_b"]


def test_what_is_no_cubin_is_refused() -> None:
    cubin = nvjitlink.assemble(toys.ptx("toy"), "sm_120").cubin
    for junk in (b"", b"\x7fELF", b"PK" + cubin[2:], cubin[:100], cubin[: len(cubin) // 2]):
        with pytest.raises(InspectError, match="not a cubin"):
            read_elf(junk)


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_log_of_a_real_assembly(arch: str) -> None:
    assert read_log(nvjitlink.assemble(toys.ptx("toy"), arch).log) == Usage(8, 0, 0, 0)
    # The linker's own summary says 41,024 on sm_90: it counts the kilobyte that the system reserves.
    assert read_log(nvjitlink.assemble(toys.ptx("toy", {"big_total"}), arch).log).static_smem == 40_000
    spilled = read_log(nvjitlink.assemble(toys.ptx("toy", {"spills"}), arch).log)
    assert spilled.registers <= 48 and spilled.spills > 0 and spilled.stack > 0


def test_log_adds_up_device_functions() -> None:
    text = (
        "ptxas info    : Compiling entry function 'k' for 'sm_120'\n"
        "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem\n"
        "ptxas         .     24 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "info    : used 41 registers, used 1 barriers, 0 stack, 9999 bytes smem\n"
    )
    assert read_log(text) == Usage(registers=40, spills=36, stack=24, static_smem=512)


def test_log_that_does_not_read_is_refused() -> None:
    for text in ("", "ptxas info : Used 4 registers\n" * 2):
        with pytest.raises(InspectError, match="nvJitLink's log"):
            read_log(text)


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "blocks"),
    [
        (128, 255, 49_152, 2),  # registers and shared memory agree
        (128, 168, 0, 3),
        (128, 169, 0, 2),  # 169 · 32 rounds up to 5,632: two warps a partition
        (256, 128, 0, 2),
        (128, 32, 101_376, 1),  # all of a block's shared memory
        (128, 32, 101_376 - 51_200, 2),
        (128, 32, 50_176, 2),  # 2 · (50,176 + 1,024) is exactly the 102,400 of an SM
        (128, 32, 50_177, 1),
        (32, 16, 0, 24),  # no more blocks than 24
        (512, 32, 0, 3),  # 1,536 threads
        (1024, 32, 0, 1),
        (1024, 255, 0, 0),  # does not fit at all
    ],
)
def test_blocks_per_sm(threads: int, registers: int, smem: int, blocks: int) -> None:
    assert blocks_per_sm(threads, registers, smem) == blocks
