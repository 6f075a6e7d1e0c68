"""How much a new optional tensor of `fwd` costs, with its gradient: one is added to a copy of the checkout.

`tilt`, (heads_q,) or (batch, heads_q): tilt · (j + seqlen_q - seqlen_k - i) is added to the score of query i and key j.
Its kernels are the stand-ins' (tests/runtime), which the copy teaches it; device code is what the issue leaves out.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.checkout import Checkout, Edit, both, insert

MOST = 6  # files outside kernels/ and tests/
TENSOR = """TILT = Tensor("tilt", "in", ("fp32",), (layout("heads_q"), layout("batch heads_q")),
              "what distance adds to a score", strides=("b",), optional=True, differentiable=True)
"""
WORKSPACE = """        a.workspace("dtilt", "key_tiles heads_q", "a tile's part of the tilt's gradient", optional=True,
                    gradient_of="tilt"),
"""
ARGUMENT = "    tilt: torch.Tensor | None = None,\n"
EDITS: dict[str, Edit] = {
    "registry/ops/attention.py": insert("K_DESCALE =", TENSOR),
    "registry/ops/fwd.py": both(insert("a.SINK", "a.TILT, "), lambda source: source.replace("version=3", "version=4")),
    "registry/ops/bwd.py": both(
        insert("a.ALIBI_SLOPES", "a.TILT, "),
        insert("        w.SEMAPHORES", WORKSPACE),
        lambda source: source.replace("version=2", "version=3"),
    ),
    "runtime/api/attention.py": both(
        insert("    return_lse: bool", ARGUMENT),
        insert("alibi_slopes is not None:\n", "tilt is not None or "),
        insert("sink=sink, alibi_slopes", "tilt=tilt, "),
    ),
    "runtime/api/varlen.py": both(insert("    return_lse: bool", ARGUMENT), insert("sink=sink", "tilt=tilt, ")),
}  # fmt: skip
# The stand-ins' device code.
FORWARD = """    if p["tilt"]:
        tilt = view(p["tilt"] + 4 * b * p["tilt_stride_b"], torch.float32, (heads,), (1,))
        scores = scores + tilt[:, None, None] * (j - i)
"""
BACKWARD = """    if p["tilt"]:
        tilt = view(p["tilt"] + 4 * b * p["tilt_stride_b"], FP32, (heads,), (1,))
        scores = scores - p["slope_scale"] * tilt[:, None, None] * distance
"""
GRADIENT = """    if p["dtilt"] and n[1]:
        tile = variant.size("n")
        row = of_k[1] // tile + b if p["cu_seqlens_k"] else b * -(-p["seqlen_k"] // tile)
        for i, part in enumerate((-(dscores * distance).sum(1)).split(tile, 1)):
            view(p["dtilt"] + 4 * (row + i) * heads, FP32, (heads,), (1,)).copy_(part.sum(1))
"""
STAND_INS: dict[str, Edit] = {
    "tests/runtime/fakes.py": insert("    left, right =", FORWARD),
    "tests/runtime/backward_kernels.py": both(
        insert("    left, right =", BACKWARD), insert('    if p["dalibi"]', GRADIENT)
    ),
}


def test_a_new_optional_tensor_with_its_gradient(tmp_path: Path):
    checkout = Checkout(tmp_path / "checkout")
    checkout.edit(EDITS | STAND_INS)
    checkout.add(Path(__file__).with_name("toy_tensor"))
    checkout.python("-m", "tests.project.described")
    touched = {name for name in checkout.touched() if not name.startswith(("kernels/", "tests/"))}
    assert touched == {*EDITS, "docs/design.md"} and len(touched) <= MOST
    assert "the toy tensor works" in checkout.python("-m", "tests.toy_program", tmp_path / "toy.db")
    checkout.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/project/test_described.py",
                    "tests/runtime/test_described_gradients.py",
                    "tests/runtime/test_described_refusals.py", "-k", "tilt or not refused")  # fmt: skip
    checkout.lint_imports()
