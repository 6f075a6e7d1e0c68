"""Divergence, barriers and races: what threads do to each other."""

import numpy as np
import pytest

from tests.ptx import machine
from tests.ptx.interpreter import PtxError
from tests.ptx.snippets import launch

LOOP = """
    mov.u32 %r1, %ctaid.x; add.u32 %r2, %r0, %r1; mov.b32 %r3, 0;
    $again: setp.eq.u32 %p1, %r2, 0; @%p1 bra $done;
    add.u32 %r3, %r3, %r2; sub.u32 %r2, %r2, 1; bra.uni $again;
    $done: mov.u32 %r4, %ntid.x; mad.lo.u32 %r4, %r1, %r4, %r0; mul.wide.u32 %d10, %r4, 4; add.s64 %d10, %d10, %d0;
    st.global.b32 [%d10], %r3; ret;"""


@pytest.mark.parametrize("blocks", [1, 3, 33])  # 33 blocks of 64 threads take three waves, the last one shorter
def test_threads_leave_a_loop_one_by_one(blocks):
    got = launch(LOOP, out=256 * blocks, threads=64, blocks=blocks).view(np.uint32).reshape(blocks, 64)
    n = np.arange(64) + np.arange(blocks)[:, None]
    np.testing.assert_array_equal(got, n * (n + 1) // 2)


def test_both_sides_of_a_branch_run_and_meet_again():
    body = """
        setp.lt.u32 %p1, %r0, 11; @%p1 bra $low; mov.b32 %r1, 7; bra.uni $meet;
        $low: mov.b32 %r1, 5; $meet: activemask.b32 %r2; setp.eq.b32 %p2, %r2, -1; selp.b32 %r1, %r1, 0, %p2;
        st.global.b32 [%d8], %r1; ret;"""
    got = launch(body, out=128).view(np.uint32)
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 11, 5, 7))


def test_early_exit_of_some_threads():
    body = "st.global.b32 [%d8], 1; setp.gt.u32 %p1, %r0, 3; @%p1 exit; st.global.b32 [%d8], 2; ret;"
    assert launch(body, out=128).view(np.uint32).tolist() == [2] * 4 + [1] * 28


def test_falling_off_the_end_is_a_return():
    assert (launch("st.global.b32 [%d8], 1;", out=128).view(np.uint32) == 1).all()


def test_special_registers():
    body = """
        mov.u32 %r1, %laneid; mov.u32 %r2, %warpid; mov.u32 %r3, %ntid.x; mov.u32 %r4, %nctaid.x;
        mad.lo.u32 %r1, %r2, 100, %r1; mad.lo.u32 %r1, %r3, 1000, %r1; mad.lo.u32 %r1, %r4, 1000000, %r1;
        st.global.b32 [%d8], %r1; ret;"""
    got = launch(body, out=256, threads=64).view(np.uint32)
    np.testing.assert_array_equal(got, 1064000 + np.arange(64) // 32 * 100 + np.arange(64) % 32)


def test_lines_and_scopes_are_skipped():
    body = """
        .loc 1 23 4
        mov.b32 %r1, 3; // a comment; with a semicolon
        { .reg .b32 inner; mov.b32 inner, %r1; /* another; */ add.s32 %r1, inner, 1; }
        .pragma "nounroll"; st.global.b32 [%d8], %r1; ret;"""
    assert (launch(body, out=128).view(np.uint32) == 4).all()


def test_a_kernel_without_end(monkeypatch):
    monkeypatch.setattr(machine, "MAX_SEGMENTS", 50)
    with pytest.raises(PtxError, match="does not end"):
        launch("$again: bra $again;")


# ---- barriers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0; @!%p1 bar.sync 1; ret;", "deadlock: threads wait for ever at"),
        ("bar.sync 0, 96; ret;", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0, 64; ret;", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $a; bar.sync 0, 64; ret; $a: bar.sync 0, 96; ret;", "different counts"),
        ("bar.arrive 0, 64; ret;", "instruction not known"),
    ],
)
def test_barriers_that_cannot_work(body, message):
    with pytest.raises(PtxError, match=message):
        launch(body, threads=64)


def test_exited_threads_are_not_waited_for():
    launch("setp.lt.u32 %p1, %r0, 32; @%p1 exit; bar.sync 0; ret;", threads=64)


def test_warp_barriers_hold_nobody():
    launch("setp.lt.u32 %p1, %r0, 5; @%p1 bar.warp.sync 31; ret;", threads=64)


# ---- races through shared memory -------------------------------------------------------------------------------------
MINE = "mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 4, %r1;"
OTHERS = "xor.b32 %r3, %r0, 32; mad.lo.u32 %r4, %r3, 4, %r1;"
WRITE, READ = "st.shared.b32 [%r2], %r0;", "ld.shared.b32 %r5, [%r4];"
WRITE_OTHERS = "st.shared.b32 [%r4], %r0;"
COPY = "add.s64 %d10, %d1, %d9; cp.async.ca.shared.global [%r2], [%d10], 4; cp.async.wait_all;"
BAR = "bar.sync 0;"


def race(*steps, threads=64, blocks=1):
    data = np.arange(threads, dtype=np.uint32)
    launch(" ".join([MINE, OTHERS, *steps, "ret;"]), data, threads=threads, blocks=blocks, smem=4 * threads)


@pytest.mark.parametrize(
    "steps",
    [
        (WRITE, READ),
        (COPY, READ),
        (READ, WRITE),
        (READ, COPY),
        (WRITE, WRITE_OTHERS),
        (COPY, WRITE_OTHERS),
        (WRITE, BAR, READ, WRITE),
        (WRITE, BAR, READ, BAR, WRITE, READ),
        (WRITE, BAR, WRITE_OTHERS, READ, BAR, READ, READ, COPY),
    ],
)
def test_races(steps):
    with pytest.raises(PtxError, match="race: block 0 of the wave, warp"):
        race(*steps)
    with pytest.raises(PtxError, match="race: block"):
        race(*steps, blocks=3)


@pytest.mark.parametrize(
    "steps",
    [
        (WRITE, BAR, READ),
        (COPY, BAR, READ),
        (READ, BAR, WRITE),
        (READ, BAR, COPY),
        (READ, READ),
        (WRITE, BAR, READ, BAR, WRITE, BAR, READ),
        (WRITE, WRITE),  # each warp its own
        (WRITE, BAR, WRITE_OTHERS, BAR, WRITE),
    ],
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_what_is_no_race(steps, blocks):
    race(*steps, blocks=blocks)


def test_a_barrier_orders_those_alone_that_meet_at_it():
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2; warp 0 may read warp 1's words but not warp 2's."""
    meet = "shr.u32 %r6, %r0, 6; add.u32 %r6, %r6, 1; bar.sync %r6, 64;"
    race(WRITE, meet, READ, threads=128)
    across = OTHERS.replace("32;", "64;", 1)
    with pytest.raises(PtxError, match="race"):
        race(WRITE, meet, across, READ, threads=128)
    race(WRITE, meet, across, BAR, READ, threads=128)


def test_order_passes_on_through_barriers():
    """Warp 0 meets warp 1, then warp 1 meets warp 2: what warp 0 wrote before, warp 2 may read."""
    body = f"""{MINE} shr.u32 %r6, %r0, 5; setp.eq.u32 %p1, %r6, 0; setp.eq.u32 %p2, %r6, 1; setp.eq.u32 %p3, %r6, 2;
        @%p1 st.shared.b32 [%r2], %r0; @%p1 bar.sync 1, 64; @%p1 exit; @%p2 bar.sync 1, 64; @%p2 bar.sync 2, 64;
        @%p2 exit; @%p3 bar.sync 2, 64; sub.u32 %r7, %r2, 256; ld.shared.b32 %r8, [%r7]; ret;"""
    launch(body, threads=96, smem=384)
    with pytest.raises(PtxError, match="race"):
        launch(body.replace("@%p2 bar.sync 1, 64; @%p2 bar.sync 2, 64;", "@%p2 bar.sync 2, 64; @%p2 bar.sync 1, 64;"),
               threads=96, smem=384)  # fmt: skip


WARP_BAR = "bar.warp.sync -1;"


@pytest.mark.parametrize(("first", "then"), [(WRITE, READ), (COPY, READ), (READ, WRITE), (READ, COPY)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_threads_of_a_blocks_only_warp_race(first, then, blocks):
    """Each reads the word of the thread 16 further: a barrier of either kind must lie between."""
    others, data = OTHERS.replace("32;", "16;", 1), np.arange(32, dtype=np.uint32)
    with pytest.raises(PtxError, match="race: block 0 of the wave, thread"):
        launch(f"{MINE} {others} {first} {then} ret;", data, blocks=blocks, smem=128)
    for between in (WARP_BAR, BAR):
        launch(f"{MINE} {others} {first} {between} {then} ret;", data, blocks=blocks, smem=128)


def test_part_of_a_warp_orders_only_itself():
    half = "setp.lt.u32 %p1, %r0, 16; @%p1 bar.warp.sync 0xFFFF;"
    data = np.arange(32, dtype=np.uint32)
    launch(f"{MINE} {OTHERS.replace('32;', '8;', 1)} {WRITE} {half} @%p1 {READ} ret;", data, smem=128)
    with pytest.raises(PtxError, match="race: block 0 of the wave, thread"):
        launch(f"{MINE} {OTHERS.replace('32;', '16;', 1)} {WRITE} {half} @%p1 {READ} ret;", data, smem=128)


def test_blocks_that_finish_early_do_not_blur_the_others():
    """Block 0 leaves the loop first; the race of block 2's last round is still seen, and no other is imagined."""
    body = f"""{MINE} {OTHERS} mov.u32 %r10, %ctaid.x; mov.b32 %r11, 0;
        $again: st.shared.b32 [%r2], %r0; bar.sync 0; ld.shared.b32 %r5, [%r4]; %s add.u32 %r11, %r11, 1;
        setp.le.u32 %p1, %r11, %r10; @%p1 bra $again; ret;"""
    launch(body.replace("%s", "bar.sync 0;"), threads=64, blocks=3, smem=256)
    with pytest.raises(PtxError, match="race: block 1"):
        launch(body.replace("%s", ""), threads=64, blocks=3, smem=256)


def test_races_can_be_left_out():
    from tests.ptx.interpreter import Device
    from tests.ptx.snippets import kernel

    one = kernel(f"{MINE} {OTHERS} {WRITE} {READ} ret;", ())
    one.run(Device(), grid=(1, 1, 1), block=(64, 1, 1), params=b"", smem=256, races=False)
    with pytest.raises(PtxError, match="race"):
        one.run(Device(), grid=(1, 1, 1), block=(64, 1, 1), params=b"", smem=256)


# ---- between the threads of a warp -----------------------------------------------------------------------------------
LANE = np.arange(32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %r1, %r0, 2, 31, -1;", LANE ^ 2),
        ("shfl.sync.idx.b32 %r1, %r0, 5, 31, -1;", np.full(32, 5)),
        ("shfl.sync.up.b32 %r1, %r0, 3, 0, -1;", np.where(LANE >= 3, LANE - 3, LANE)),
        ("shfl.sync.down.b32 %r1, %r0, 3, 31, -1;", np.where(LANE < 29, LANE + 3, LANE)),
        ("shfl.sync.idx.b32 %r1, %r0, 1, 6175, -1;", LANE // 8 * 8 + 1),  # segments of 8 lanes
        ("shfl.sync.down.b32 %r1|%p1, %r0, 3, 31, -1; selp.b32 %r1, 1, 0, %p1;", LANE < 29),
        ("setp.gt.u32 %p1, %r0, 3; vote.sync.ballot.b32 %r1, %p1, -1;", np.full(32, 0xFFFFFFF0)),
        ("setp.gt.u32 %p1, %r0, 3; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", np.full(32, 1)),
        ("setp.gt.u32 %p1, %r0, 3; vote.sync.all.pred %p2, !%p1, -1; selp.b32 %r1, 1, 0, %p2;", np.full(32, 0)),
        ("setp.gt.u32 %p1, %r0, 99; vote.sync.uni.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", np.full(32, 1)),
        ("mov.b32 %r1, 9; setp.lt.u32 %p1, %r0, 4; @%p1 activemask.b32 %r1;", np.where(LANE < 4, 15, 9)),
    ],
)
def test_warp_instructions(code, expected):
    got = launch(f"{code} st.global.b32 [%d8], %r1; ret;", out=128).view(np.uint32)
    np.testing.assert_array_equal(got, np.asarray(expected).astype(np.uint32))
