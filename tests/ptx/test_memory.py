"""Loads, stores, copies and what they must refuse."""

import struct

import numpy as np
import pytest

from tests.ptx.interpreter import Device, Kernel, PtxError
from tests.ptx.snippets import kernel, launch

WORDS = np.arange(64, dtype=np.uint32)


# ---- what works ------------------------------------------------------------------------------------------------------
def test_vector_loads_and_stores():
    body = """
        mul.wide.u32 %d10, %r0, 16; add.s64 %d11, %d1, %d10; add.s64 %d12, %d0, %d10;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d11]; st.global.v2.b32 [%d12], {%r4, %r3};
        st.global.v2.u32 [%d12+8], {%r2, %r1}; ret;"""
    data = np.arange(128, dtype=np.uint32)
    np.testing.assert_array_equal(launch(body, data).view(np.uint32).reshape(32, 4), data.reshape(32, 4)[:, ::-1])


def test_narrow_loads_extend():
    body = """
        add.s64 %d11, %d1, 3; ld.global.s8 %r1, [%d11]; ld.global.u8 %r2, [%d11]; add.s32 %r3, %r1, %r2;
        st.global.b32 [%d8], %r3; ret;"""
    assert (launch(body, np.full(8, -1, np.int8), out=128).view(np.int32) == -1 + 255).all()


def test_narrow_stores_take_the_low_bytes():
    body = "mov.b32 %r1, 0x12345678; st.global.b32 [%d8], 0; st.global.u8 [%d8+1], %r1; ret;"
    assert (launch(body, out=128).view(np.uint32) == 0x7800).all()


def test_local_memory_belongs_to_the_thread():
    body = """
        .local .align 8 .b8 stack[16]; mov.u64 %d10, stack; st.local.b32 [%d10+4], %r0; mov.b32 %r0, 0;
        ld.local.b32 %r1, [%d10+4]; st.global.b32 [%d8], %r1; ret;"""
    np.testing.assert_array_equal(launch(body, out=128).view(np.uint32), np.arange(32))


def test_parameters_are_laid_out_as_in_c():
    one = Kernel(
        ".entry k(.param .u64 .ptr .global .align 16 o, .param .f32 f, .param .align 8 .b8 s[16], .param .u32 n)\n"
        "{ .reg .b64 %d<4>; .reg .b32 %r<6>; .reg .f32 %f<2>; ld.param.u64 %d0, [o]; ld.param.f32 %f0, [f];\n"
        "ld.param.v2.b32 {%r1, %r2}, [s+8]; ld.param.u32 %r3, [n]; mov.b32 %r0, %f0;\n"
        "st.global.v4.b32 [%d0], {%r0, %r1, %r2, %r3}; ret; }"
    )
    assert list(one.program.params.values()) == [(0, 8), (8, 4), (16, 16), (32, 4)]
    device = Device()
    out = device.empty(16)
    params = struct.pack("<Qf4xQIII", out, 1.5, 0, 7, 8, 9)
    one.run(device, grid=(1, 1, 1), block=(32, 1, 1), params=params)
    assert device.get(out, np.uint32).tolist() == [np.float32(1.5).view(np.uint32), 7, 8, 9]
    with pytest.raises(PtxError, match="35 bytes of parameters, the kernel takes 36"):
        one.run(device, grid=(1, 1, 1), block=(32, 1, 1), params=params[:-1])


def test_shared_memory_is_the_blocks_own():
    body = """
        mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 4, %r1; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r4, %r3, 100, %r0;
        st.shared.b32 [%r2], %r4; bar.sync 0; xor.b32 %r5, %r0, 33; mad.lo.u32 %r6, %r5, 4, %r1;
        ld.shared.b32 %r7, [%r6]; mad.lo.u32 %r8, %r3, 64, %r0; mul.wide.u32 %d10, %r8, 4; add.s64 %d10, %d10, %d0;
        st.global.b32 [%d10], %r7; ret;"""
    got = launch(body, out=20 * 256, threads=64, blocks=20, smem=256).view(np.uint32).reshape(20, 64)
    np.testing.assert_array_equal(got, 100 * np.arange(20)[:, None] + (np.arange(64) ^ 33))


def test_arrays_that_the_launch_sizes_are_one_memory():
    """They overlap, behind those with a size of their own."""
    body = """
        .shared .align 4 .b8 own[4]; .extern .shared .align 8 .b8 other[]; mov.u32 %r1, smem; mov.u32 %r2, other;
        mov.u32 %r3, own; st.shared.b32 [%r3], 7; st.shared.b32 [%r1+4], 9; bar.sync 0; ld.shared.b32 %r4, [%r2+4];
        sub.u32 %r5, %r1, %r2; add.u32 %r4, %r4, %r5; ld.shared.b32 %r6, [%r3]; add.u32 %r4, %r4, %r6;
        st.global.b32 [%d8], %r4; ret;"""
    assert (launch(body, out=128, smem=8).view(np.uint32) == 16).all()


def test_64_bit_shared_addresses():
    body = """
        mov.u64 %d10, smem; cvta.to.shared.u64 %d11, %d10; add.s64 %d11, %d11, %d9; st.shared.b32 [%d11], %r0;
        ld.shared.u32 %r1, [%d11]; st.global.u32 [%d8], %r1; ret;"""
    np.testing.assert_array_equal(launch(body, out=128, smem=128).view(np.uint32), np.arange(32))


# ---- faults ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%d1+256]; ret;", "global load: address .* outside every allocation"),
        ("ld.global.b32 %r1, [%d1+-4]; ret;", "outside every allocation"),
        ("add.s64 %d10, %d1, %d9; ld.global.b32 %r1, [%d10+132]; ret;", "outside.*\n.*thread 31"),
        ("mov.u64 %d10, 0; ld.global.b32 %r1, [%d10]; ret;", "outside every allocation"),
        ("st.global.b32 [%d8+4], %r0; ret;", "global store: address"),
        ("ld.global.b32 %r1, [%d1+2]; ret;", "misaligned 4-byte global load"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+8]; ret;", "misaligned 16-byte global load"),
        ("st.global.b64 [%d0+4], %d1; ret;", "misaligned 8-byte global store"),
        ("ld.global.b32 %r1, [%d8]; ret;", "never written"),
        ("mov.u32 %r1, smem; ld.shared.b32 %r2, [%r1+128]; ret;", "4-byte access at shared byte 128, outside 0..128"),
        ("mov.u32 %r1, 0; st.shared.b32 [%r1], %r0; ret;", "at shared byte -1024, outside"),
        ("mov.u32 %r1, smem; ld.shared.v2.b32 {%r2, %r3}, [%r1+4]; ret;", "misaligned 8-byte shared access"),
        ("mov.u32 %r1, smem; mad.lo.u32 %r1, %r0, 8, %r1; st.shared.b32 [%r1], 0; ret;", "byte 128.*\n.*thread 16"),
        (".local .align 4 .b8 s[8]; mov.u64 %d10, s; ld.local.b32 %r1, [%d10+8]; ret;", "8 bytes of local memory"),
        ("mov.u32 %r1, smem; cp.async.ca.shared.global [%r1], [%d1+256], 4; ret;", "cp.async: address"),
        ("mov.u32 %r1, smem; cp.async.cg.shared.global [%r1], [%d1+8], 16; ret;", "misaligned 16-byte cp.async"),
        ("red.global.add.u32 [%d0], 1; ret;", "atomic: reads global memory that was never written"),
        ("st.global.b32 [%d0], %r0; ret;", "threads of one store write different values"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 trap; ret;", "trap\n.*thread 3"),
    ],
)  # fmt: skip
def test_fault(body, message):
    with pytest.raises(PtxError, match=message):
        launch(body, WORDS, out=128, smem=128)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frob.b32 %r1, %r0; ret;", "instruction not known: frob"),
        ("add.b128 %r1, %r0, %r0; ret;", "no type in"),
        ("cp.async.bulk.shared.global [%r1], [%d1], 16; ret;", "instruction not known"),
        ("add.s32 %r1, %r0, %d0; ret;", r"%d0 is .b64, used as .s32"),
        ("add.s32 %d1, %r0, 1; ret;", r"%d1 is .b64, used as .s32"),
        ("and.pred %p1, %p2, %r0; ret;", r"%r0 is .b32, used as .pred"),
        ("add.s32 %x, %r0, 1; ret;", "no register '%x'"),
        ("add.s32 %r1, %r0, nowhere; ret;", "unknown operand 'nowhere'"),
        ("setp.huh.s32 %p1, %r0, 1; ret;", "comparison .huh is not known"),
        ("bra nowhere; ret;", "no such label"),
        ("ld.param.u64 %d1, [other]; ret;", "no 8 bytes of parameters at other"),
        ("add.s32 %r1, [%d0], 1; ret;", "operand 1 is no register"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(body, message):
    one = kernel(body)
    device = Device()
    with pytest.raises(PtxError, match=message):
        one.run(device, grid=(1, 1, 1), block=(32, 1, 1), params=bytes(16))


def test_one_kernel_a_text():
    with pytest.raises(PtxError, match="must hold exactly one"):
        Kernel(".version 8.0")
    with pytest.raises(PtxError, match="must hold exactly one"):
        Kernel(".entry a() { ret; } .entry b() { ret; }")


def test_undefined_parts_of_an_input_cannot_be_loaded():
    device = Device()
    defined = np.arange(8) < 4
    base, out = device.put(np.arange(8, dtype=np.uint32), defined), device.empty(4)
    read = "ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d1+{}]; st.global.b32 [%d0], %r4; ret;"
    params = struct.pack("<QQ", out, base)
    kernel(read.format(0)).run(device, grid=(1, 1, 1), block=(32, 1, 1), params=params)
    assert device.get(out, np.uint32)[0] == 3
    with pytest.raises(PtxError, match="never written"):
        kernel(read.format(16)).run(device, grid=(1, 1, 1), block=(32, 1, 1), params=params)


def test_allocations_at_given_addresses():
    device = Device()
    first = device.put(WORDS)
    far = device.put(WORDS[::-1], at=first + 2**33)
    assert device.get(far, np.uint32)[0] == 63 and device.next > far
    with pytest.raises(ValueError, match="no allocation at"):
        device.put(WORDS, at=first + 2**32)


# ---- races in global memory ------------------------------------------------------------------------------------------
STORE_BLOCK = "mov.u32 %r1, %ctaid.x; and.b32 %r1, %r1, {}; st.global.b32 [%d8], %r1; ret;"


def test_blocks_that_store_different_values_race():
    with pytest.raises(PtxError, match="race: threads of one store"):
        launch(STORE_BLOCK.format(1), blocks=2)
    with pytest.raises(PtxError, match="race: warps 63 and 64 of the launch store different values"):
        launch(STORE_BLOCK.format(64), blocks=128)  # in different waves


def test_blocks_may_store_the_same_value():
    assert (launch(STORE_BLOCK.format(0), out=128, blocks=70).view(np.uint32) == 0).all()


def test_launches_are_ordered():
    device = Device()
    out = device.empty(4)
    for value in (1, 2):
        one = kernel(f"st.global.b32 [%d0], {value}; ret;", ("out",))
        one.run(device, grid=(3, 1, 1), block=(32, 1, 1), params=struct.pack("<Q", out))
    assert device.get(out, np.uint32)[0] == 2


# ---- asynchronous copies ---------------------------------------------------------------------------------------------
COPY = "mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 4, %r1; add.s64 %d10, %d1, %d9;"
READ = "ld.shared.b32 %r3, [%r2]; st.global.b32 [%d8], %r3; ret;"


def copied(middle, read=READ):
    return launch(f"{COPY}\n{middle}\n{read}", WORDS, out=128, smem=256).view(np.uint32)


TWO_COMMITS = "cp.async.commit_group; cp.async.commit_group;"


@pytest.mark.parametrize(
    "wait",
    ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;", f"{TWO_COMMITS} cp.async.wait_group 1;"],
)
def test_copied_data_is_there_after_its_wait(wait):
    np.testing.assert_array_equal(copied(f"cp.async.ca.shared.global [%r2], [%d10], 4; {wait}"), np.arange(32))


@pytest.mark.parametrize(
    "wait", ["", "cp.async.commit_group;", "cp.async.commit_group; cp.async.wait_group 1;", "cp.async.wait_group 0;"]
)
def test_copied_data_is_nan_before_its_wait(wait):
    assert (copied(f"cp.async.ca.shared.global [%r2], [%d10], 4; {wait}") == 0xFFFFFFFF).all()


def test_groups_land_in_order():
    copy = "cp.async.ca.shared.global [%r2], [%d10], 4; cp.async.commit_group;"
    later = "cp.async.ca.shared.global [%r2+128], [%d10+128], 4; cp.async.commit_group; cp.async.wait_group 1;"
    np.testing.assert_array_equal(copied(copy + later), np.arange(32))
    assert (copied(copy + later, READ.replace("[%r2]", "[%r2+128]")) == 0xFFFFFFFF).all()


def test_a_short_source_is_filled_with_zeros():
    some = "setp.lt.u32 %p1, %r0, 9; selp.b32 %r5, 4, 0, %p1;"
    got = copied(f"{some} cp.async.ca.shared.global [%r2], [%d10], 4, %r5; cp.async.wait_all;")
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 9, np.arange(32), 0))


def test_a_source_that_ends_inside_a_word():
    body = f"""{COPY} and.b32 %r4, %r0, 15; mad.lo.u32 %r2, %r4, 16, %r1; setp.lt.u32 %p1, %r0, 16;
        @%p1 cp.async.cg.shared.global [%r2], [%d1], 16, 6; cp.async.wait_all; bar.warp.sync -1;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2]; st.global.b32 [%d8], %r5; ret;"""
    got = launch(body, np.full(8, 0x11223344, np.uint32), out=128, smem=256).view(np.uint32)
    assert (got == 0x3344).all()


def test_nothing_of_a_zero_size_source_is_read():
    got = copied("mov.u64 %d10, 0; cp.async.ca.shared.global [%r2], [%d10], 4, 0; cp.async.wait_all;")
    assert (got == 0).all()


def test_stores_and_copies_must_not_meet_a_copy_in_flight():
    copy = "cp.async.ca.shared.global [%r2], [%d10], 4; cp.async.commit_group;"
    with pytest.raises(PtxError, match="an asynchronous copy is still to fill"):
        copied(copy + "st.shared.b32 [%r2], 0;")
    with pytest.raises(PtxError, match="two asynchronous copies"):
        copied(copy + copy)
    copied(copy + "cp.async.wait_group 0; st.shared.b32 [%r2], 0;" + copy)
