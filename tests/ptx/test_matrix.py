"""mma.sync, ldmatrix and stmatrix against the fragment layouts of the PTX manual, written out lane by lane."""

import numpy as np
import pytest

from tests.ptx import formats
from tests.ptx.interpreter import PtxError
from tests.ptx.snippets import launch

GROUP, QUAD = np.arange(32) // 4, np.arange(32) % 4  # groupID and threadID_in_group of the manual
TO_F32 = {"bf16": formats.bf16_to_f32, "f16": formats.f16_to_f32, "e4m3": formats.e4m3_to_f32}
FROM_F32 = {"bf16": formats.f32_to_bf16, "f16": formats.f32_to_f16}


def small_integers(kind, shape, seed):
    """Values that every format holds exactly, and their bits."""
    values = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    if kind == "e4m3":
        table = {float(formats.E4M3[b]): b for b in range(256) if b != 0x80}
        return values, np.vectorize(table.__getitem__)(values).astype(np.uint8)
    return values, FROM_F32[kind](values)


def fragment(bits, rows, per):
    """(registers, 32) of a row-major matrix whose rows (A) or columns (B) go over the lanes' groups.

    Register j holds, in lane 4g + q, `per` neighbours of row g + 8·(j mod rows/8), from column per·q + 4·per·(j div
    rows/8) on: section 'Matrix Fragments for mma.m16n8k*' of the PTX manual.
    """
    blocks = rows // 8
    out = []
    for j in range(blocks * bits.shape[1] // (4 * per)):
        row, column = GROUP + 8 * (j % blocks), per * QUAD + 4 * per * (j // blocks)
        packed = np.stack([bits[row, column + e] for e in range(per)], 1)
        out.append(np.ascontiguousarray(packed).view(np.uint32).reshape(-1))
    return np.stack(out)


def accumulator(registers):
    """(16, 8) of the four registers of C or D: row g + 8·(j div 2), column 2q + (j mod 2)."""
    matrix = np.zeros((16, 8), np.float32)
    for j, lanes in enumerate(registers):
        matrix[GROUP + 8 * (j // 2), 2 * QUAD + j % 2] = lanes
    return matrix


def spread(matrix):
    return np.stack([matrix[GROUP + 8 * (j // 2), 2 * QUAD + j % 2] for j in range(4)])


def load(names, parameter):
    """Load registers from an input of (registers, 32) words."""
    lines = [f"add.s64 %d10, {parameter}, %d9;"]
    return " ".join(lines + [f"ld.global.b32 {name}, [%d10+{128 * j}];" for j, name in enumerate(names)])


def save(names, first=0):
    return " ".join(f"st.global.b32 [%d8+{128 * (first + j)}], {name};" for j, name in enumerate(names))


@pytest.mark.parametrize(
    ("shape", "kind", "k", "per"),
    [("m16n8k16", "bf16", 16, 2), ("m16n8k16", "f16", 16, 2), ("m16n8k8", "bf16", 8, 2), ("m16n8k8", "f16", 8, 2),
     ("m16n8k32", "e4m3", 32, 4)],
)  # fmt: skip
def test_mma(shape, kind, k, per):
    a, a_bits = small_integers(kind, (16, k), 1)
    b, b_bits = small_integers(kind, (k, 8), 2)
    c = np.random.default_rng(3).standard_normal((16, 8)).astype(np.float32)
    fa, fb = fragment(a_bits, 16, per), fragment(np.ascontiguousarray(b_bits.T), 8, per)
    names_a, names_b = [f"%r{j + 1}" for j in range(len(fa))], [f"%r{j + 10}" for j in range(len(fb))]
    body = f"""{load(names_a, "%d1")} {load(names_b, "%d2")} {load(["%f0", "%f1", "%f2", "%f3"], "%d3")}
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, {{{", ".join(names_a)}}},
        {{{", ".join(names_b)}}}, {{%f0, %f1, %f2, %f3}}; {save(["%f4", "%f5", "%f6", "%f7"])} ret;"""
    got = launch(body, fa, fb, spread(c), out=512).view(np.float32).reshape(4, 32)
    np.testing.assert_array_equal(accumulator(got), a @ b + c)


FRAGMENTS = {
    "a": "%r1, %r2, %r3, %r4",
    "A": "%r5, %r6, %r7, %r8",
    "x": "%r10, %r11",
    "y": "%r12, %r13",
    "z": "%r14, %r15",
    **{f"d{j}": ", ".join(f"%f{4 * j + e}" for e in range(4)) for j in range(4)},
}


def mma(d, a, b, c):
    """D = A·B + C by the names of FRAGMENTS."""
    operands = ", ".join(f"{{{FRAGMENTS[name]}}}" for name in (d, a, b, c))
    return f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {operands};"


def check(*code, **expected):
    """Run code over the A fragments a and A, the B fragments x, y and z and zero accumulators; then each accumulator
    named must be what its function makes of the five matrices."""
    values = [small_integers("f16", shape, j) for j, shape in enumerate([(16, 16)] * 2 + [(16, 8)] * 3)]
    a = [fragment(bits, 16, 2) for _, bits in values[:2]]
    b = [fragment(np.ascontiguousarray(bits.T), 8, 2) for _, bits in values[2:]]
    registers = {name: text.split(", ") for name, text in FRAGMENTS.items()}
    stores = " ".join(save(registers[name], 4 * j) for j, name in enumerate(expected))
    loads = load(registers["a"] + registers["A"], "%d1") + load(registers["x"] + registers["y"] + registers["z"], "%d2")
    body = f"{loads} {' '.join(code)} {stores} ret;"
    got = launch(body, np.concatenate(a), np.concatenate(b), out=512 * len(expected)).view(np.float32)
    matrices = dict(zip("aAxyz", (value for value, _ in values), strict=True))
    for registers_of_d, make in zip(got.reshape(len(expected), 4, 32), expected.values(), strict=True):
        np.testing.assert_array_equal(accumulator(registers_of_d), make(**matrices))


def test_neighbouring_products_form_a_grid():
    check(
        mma("d0", "a", "x", "d0"), mma("d1", "a", "y", "d1"), mma("d2", "A", "x", "d2"), mma("d3", "A", "y", "d3"),
        d0=lambda a, x, **_: a @ x, d1=lambda a, y, **_: a @ y, d2=lambda A, x, **_: A @ x, d3=lambda A, y, **_: A @ y,
    )  # fmt: skip


def test_neighbouring_products_that_form_no_grid():
    check(
        mma("d0", "a", "x", "d0"), mma("d1", "A", "y", "d1"), mma("d2", "a", "z", "d2"),
        d0=lambda a, x, **_: a @ x, d1=lambda A, y, **_: A @ y, d2=lambda a, z, **_: a @ z,
    )  # fmt: skip


def test_products_that_need_each_other_keep_their_order():
    check(
        mma("d0", "a", "x", "d1"), mma("d0", "A", "y", "d0"), mma("d2", "a", "z", "d0"),
        d0=lambda a, A, x, y, **_: a @ x + A @ y, d2=lambda a, A, x, y, z: a @ x + A @ y + a @ z,
    )  # fmt: skip


def test_a_result_may_overwrite_a_fragment_that_was_read():
    check(
        mma("d0", "a", "x", "d1"), mma("a", "A", "y", "d1"), mma("d2", "A", "z", "d3"),
        d0=lambda a, x, **_: a @ x, d2=lambda A, z, **_: A @ z,
    )  # fmt: skip


def test_products_by_a_do_not_overtake_a_reader():
    """The third shares its A with the first, but must not write d2 before the second has read it."""
    check(
        mma("d0", "a", "x", "d1"), mma("d1", "A", "y", "d2"), mma("d2", "a", "z", "d3"),
        d0=lambda a, x, **_: a @ x, d1=lambda A, y, **_: A @ y, d2=lambda a, z, **_: a @ z,
    )  # fmt: skip


def test_a_guarded_product():
    check(
        "setp.lt.u32 %p1, %r0, 0; @%p1", mma("d0", "a", "x", "d1"),
        "setp.lt.u32 %p2, %r0, 32; @%p2", mma("d2", "a", "x", "d1"),
        d0=lambda **_: np.zeros((16, 8)), d2=lambda a, x, **_: a @ x,
    )  # fmt: skip


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
D = "{%f0, %f1, %f2, %f3}"
SOME = "setp.lt.u32 %p1, %r0, 9;"


def test_one_warp_of_two():
    """mma under a branch that one warp alone takes: the other's registers stay."""
    body = f"""mov.b32 %r1, 0x3C003C00; shr.u32 %r2, %r0, 5; setp.eq.u32 %p1, %r2, 1; @%p1 bra $skip;
        {MMA} {D}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {D};
        $skip: st.global.f32 [%d8], %f3; ret;"""
    got = launch(body, out=256, threads=64).view(np.float32)
    np.testing.assert_array_equal(got, np.where(np.arange(64) < 32, 16, 0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{SOME} @%p1 {MMA} {D}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {D};", "part of a warp"),
        (f"{MMA} {D}, {{%r1, %r1}}, {{%r1, %r1}}, {D};", "wrong number of registers"),
        (f"{MMA} {{%d0, %d0, %d0, %d0}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {D};", "not of 32 bits"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f0}, {%r1}, {%r1}, {%f0};", "mma not known"),
        (f"{SOME} mov.u32 %r1, smem; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r2}}, [%r1];", "part of a warp"),
        ("mov.u32 %r1, smem; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+8];", "misaligned 16-byte"),
    ],
)  # fmt: skip
def test_matrix_faults(body, message):
    with pytest.raises(PtxError, match=message):
        launch(f"{body} ret;", smem=512)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(n, trans):
    """Row r of matrix j lies where lane 8j + r points: here the rows stand in reverse."""
    data = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    names = [f"%r{j + 4}" for j in range(n)]
    body = f"""mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 16, %r1; mul.wide.u32 %d10, %r0, 16; add.s64 %d10, %d10, %d1;
        cp.async.cg.shared.global [%r2], [%d10], 16; cp.async.wait_all; bar.warp.sync -1;
        xor.b32 %r3, %r0, 7; mad.lo.u32 %r3, %r3, 16, %r1;
        ldmatrix.sync.aligned.m8n8.x{n}{".trans" if trans else ""}.shared.b16 {{{", ".join(names)}}}, [%r3];
        {save(names)} ret;"""
    got = launch(body, data, out=128 * n, smem=512).view(np.uint16)
    for j, lanes in enumerate(got.reshape(n, 32, 2)):
        matrix = data[j, ::-1]
        matrix = matrix.T if trans else matrix
        np.testing.assert_array_equal(lanes[:, 0], matrix[GROUP, 2 * QUAD])
        np.testing.assert_array_equal(lanes[:, 1], matrix[GROUP, 2 * QUAD + 1])


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(trans):
    data = np.arange(256, dtype=np.uint16)
    names = "{%r4, %r5, %r6, %r7}"
    body = f"""mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 16, %r1; mul.wide.u32 %d10, %r0, 16; add.s64 %d11, %d10, %d1;
        cp.async.cg.shared.global [%r2], [%d11], 16; cp.async.wait_all;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names}, [%r2];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2+512], {names};
        ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r2+512]; add.s64 %d12, %d10, %d0;
        st.global.v4.b32 [%d12], {{%r8, %r9, %r10, %r11}}; ret;"""
    np.testing.assert_array_equal(launch(body, data, smem=1024).view(np.uint16), data)


def test_movmatrix_transposes():
    data = np.arange(64, dtype=np.uint16)
    body = """
        add.s64 %d10, %d1, %d9; ld.global.b32 %r1, [%d10]; movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;
        st.global.b32 [%d8], %r2; ret;"""
    got = launch(body, data, out=128).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(got, data.reshape(8, 8).T)
