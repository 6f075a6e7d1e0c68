"""Atomics, and blocks that take turns at adding."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.ptx import movement
from tests.ptx.interpreter import Device, Kernel, PtxError
from tests.ptx.snippets import kernel, launch


@pytest.mark.parametrize(
    ("code", "start", "end"),
    [
        ("red.global.add.u32 [%d1], 2;", 5, 69), ("red.global.max.s32 [%d1], %r0;", 5, 31),
        ("red.global.min.u32 [%d1], %r0;", 5, 0), ("red.global.or.b32 [%d1], %r0;", 64, 95),
        ("red.global.and.b32 [%d1], 6;", 5, 4), ("atom.global.inc.u32 %r1, [%d1], 9;", 0, 2),
        ("atom.global.exch.b32 %r1, [%d1], %r0;", 5, 31), ("atom.global.cas.b32 %r1, [%d1], 5, 77;", 5, 77),
        ("atom.global.cas.b32 %r1, [%d1], 6, 77;", 5, 5),
    ],
)  # fmt: skip
def test_atomics(code, start, end):
    body = f"{code} ld.global.b32 %r2, [%d1]; st.global.b32 [%d8], %r2; ret;"
    assert (launch(body, np.array([start], np.uint32), out=128).view(np.uint32) == end).all()


def test_atomics_return_what_was_there():
    body = "atom.global.add.u32 %r1, [%d1], 1; st.global.b32 [%d8], %r1; ret;"
    np.testing.assert_array_equal(launch(body, np.zeros(1, np.uint32), out=128).view(np.uint32), np.arange(32))


def test_vector_and_shared_atomics():
    body = """
        mov.u32 %r1, smem; st.shared.b32 [%r1], 0; bar.sync 0; red.shared.add.f32 [%r1], 0f3F000000;
        red.global.add.v2.f32 [%d1], {0f3F800000, 0f40000000}; ld.global.v2.f32 {%f1, %f2}, [%d1];
        ld.shared.f32 %f3, [%r1]; add.f32 %f1, %f1, %f2; add.f32 %f1, %f1, %f3; st.global.f32 [%d8], %f1; ret;"""
    assert (launch(body, np.zeros(2, np.float32), out=128, smem=4).view(np.float32) == 32 + 64 + 16).all()


def test_additions_of_vectors():
    """Lanes that add to one address all count; so do those of other blocks."""
    body = """
        and.b32 %r1, %r0, 7; mul.wide.u32 %d10, %r1, 16; add.s64 %d10, %d10, %d1; cvt.rn.f32.u32 %f1, %r0;
        red.global.add.v4.f32 [%d10], {%f1, 0f3F800000, 0f40000000, %f1}; ret;"""
    device = Device()
    out, into = device.empty(4), device.put(np.ones(32, np.float32))
    params = struct.pack("<QQ", out, into)
    kernel(body).run(device, grid=(3, 1, 1), block=(64, 1, 1), params=params)
    lanes = np.arange(64, dtype=np.float32).reshape(8, 8).sum(0)
    right = 1 + 3 * np.stack([lanes, np.full(8, 8), np.full(8, 16), lanes], 1)
    np.testing.assert_array_equal(device.get(into, np.float32).reshape(8, 4), right)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("add.s64 %d10, %d1, 8; red.global.add.v4.f32 [%d10], {%f0, %f0, %f0, %f0};", "misaligned 16-byte atomic"),
        ("red.global.add.v4.f32 [%d1+128], {%f0, %f0, %f0, %f0};", "atomic: address .* outside every allocation"),
        ("red.global.add.v4.f32 [%d0], {%f0, %f0, %f0, %f0};", "atomic: reads global memory that was never written"),
        ("red.global.add.f32 [%d1+2], %f0;", "misaligned 4-byte atomic"),
        ("red.global.add.v4.f32 [%d1], {%f0, %f0};", "2 values, or the target is not sm_90"),
        ("red.global.add.f32 [%d1], {%f0, %f0};", "2 values, or the target is not sm_90"),
    ],
)
def test_additions_are_checked(code, message):
    with pytest.raises(PtxError, match=message):
        launch(f"{code} ret;", np.zeros(32, np.float32))


def test_additions_of_vectors_are_of_sm_90():
    text = ".version 8.0 .entry k(.param .u64 p) { .reg .b64 %d<2>; .reg .f32 %f<2>; ld.param.u64 %d0, [p];\n"
    text += "red.global.add.v2.f32 [%d0], {%f0, %f0}; ret; }"
    for target, works in ((".target sm_90\n", True), (".target sm_80\n", False), ("", False)):
        device = Device()
        launched: dict[str, Any] = dict(
            grid=(1, 1, 1), block=(32, 1, 1), params=struct.pack("<Q", device.put(np.zeros(2, np.float32)))
        )
        if works:
            Kernel(target + text).run(device, **launched)
        else:
            with pytest.raises(PtxError, match="not sm_90"):
                Kernel(target + text).run(device, **launched)


# ---- turns -----------------------------------------------------------------------------------------------------------
def take_turns(parts: list[str], order: Sequence[int] | None = (0, 1, 2), races: bool = True):
    """(the turn at %d0, sums at %d1) after these parts. %r9: the block; %p2: not its first thread."""
    device = Device()
    turn, into = device.put(np.zeros(1, np.int32)), device.put(np.zeros(128, np.float32))
    one = kernel(
        "mov.u32 %r9, %ctaid.x; add.s64 %d11, %d1, %d9; setp.ne.s32 %p2, %r0, 0;\n" + " ".join(parts) + " ret;"
    )
    launched: dict[str, Any] = dict(
        grid=(3, 1, 1), block=(64, 1, 1), params=struct.pack("<QQ", turn, into), races=races
    )
    one.run(device, **launched, order=order)
    return device.get(turn, np.int32)[0], device.get(into, np.float32)[:64]


WAIT = """@%p2 bra $on;
    $spin: ld.acquire.gpu.global.s32 %r1, [%d0]; setp.ne.s32 %p1, %r1, %r9; @%p1 bra $spin; $on:"""
ADD = "xor.b32 %r2, %r0, 32; mul.wide.u32 %d12, %r2, 4; add.s64 %d12, %d12, %d1; red.global.add.f32 [%d12], 0f3F800000;"
RELEASE = "@!%p2 red.release.gpu.global.add.s32 [%d0], 1;"
BAR = "bar.sync 0;"


@pytest.mark.parametrize(
    ("wait", "release"),
    [
        (WAIT, RELEASE),
        (WAIT.replace("acquire.gpu.global.s32", "global.acquire.gpu.b32"), RELEASE.replace(".s32", ".u32")),
        (WAIT.replace(".s32 %r1", ".u32 %r1"), RELEASE.replace("release.gpu.global.add", "global.add.release.gpu")),
        (WAIT, "fence.acq_rel.gpu; membar.gl; @!%p2 atom.add.release.gpu.global.u32 %r3, [%d0], 1;"),
    ],
)
def test_blocks_take_turns(wait, release):
    turn, sums = take_turns([wait, BAR, ADD, BAR, release])
    assert turn == 3 and (sums == 3).all()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([WAIT, ADD, BAR, RELEASE], "out of turn: warp 1 adds to global memory, warp 0 acquired its turn"),
        ([WAIT, BAR, ADD, RELEASE], "out of turn: warp 0 releases its turn, warp 1 added to global memory"),
        ([WAIT, BAR, ADD, BAR], "waits for ever"),  # of block 1, for block 0
        ([WAIT.replace("%r1, %r9", "%r1, 7"), BAR, ADD, BAR, RELEASE], "waits for ever"),
        ([WAIT.replace("acquire", "relaxed"), BAR, ADD, BAR], "waits for ever"),
    ],
)
def test_turns_that_are_no_turns(parts, message):
    with pytest.raises(PtxError, match=message):
        take_turns(parts)


def test_a_turn_needs_blocks_in_order():
    """Together, a block that waits starves the one that it waits for: a fault, not a hang."""
    with pytest.raises(PtxError, match="waits for ever"):
        take_turns([WAIT, BAR, ADD, BAR, RELEASE], order=None)
    assert take_turns([ADD], order=None)[1].sum() == 3 * 64
    assert take_turns([WAIT, ADD, RELEASE], races=False)[0] == 3
    assert take_turns([WAIT, BAR, ADD, BAR, RELEASE], (0, 1))[0] == 2
    for order in ((1, 0, 2), (0, 2, 1)):
        with pytest.raises(PtxError, match="waits for ever"):
            take_turns([WAIT, BAR, ADD, BAR, RELEASE], order)


def test_waits_are_counted_anew_after_each_change(monkeypatch):
    monkeypatch.setattr(movement, "MAX_WAITS", 1)
    assert take_turns([WAIT, BAR, ADD, BAR, RELEASE])[0] == 3
