"""Arithmetic, logic, comparisons and conversions, one instruction at a time, against values worked out by hand."""

import numpy as np
import pytest

from tests.ptx.formats import E4M3, bf16_to_f32, e4m3_to_f32, f32_to_bf16, f32_to_e4m3
from tests.ptx.snippets import evaluate

U16, S16, U32, S32, U64, S64, F16, F32 = (
    np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float16, np.float32,
)  # fmt: skip
INF, NAN = float("inf"), float("nan")

# (code, inputs, result)
CASES = [
    ("add.s32 y, x0, x1;", (S32(2**31 - 1), S32(1)), S32(-(2**31))),
    ("add.s32 y, x0, -5;", (S32(3),), S32(-2)),
    ("add.s64 y, x0, x1;", (S64(2**40), S64(-1)), S64(2**40 - 1)),
    ("add.f32 y, x0, 0f3F800000;", (F32(2.5),), F32(3.5)),
    ("add.sat.f32 y, x0, x1;", (F32(0.75), F32(0.75)), F32(1)),
    ("add.sat.f32 y, x0, x1;", (F32(-3), F32(1)), F32(0)),
    ("sub.u32 y, x0, x1;", (U32(1), U32(2)), U32(2**32 - 1)),
    ("sub.f32 y, x0, x1;", (F32(1), F32(2.5)), F32(-1.5)),
    ("neg.s32 y, x0;", (S32(7),), S32(-7)),
    ("neg.f32 y, x0;", (F32(7),), F32(-7)),
    ("abs.s32 y, x0;", (S32(-7),), S32(7)),
    ("abs.f32 y, x0;", (F32(-7),), F32(7)),
    ("min.s32 y, x0, x1;", (S32(-1), S32(1)), S32(-1)),
    ("min.u32 y, x0, x1;", (U32(2**32 - 1), U32(1)), U32(1)),
    ("max.s32 y, x0, x1;", (S32(-1), S32(1)), S32(1)),
    ("max.f32 y, x0, x1;", (F32(NAN), F32(1)), F32(1)),
    ("max.NaN.f32 y, x0, x1;", (F32(NAN), F32(1)), F32(NAN)),
    ("min.f32 y, x0, x1;", (F32(2), F32(NAN)), F32(2)),
    ("max.f32 y, x0, x1, x2;", (F32(1), F32(3), F32(2)), F32(3)),
    ("mul.lo.s32 y, x0, x1;", (S32(-3), S32(2**30)), S32(2**30)),
    ("mul.lo.s64 y, x0, x1;", (S64(-3), S64(2**33)), S64(-3 * 2**33)),
    ("mul.wide.u32 y, x0, x1;", (U32(2**32 - 1), U32(2)), U64(2**33 - 2)),
    ("mul.wide.s32 y, x0, x1;", (S32(-1), S32(2)), S64(-2)),
    ("mul.wide.u16 y, x0, x1;", (U16(65535), U16(2)), U32(131070)),
    ("mul.hi.u32 y, x0, x1;", (U32(2**31), U32(6)), U32(3)),
    ("mul.hi.s32 y, x0, x1;", (S32(-1), S32(2)), S32(-1)),
    ("mul.hi.u64 y, x0, x1;", (U64(2**63), U64(6)), U64(3)),
    ("mul.hi.s64 y, x0, x1;", (S64(-1), S64(2)), S64(-1)),
    ("mul.f32 y, x0, x1;", (F32(1.5), F32(-2)), F32(-3)),
    ("mad.lo.s32 y, x0, x1, x2;", (S32(3), S32(4), S32(-5)), S32(7)),
    ("mad.lo.s64 y, x0, x1, x2;", (S64(3), S64(2**40), S64(1)), S64(3 * 2**40 + 1)),
    ("mad.wide.s32 y, x0, x1, x2;", (S32(-3), S32(2**30), S64(1)), S64(1 - 3 * 2**30)),
    ("mad.hi.u32 y, x0, x1, x2;", (U32(2**31), U32(6), U32(4)), U32(7)),
    # One rounding: the product alone would round to 1 + 2^-11.
    ("fma.rn.f32 y, x0, x1, x2;", (F32(1 + 2**-12), F32(1 + 2**-12), F32(-(1 + 2**-11))), F32(2**-24)),
    ("div.s32 y, x0, x1;", (S32(-7), S32(2)), S32(-3)),
    ("div.u32 y, x0, x1;", (U32(2**32 - 1), U32(2)), U32(2**31 - 1)),
    ("div.u64 y, x0, x1;", (U64(2**64 - 1), U64(2)), U64(2**63 - 1)),
    ("div.s32 y, x0, x1;", (S32(-7), S32(0)), S32(-1)),
    ("div.rn.f32 y, x0, x1;", (F32(1), F32(4)), F32(0.25)),
    ("rem.s32 y, x0, x1;", (S32(-7), S32(2)), S32(-1)),
    ("rem.u32 y, x0, x1;", (U32(7), U32(4)), U32(3)),
    ("ex2.approx.ftz.f32 y, x0;", (F32(-3),), F32(0.125)),
    ("ex2.approx.ftz.f32 y, x0;", (F32(-INF),), F32(0)),
    ("lg2.approx.ftz.f32 y, x0;", (F32(0),), F32(-INF)),
    ("rcp.approx.ftz.f32 y, x0;", (F32(4),), F32(0.25)),
    ("rsqrt.approx.f32 y, x0;", (F32(4),), F32(0.5)),
    ("sqrt.rn.f32 y, x0;", (F32(9),), F32(3)),
    ("tanh.approx.f32 y, x0;", (F32(0),), F32(0)),
    ("and.b32 y, x0, 12;", (U32(10),), U32(8)),
    ("or.b32 y, x0, 12;", (U32(10),), U32(14)),
    ("xor.b64 y, x0, x1;", (U64(10), U64(2**40)), U64(10 + 2**40)),
    ("not.b32 y, x0;", (U32(0),), U32(2**32 - 1)),
    ("shl.b32 y, x0, 4;", (U32(2**31 + 1),), U32(16)),
    ("shl.b32 y, x0, 32;", (U32(1),), U32(0)),
    ("shl.b32 y, x0, x1;", (U32(1), U32(40)), U32(0)),
    ("shl.b64 y, x0, x1;", (U64(1), U32(40)), U64(2**40)),
    ("shr.u32 y, x0, 4;", (U32(2**31),), U32(2**27)),
    ("shr.s32 y, x0, 31;", (S32(-5),), S32(-1)),
    ("shr.s32 y, x0, x1;", (S32(-5), U32(99)), S32(-1)),
    ("shr.s32 y, x0, 99;", (S32(-5),), S32(-1)),
    ("shr.u32 y, x0, x1;", (U32(99), U32(32)), U32(0)),
    ("shf.l.wrap.b32 y, x0, x1, 4;", (U32(0xF0000000), U32(1)), U32(0x1F)),
    ("shf.r.wrap.b32 y, x0, x1, 36;", (U32(0x12345678), U32(0x9)), U32(0x91234567)),
    ("shf.r.clamp.b32 y, x0, x1, 40;", (U32(1), U32(7)), U32(7)),
    ("lop3.b32 y, x0, x1, x2, 0xE8;", (U32(0b0011), U32(0b0101), U32(0b1001)), U32(0b0001)),
    ("lop3.b32 y, x0, x1, x2, 0x96;", (U32(0b0011), U32(0b0101), U32(0b1001)), U32(0b1111)),
    ("prmt.b32 y, x0, x1, 0x5410;", (U32(0x33221100), U32(0x77665544)), U32(0x55441100)),
    ("prmt.b32 y, x0, x1, 0x9880;", (U32(0x80), U32(0)), U32(0x00FFFF80)),
    ("bfe.u32 y, x0, 4, 8;", (U32(0x12345678),), U32(0x67)),
    ("bfe.s32 y, x0, 4, 8;", (U32(0xF80),), S32(-8)),
    ("bfe.s32 y, x0, 4, 0;", (U32(0xF80),), S32(0)),
    ("bfi.b32 y, x0, x1, 8, 4;", (U32(0xFF), U32(0)), U32(0xF00)),
    ("popc.b32 y, x0;", (U32(0xF0F),), U32(8)),
    ("clz.b32 y, x0;", (U32(1),), U32(31)),
    ("clz.b64 y, x0;", (U64(1),), U32(63)),
    ("brev.b32 y, x0;", (U32(1),), U32(2**31)),
    ("mov.b32 y, 0fFF800000;", (), F32(-INF)),
    ("mov.b64 y, {x0, x1};", (U32(1), U32(2)), U64(2**33 + 1)),
    ("mov.b32 y, {x0, x1};", (U16(1), U16(2)), U32(2**17 + 1)),
    ("mov.b64 {%r5, y}, x0;", (U64(2**33 + 1),), U32(2)),
    ("mov.b32 {y, %h1}, x0;", (U32(2**17 + 1),), U16(1)),
    ("mov.b64 {_, y}, x0;", (U64(2**33 + 1),), U32(2)),
    ("cvt.u64.u32 y, x0;", (U32(2**32 - 1),), U64(2**32 - 1)),
    ("cvt.s64.s32 y, x0;", (S32(-1),), S64(-1)),
    ("cvt.u32.u64 y, x0;", (U64(2**33 + 5),), U32(5)),
    ("cvt.s32.s8 y, x0;", (S32(-1),), S32(-1)),
    ("cvt.u16.u32 y, x0;", (U32(65537),), U16(1)),
    ("cvt.rn.f32.s32 y, x0;", (S32(-3),), F32(-3)),
    ("cvt.rn.f32.u32 y, x0;", (U32(2**32 - 1),), F32(2.0**32)),
    ("cvt.rzi.s32.f32 y, x0;", (F32(-2.7),), S32(-2)),
    ("cvt.rni.s32.f32 y, x0;", (F32(2.5),), S32(2)),
    ("cvt.rpi.s32.f32 y, x0;", (F32(2.1),), S32(3)),
    ("cvt.rzi.u32.f32 y, x0;", (F32(-5),), U32(0)),
    ("cvt.rzi.s32.f32 y, x0;", (F32(1e20),), S32(2**31 - 1)),
    ("cvt.rzi.s32.f32 y, x0;", (F32(NAN),), S32(0)),
    ("cvt.rmi.f32.f32 y, x0;", (F32(-1.5),), F32(-2)),
    ("cvt.sat.f32.f32 y, x0;", (F32(1.5),), F32(1)),
    ("cvt.rn.f16.f32 y, x0;", (F32(1 + 2**-11),), F16(1)),
    ("cvt.f32.f16 y, x0;", (F16(1.5),), F32(1.5)),
    ("cvt.rn.bf16.f32 y, x0;", (F32(1 + 2**-8),), U16(0x3F80)),
    ("cvt.rn.bf16.f32 y, x0;", (F32(1 + 3 * 2**-8),), U16(0x3F82)),
    ("cvt.f32.bf16 y, x0;", (U16(0x3FC0),), F32(1.5)),
    ("cvt.rn.bf16x2.f32 y, x0, x1;", (F32(1.5), F32(-2)), U32(0x3FC0C000)),
    ("cvt.rn.f16x2.f32 y, x0, x1;", (F32(1.5), F32(-2)), U32(0x3E00C000)),
    ("cvt.rn.relu.bf16x2.f32 y, x0, x1;", (F32(1.5), F32(-2)), U32(0x3FC00000)),
    ("cvt.rn.f16x2.e4m3x2 y, x0;", (U16(0x38C0),), U32(0x3C00C000)),
    ("cvt.rn.satfinite.e4m3x2.f32 y, x0, x1;", (F32(1), F32(-2)), U16(0x38C0)),
    ("cvt.rn.satfinite.e4m3x2.f32 y, x0, x1;", (F32(-1e9), F32(17)), U16(0xFE58)),
    ("add.rn.f16x2 y, x0, x1;", (U32(0x3C003C00), U32(0x3C004000)), U32(0x40004200)),
    ("fma.rn.bf16x2 y, x0, x1, x2;", (U32(0x40003F80), U32(0x40003F80), U32(0x3F803F80)), U32(0x40A04000)),
    ("neg.bf16x2 y, x0;", (U32(0x3F80BF80),), U32(0xBF803F80)),
    ("setp.lt.s32 p, x0, x1; selp.b32 y, 1, 2, p;", (S32(-1), S32(0)), U32(1)),
    ("setp.lt.u32 p, x0, x1; selp.b32 y, 1, 2, p;", (S32(-1), S32(0)), U32(2)),
    ("setp.lo.u32 p, x0, x1; selp.b32 y, 1, 2, p;", (U32(1), U32(2)), U32(1)),
    ("setp.hs.u32 p, x0, x1; selp.b32 y, 1, 2, p;", (U32(1), U32(2)), U32(2)),
    ("setp.eq.b64 p, x0, 0; selp.b32 y, 1, 2, p;", (U64(2**40),), U32(2)),
    ("setp.eq.f32 p, x0, x0; selp.b32 y, 1, 2, p;", (F32(NAN),), U32(2)),
    ("setp.ne.f32 p, x0, x0; selp.b32 y, 1, 2, p;", (F32(NAN),), U32(2)),
    ("setp.neu.f32 p, x0, x0; selp.b32 y, 1, 2, p;", (F32(NAN),), U32(1)),
    ("setp.gtu.f32 p, x0, x1; selp.b32 y, 1, 2, p;", (F32(NAN), F32(1)), U32(1)),
    ("setp.leu.f32 p, x0, x1; selp.b32 y, 1, 2, p;", (F32(2), F32(1)), U32(2)),
    ("setp.nan.f32 p, x0, x1; selp.b32 y, 1, 2, p;", (F32(2), F32(NAN)), U32(1)),
    ("setp.num.f32 p, x0, x1; selp.b32 y, 1, 2, p;", (F32(2), F32(NAN)), U32(2)),
    ("setp.lt.s32 p|q, x0, x1; selp.b32 y, 1, 2, q;", (S32(-1), S32(0)), U32(2)),
    ("setp.lt.s32 p, x0, x1; setp.lt.and.s32 q, x1, x0, p; selp.b32 y, 1, 2, q;", (S32(-1), S32(0)), U32(2)),
    ("setp.lt.s32 p, x0, x1; setp.lt.or.s32 q, x1, x0, !p; selp.b32 y, 1, 2, !q;", (S32(-1), S32(0)), U32(1)),
    ("setp.lt.s32 p, x0, 0; and.pred q, p, !p; not.pred p, q; selp.b32 y, 1, 2, p;", (S32(-1),), U32(1)),
    ("mov.pred p, 1; xor.pred q, p, p; selp.f32 y, x0, x1, q;", (F32(1), F32(2)), F32(2)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "inputs", "result"), CASES, ids=[f"{case[0]}{case[1]}" for case in CASES])
def test_instruction(code, inputs, result):
    got = evaluate(code, type(result), *inputs)
    np.testing.assert_array_equal(got, np.full(32, result))


def test_each_lane_has_its_own_value():
    x = np.arange(32, dtype=U32)
    np.testing.assert_array_equal(evaluate("mad.lo.u32 y, x0, x0, %r0;", U32, x), x * x + x)


def test_a_guard_picks_lanes():
    x = np.arange(32, dtype=S32)
    code = "mov.b32 y, x0; setp.lt.s32 p, x0, 10; @p add.s32 y, y, 100; @!p sub.s32 y, y, 1;"
    np.testing.assert_array_equal(evaluate(code, S32, x), np.where(x < 10, x + 100, x - 1))


SINGLE = [row for row in CASES if row[0].count(";") == 1 and " y," in row[0]]


@pytest.mark.parametrize(("code", "inputs", "result"), SINGLE, ids=[f"{row[0]}{row[1]}" for row in SINGLE])
def test_guarded_instructions_leave_other_lanes_alone(code, inputs, result):
    guarded = f"setp.lt.u32 %p8, %r0, 7; mov.b{8 * result.itemsize} y, 0; @%p8 {code}"
    got = evaluate(guarded, type(result), *inputs)
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 7, result, type(result)(0)))


def test_bf16_rounding_is_to_nearest_even():
    values = np.array([1, 1 + 2**-8, 1 + 2**-7 + 2**-8, -(1 + 2**-8) - 2**-20, 3.4e38, INF, NAN], F32)
    expected = np.array([1, 1, 1 + 2**-6, -1 - 2**-7, INF, INF, NAN], F32)
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values)), expected)


def test_e4m3_values():
    codes = np.array([0x00, 0x01, 0x08, 0x38, 0x7E, 0x7F, 0xB8], np.uint8)
    np.testing.assert_array_equal(e4m3_to_f32(codes), np.array([0, 2**-9, 2**-6, 1, 448, NAN, -1], F32))


def test_rounding_to_e4m3():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(f32_to_e4m3(E4M3), codes)
    middle = (E4M3[:0x7E] + E4M3[1:0x7F]) / 2  # ties go to the even code
    even = codes[:0x7E] + (codes[:0x7E] & 1)
    for sign, bit in ((1, 0), (-1, 0x80)):
        np.testing.assert_array_equal(f32_to_e4m3(sign * middle), even | bit)
        np.testing.assert_array_equal(f32_to_e4m3(sign * np.nextafter(middle, F32(0))), codes[:0x7E] | bit)
        np.testing.assert_array_equal(f32_to_e4m3(sign * np.nextafter(middle, F32(999))), codes[1:0x7F] | bit)
    assert f32_to_e4m3(np.array([448.1, 1e9, -np.inf], F32)).tolist() == [0x7E, 0x7E, 0xFE]
