"""As test_large_cpu, for the ops that take rows: `fwd_combine` and `kv_append`. They have at most 2**31 − 32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kernels import dispatch
from registry.contract import Abi, fast_divmod
from tests.kernels.cases import of
from tests.kernels.large import GAP, Sparse
from tests.kernels.launch import Compiled, kv_dtype
from tests.reference import Array, combine, decode, encode, misrounded, rotate
from tests.support.abis import FWD_COMBINE, KV_APPEND

MOST, ROWS = 2**31 - 1, 2**31 - 32
BF16 = [v for v in dispatch.variants() if v.dtype == "bf16"]
DIM, EACH = 16, 4  # columns of a row, and rows of a block


def run(compiled: Compiled, abi: Abi, device: Sparse, values: dict[str, Any], rows: int, block: int) -> None:
    artifact = compiled.artifact
    grid = artifact.grid.blocks({"rows": rows})
    assert artifact.threads == 32 * EACH and 0 <= block < grid
    params = abi.pack(dict.fromkeys((p.name for p in abi.params), 0) | values)
    compiled.kernel.run(device, grid=(grid, 1, 1), block=(artifact.threads, 1, 1), params=params, order=[block])


# ---- fwd_combine -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("splits", [2, 256])
@pytest.mark.parametrize("axis", ["batch", "seqlen", "heads"])
@of([v for v in BF16 if v.op == "fwd_combine"])
def test_combine(axis: str, splits: int, variant, variant_of: Callable[[str], Compiled]):
    """The last four rows, which are entries, tokens or heads."""
    device, random, first = Sparse(), np.random.default_rng(0), ROWS - EACH
    o = random.standard_normal((splits, EACH, DIM)).astype(np.float32)
    lse = random.standard_normal((splits, EACH)).astype(np.float32)
    partial, split_stride = device.region(), ROWS * DIM
    for j in range(splits):
        device.put(o[j], at=partial + 4 * (j * split_stride + first * DIM))
    lse_of = {j * MOST * 8 + (first + r) * 5: float(lse[j, r]) for j in range(splits) for r in range(EACH)}
    lse_partial = device.elements(lse_of, np.float32)
    outs, starts = [], (device.region(), device.region())
    for start, size, kind in zip(starts, (DIM, 4), (np.uint16, np.uint32), strict=True):
        places = [start + kind().itemsize * (first + r) * GAP for r in range(EACH)]
        outs.append([device.put(np.zeros(size, kind), np.zeros(size, bool), at=at) for at in places])
    letter = axis[0]
    values = {"o_partial": partial, "lse_partial": lse_partial, "o": starts[0], "lse": starts[1], "rows": ROWS}
    values |= {"o_partial_stride_split": split_stride, "lse_partial_stride_split": MOST * 8, "head_dim_v": DIM}
    values |= {f"lse_partial_stride_{letter}": 5, f"o_stride_{letter}": GAP, f"lse_stride_{letter}": GAP}
    values |= {"num_splits": splits, "seqlen": ROWS if axis == "seqlen" else 1, "heads": ROWS if axis == "heads" else 1}
    run(variant_of(variant.key), FWD_COMBINE, device, values, ROWS, first // EACH)
    right, right_lse = combine(o, lse)
    size, _ = combine(np.abs(o), lse)
    got = decode(np.stack([device.get(at, np.uint16) for at in outs[0]]), variant.dtype)
    assert misrounded(got, right, size, variant.dtype, 2.0**-18) == 0
    assert np.stack([device.get(at, np.float32)[0] for at in outs[1]]) == pytest.approx(right_lse, rel=1e-6, abs=2e-6)


# ---- kv_append -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Append:
    """Four heads, from `head` on, of one token: of 'k', 'v' or 'q'. had: keys before. page: the token's; the table's
    and the descales' row strides; rotary_stride, rotary_rows: of the angles, without which nothing is rotated."""

    of: str
    token: int = 0
    head: int = 0
    entry: int = 0
    batch: int = 1
    new: int = 0
    heads_kv: int = 4
    queries: int = 0
    heads_q: int = 4
    had: int = 5
    room: int = 2**20
    page: int = 3
    table_stride: int = 99
    descale_stride: int = 0
    rotary_rows: int = 0
    rotary_stride: int = DIM

    def row(self) -> tuple[int, int]:
        """(the first of the four rows, all rows)."""
        new = self.batch * self.new * self.heads_kv
        heads, tokens = (self.heads_q, self.queries) if self.of == "q" else (self.heads_kv, self.new)
        before = {"k": 0, "v": new, "q": 2 * new}[self.of]
        row = before + (self.entry * tokens + self.token) * heads + self.head
        return row, 2 * new + self.batch * self.queries * self.heads_q


ENTRIES = 2**20
CASES = {
    "last-rows-of-q": Append(
        "q", queries=2**11 - 1, heads_q=ENTRIES, token=2**11 - 2, head=ENTRIES - 4, rotary_rows=2**11, had=1
    ),
    "last-rows-of-v": Append(
        "v", batch=ENTRIES, new=4, heads_kv=252, entry=ENTRIES - 1, token=3, head=248, descale_stride=MOST,
        table_stride=MOST,
    ),
    "last-rows-of-k": Append(
        "k", batch=ENTRIES, new=4, heads_kv=252, entry=ENTRIES - 1, token=3, head=248, descale_stride=MOST,
        table_stride=MOST, rotary_rows=16,
    ),
    "most-entries": Append("k", batch=2**28 - 8, new=1, entry=2**28 - 9, table_stride=2**22),
    "last-page": Append("k", new=1, page=MOST),
    "last-page-of-v": Append("v", new=1, page=MOST),
    "last-position": Append("k", new=1, had=2**30 - 2, room=2**30 - 1),
    "last-angle": Append("k", new=1, had=2**30 - 2, room=2**30 - 1, rotary_rows=2**30 - 1, rotary_stride=2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@of([v for v in BF16 if v.op == "kv_append"])
def test_append(case: Append, variant, variant_of: Callable[[str], Compiled]):
    device, random, position = Sparse(), np.random.default_rng(0), case.had + case.token
    kind = variant.dtype if case.of == "q" else kv_dtype(variant)
    bits = encode(random.standard_normal((EACH, DIM)), variant.dtype)
    values, outs = memory(device, case, bits, kind)
    exact, size = decode(bits, variant.dtype)[None].astype(np.float64), np.zeros((1, EACH, DIM))
    if case.rotary_rows and case.of != "v":
        exact, size = rotated(device, values, case, variant.dtype, exact, position)
    if kind == "e4m3":
        factor = random.uniform(0.5, 2, EACH).astype(np.float32)
        row = case.entry * case.descale_stride + case.head
        held = {row + j: float(factor[j]) for j in range(EACH)}
        values |= {f"{case.of}_descale": device.elements(held, np.float32)}
        values |= {f"{case.of}_descale_stride_b": case.descale_stride}
        exact, size = (x / factor[:, None] for x in (exact, np.abs(exact) + size))
    row, rows = case.row()
    assert row % EACH == 0 and rows <= ROWS
    run(variant_of(variant.key), KV_APPEND, device, values, rows, row // EACH)
    got = decode(np.stack([device.get(at, np.uint8 if kind == "e4m3" else np.uint16) for at in outs]), kind)
    assert misrounded(got[None], exact, size, kind) == 0


def memory(device: Sparse, case: Append, bits: Array, kind: str) -> tuple[dict[str, Any], list[int]]:
    """(parameters, addresses of what the four rows become, in dtype `kind`)."""
    source_of = {"q": "q", "k": "k_new", "v": "v_new"}[case.of]
    start, there = device.region(), device.region()
    tokens, heads = (case.queries, case.heads_q) if case.of == "q" else (case.new, case.heads_kv)
    strides = {"b": tokens * heads * GAP, "s": heads * GAP, "h": GAP}
    source = case.entry * strides["b"] + case.token * strides["s"] + case.head * strides["h"]
    for j in range(EACH):
        device.put(bits[j], at=start + 2 * (source + j * GAP))
    position, to = case.had + case.token, {"b": heads * GAP, "s": DIM, "h": GAP}
    place = case.page * to["b"] + position % 16 * to["s"] + case.head * to["h"]
    if case.of == "q":
        to, place = strides, source
    held = np.zeros(DIM, np.uint8 if kind == "e4m3" else np.uint16)
    places = [there + held.itemsize * (place + j * GAP) for j in range(EACH)]
    outs = [device.put(held, np.zeros(DIM, bool), at=at) for at in places]
    target = {"q": "q_out", "k": "k", "v": "v"}[case.of]
    values: dict[str, Any] = {source_of: start, target: there}
    for name, steps in ((source_of, strides), (target, to)):
        values |= {f"{name}_stride_{axis}": stride for axis, stride in steps.items()}
    if case.new:
        values |= {"k_new": values.get("k_new", 16)}  # not null: K's rows come before V's
    values |= {"batch": case.batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv, "seqlen_new": case.new}
    values |= {"seqlen_q": case.queries, "seqlen_k": case.room, "head_dim": DIM, "head_dim_v": DIM}
    magic, shift = fast_divmod(16)
    values |= {"page_magic": magic, "page_shift": shift, "page_size": 16, "page_table_stride": case.table_stride}
    values["seqused_k"] = device.elements({case.entry: case.had})
    values["page_table"] = device.elements({case.entry * case.table_stride + position // 16: case.page})
    return values, outs


def rotated(
    device: Sparse, values: dict[str, Any], case: Append, dtype: str, x: Array, position: int
) -> tuple[Array, Array]:
    """As `rotate`; of the angles only one row exists."""
    angles = np.random.default_rng(1).uniform(0, 7, DIM // 2)
    row = min(position, case.rotary_rows - 1) * case.rotary_stride
    tables = []
    for name, function in (("rotary_cos", np.cos), ("rotary_sin", np.sin)):
        bits = encode(function(angles), dtype)
        values[name] = device.elements({row + j: int(b) for j, b in enumerate(bits)}, np.uint16)
        tables.append(decode(bits, dtype)[None])
    values |= {"rotary_dim": DIM, "rotary_rows": case.rotary_rows, "rotary_stride": case.rotary_stride}
    return rotate(x, *tables, np.array([0]), False)
