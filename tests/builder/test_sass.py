import pytest

from builder import inspect, nvjitlink, sass
from builder.errors import InspectError
from builder.sass import Instruction, loops, natural_loops, parse
from tests.builder import toys


def program(*lines: str) -> list[Instruction]:
    return parse("".join(f"        /*{16 * n:04x}*/    {line} ;\n" for n, line in enumerate(lines)))


def test_parse_reads_guards_suffixes_and_targets() -> None:
    guarded, uniform, plain, barrier = program(
        "@!P1 BRA 0x1960", "BRA.U !UP0, 0x20", "BRA 0x30", "BSYNC.RECONVERGENT B0"
    )
    assert [i.target for i in (guarded, uniform, plain)] == [0x1960, 0x20, 0x30]
    assert [i.conditional for i in (guarded, uniform, plain)] == [True, True, False]
    assert (barrier.name, barrier.operands, barrier.address) == ("BSYNC", "B0", 0x30)
    assert parse("        /*0000*/              @!UP0 UIADD3 UR4, UPT, UPT, UR4, 0x1, URZ ;")[0].name == "UIADD3"


def test_the_shortest_of_the_innermost_loops_with_the_most_hmma_is_hot() -> None:
    found = loops(
        program(
            "MOV R0, R1",
            "HMMA.16816.F32.BF16 R0, R1, R2, R0",  # 1: a masked loop
            "HMMA.16816.F32.BF16 R4, R1, R2, R4",
            "FSEL R0, R0, -INF, P0",
            "@P1 BRA 0x10",
            "IADD3 R9, R9, 0x1, RZ",  # 5: an outer loop
            "HMMA.16816.F32.BF16 R0, R1, R2, R0",  # 6: an inner loop
            "HMMA.16816.F32.BF16 R4, R1, R2, R4",
            "@P1 BRA 0x60",
            "HMMA.16816.F32.BF16 R0, R1, R2, R0",
            "@P2 BRA 0x50",
            "FADD R0, R0, R1",  # 11: a longer loop without HMMA
            "FADD R0, R0, R1",
            "FADD R0, R0, R1",
            "FADD R0, R0, R1",
            "@P2 BRA 0xb0",
            "EXIT",
            "BRA 0x110",  # what ptxas pads with
        )
    )
    assert dict(found.hot) == {"HMMA": 2, "BRA": 1}
    assert not found.spilling


def test_without_hmma_the_longest_loop_is_hot() -> None:
    found = loops(
        program("FADD R0, R0, R1", "@P0 BRA 0x0", "FMUL R0, R0, R1", "FMUL R0, R0, R1", "@P0 BRA 0x20", "EXIT")
    )
    assert dict(found.hot) == {"FMUL": 2, "BRA": 1}


def test_a_jump_back_from_code_behind_the_end_is_no_loop() -> None:
    moved = program(
        "@P0 BRA 0x50",  # rare: to code behind the exit
        "HMMA.16816.F32.BF16 R0, R1, R2, R0",
        "STL [R1], R0",
        "STG.E [R2], R0",
        "EXIT",
        "MOV R0, RZ",
        "BRA 0x10",
    )
    assert natural_loops(moved) == {}
    assert loops(moved) == sass.Loops((), False)


def test_a_loop_whose_rare_part_lies_behind_the_end_is_found_whole() -> None:
    found = loops(
        program(
            "MOV R0, R1",
            "HMMA.16816.F32.BF16 R0, R1, R2, R0",
            "@P0 BRA 0x50",
            "@P1 BRA 0x10",
            "EXIT",
            "LDL R0, [R1]",  # the rare part, of the same loop
            "BRA 0x30",
        )
    )
    assert dict(found.hot) == {"HMMA": 1, "BRA": 2}  # of every iteration; the rare part's are LDL and BRA
    assert found.spilling


def test_what_is_jumped_over_is_not_hot() -> None:
    branches = program(
        "MOV R0, R1",
        "HMMA.16816.F32.BF16 R0, R1, R2, R0",
        "@P0 BRA 0x50",
        "FMUL R0, R0, R1",  # one way
        "BRA 0x60",
        "FADD R0, R0, R1",  # the other
        "@!P3 LDGSTS [R8], [R10]",  # guarded, but always issued
        "@P1 BRA 0x10",
        "EXIT",
    )
    assert dict(loops(branches).hot) == {"HMMA": 1, "LDGSTS": 1, "BRA": 2}


def test_of_two_branches_back_what_both_have_passed_is_hot() -> None:
    forked = program(
        "HMMA.16816.F32.BF16 R0, R1, R2, R0",
        "@P0 BRA 0x40",
        "FADD R0, R0, R1",
        "BRA 0x0",
        "FMUL R0, R0, R1",
        "@P1 BRA 0x0",
        "EXIT",
    )
    assert dict(loops(forked).hot) == {"HMMA": 1, "BRA": 1}


def test_the_shortest_is_judged_by_what_every_iteration_executes() -> None:
    two = program(
        "HMMA.16816.F32.BF16 R0, R1, R2, R0",  # 0: longer, but most of it is jumped over
        "@P0 BRA 0x60",
        "FMUL R0, R0, R1",
        "FMUL R0, R0, R1",
        "FMUL R0, R0, R1",
        "FMUL R0, R0, R1",
        "@P1 BRA 0x0",
        "HMMA.16816.F32.BF16 R0, R1, R2, R0",  # 7: with a mask
        "FSEL R0, R0, -INF, P0",
        "FSEL R0, R0, -INF, P0",
        "@P1 BRA 0x70",
        "EXIT",
    )
    assert dict(loops(two).hot) == {"HMMA": 1, "BRA": 2}


def test_a_spill_outside_or_in_an_outer_loop_with_hmma() -> None:
    outside = program("STL [R1], R0", "HMMA R0, R1, R2, R0", "@P0 BRA 0x10", "LDL R0, [R1]", "EXIT")
    outer = program("STL [R1], R0", "HMMA R0, R1, R2, R0", "@P0 BRA 0x10", "LDL R0, [R1]", "@P1 BRA 0x0", "EXIT")
    other = program("HMMA R0, R1, R2, R0", "@P0 BRA 0x0", "STL [R1], R0", "@P1 BRA 0x20", "EXIT")
    assert [loops(p).spilling for p in (outside, outer, other)] == [False, True, False]


def test_bsync_goes_on_where_its_bssy_says() -> None:
    text = program(
        "BSSY.RECONVERGENT B0, 0x50",
        "@P0 BRA 0x40",
        "BSYNC.RECONVERGENT B0",
        "EXIT",  # not reached by falling through alone
        "BSYNC.RECONVERGENT B0",
        "HMMA R0, R1, R2, R0",
        "@P1 BRA 0x0",
        "EXIT",
    )
    (loop,) = natural_loops(text).values()
    assert loop.always == {range(2), range(5, 7)} and loop.body == {range(2), range(2, 3), range(4, 5), range(5, 7)}
    assert dict(loops(text).hot) == {"BSSY": 1, "HMMA": 1, "BRA": 2}


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_real_kernels_disassembled_together_and_alone(arch: str) -> None:
    kinds = {"plain": set(), "mma": {"mma"}, "spills": {"spills"}, "more": {"mma"}}
    codes = {
        name: inspect.read_elf(nvjitlink.assemble(toys.ptx("toy", features), arch).cubin).kernels["toy"]
        for name, features in kinds.items()
    }
    together = sass.disassemble(codes, arch)
    alone = {name: sass.disassemble({name: codes[name]}, arch)[name] for name in ("mma", "spills")}
    assert {name: together[name] for name in alone} == alone
    assert together["more"] == together["mma"]
    found = {name: loops(instructions) for name, instructions in together.items()}
    assert found["plain"] == sass.Loops((), False)
    assert dict(found["mma"].hot)["HMMA"] % 2 == 0 and not found["mma"].spilling
    assert found["spills"].spilling and {"LDL", "STL"} <= dict(found["spills"].hot).keys()


def test_code_that_does_not_read_is_refused() -> None:
    with pytest.raises(InspectError, match="0 instructions in 32 bytes of junk"):
        sass.disassemble({"junk": b"\xff" * 32}, "sm_120")
    with pytest.raises(InspectError, match="sm_777"):
        sass.disassemble({"junk": bytes(16)}, "sm_777")
