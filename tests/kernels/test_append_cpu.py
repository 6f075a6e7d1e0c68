"""The PTX of `kv_append` against fp64: what it writes into the cache, and that it writes and reads nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from kernels import dispatch
from registry.contract import Variant, fast_divmod
from tests.kernels.arrays import Strided, put_exact
from tests.kernels.cache import UNUSED
from tests.kernels.cases import of
from tests.kernels.faults import Switchable, planted, shifted
from tests.kernels.launch import Compiled, kv_dtype, launch
from tests.ptx.interpreter import Device, Kernel, PtxError
from tests.reference import Array, decode, encode, misrounded, rotate
from tests.support.abis import KV_APPEND
from tests.support.call import CAUSAL, OPEN, Append, Cache, Call

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "kv_append"]
SKELETONS = [variant for variant in VARIANTS if variant.dtype == "bf16"]
PAGES = 7


SCALED = {"normal": 1.0, "times300": 300.0, "hundredth": 0.01}  # families of the new keys and values, and queries


def call(**more: Any) -> Call:
    """Three entries get tokens, in pages. more: other fields of the call and its parts.

    `seqlen_q` queries are rotated as the new tokens are, all alike where no mask tells them apart; `seqlen_k` tokens
    are an entry's row of pages.
    """
    plain = Call(
        0, 32, 4, 2, 3, 64, 64, seqused_k=(0, 5, 17), window=CAUSAL, cache=Cache(), append=Append(3, rotary_rows=64)
    )
    return plain.but(**more)


CASES = {
    "plain": call(),
    "one-token-rotated": call(tokens=1, seqlen_q=1, rotary_dim=64, seqused_k=(0, 15, 16)),
    "interleaved": call(tokens=5, seqlen_q=5, rotary_dim=32, rotary="interleaved", heads_first=True, page_size=3,
                        seqlen_k=33),
    "still": call(tokens=2, seqlen_q=7, rotary_dim=48, window=OPEN, head_dim=72, head_dim_v=40, page_size=1,
                  seqlen_k=29),
    "halves": call(halves=True, page_size=48, seqlen_k=48, rotary_dim=64, head_dim=128, head_dim_v=128, seqlen_q=2),
    "no-table": call(page_size=None, seqlen_k=24, rotary_dim=16, heads_first=True, head_dim=192, head_dim_v=128,
                     seqlen_q=1),
    "full": call(seqused_k=(30, 32, 40), tokens=4, rotary_dim=16, seqlen_q=2),
    "garbage-lengths": call(seqused_k=(-3, -(2**31), 2**31 - 9), rotary_dim=16, rotary_rows=9, seqlen_q=3),
    "garbage-angles": call(seqused_k=(2**31 - 1, 2**30, 2**31 - 2), rotary_dim=16, rotary_rows=9, seqlen_q=3),
    "padded-graph": call(tokens=1, seqlen_q=1, rotary_dim=64, seqused_k=(5, 0, 0), lost=((1, 0), (2, 0))),
    "lost-pages": call(tokens=7, page_size=3, seqlen_k=33, lost=((0, 1), (1, 2), (2, 6), (2, 7)), heads_first=True),
    "empty-cache": call(seqused_k=None, tokens=6, head_dim=256, head_dim_v=256, rotary_dim=256, seqlen_q=6),
    "queries-alone": call(tokens=0, seqlen_q=9, rotary_dim=64, heads_q=7),
    "last-angle": call(rotary_dim=32, rotary_rows=10, rotary="interleaved", seqlen_q=3),
    "scaled": call(descale="heads", family="times300", rotary_dim=64, halves=True),
    "scaled-entries": call(descale="batch", family="hundredth", page_size=3, seqlen_k=24, heads_first=True),
}  # fmt: skip


def cases(variant: Variant) -> dict[str, Call]:
    """Head dims as the cache's dtype wants them."""
    if kv_dtype(variant) != "e4m3":
        return {name: case.but(descale="") for name, case in CASES.items()}
    return {
        name: case.but(head_dim=case.head_dim // 16 * 16, head_dim_v=case.head_dim_v // 16 * 16)
        for name, case in CASES.items()
    }


class Memory:
    """A call's inputs, the memory that they lie in, and what its outputs should be."""

    def __init__(self, case: Call, variant: Variant):
        assert case.cache is not None and case.append is not None
        self.case, self.cache, self.new = case, case.cache, case.append
        self.dtype, self.kv_dtype = variant.dtype, kv_dtype(variant)
        self.device, self.random = Device(), np.random.default_rng(0)
        self.page_size, self.still = self.cache.page_size or case.seqlen_k, case.window == OPEN
        magic, shift = fast_divmod(self.page_size)
        self.values: dict[str, Any] = {"page_magic": magic, "page_shift": shift, "page_size": self.page_size}
        self.values |= {"batch": case.batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv}
        self.values |= {"seqlen_new": self.new.tokens, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
        self.values |= {"head_dim": case.head_dim, "head_dim_v": case.head_dim_v, "rotary_dim": self.new.rotary_dim}
        self.values |= {"interleaved": int(self.new.rotary == "interleaved"), "q_still": int(self.still)}
        self.places()
        self.angles()
        self.tensors()

    def positions(self, entry: int, tokens: int, still: bool = False) -> Array:
        """Of tokens behind those that the cache has of an entry."""
        return (self.case.seqused_k[entry] if self.case.seqused_k else 0) + np.arange(tokens) * (not still)

    def places(self) -> None:
        """The page table and the lengths; page and row of each new token, and which have a place at all."""
        case = self.case
        if case.seqused_k:
            self.values["seqused_k"] = put_exact(self.device, np.array([case.seqused_k], np.int64).astype(np.int32))
        position = np.array([self.positions(b, self.new.tokens) for b in range(case.batch)]).reshape(case.batch, -1)
        self.kept = (position >= 0) & (position < case.seqlen_k)
        size = self.page_size
        number, self.row = np.where(self.kept, position // size, 0), np.where(self.kept, position % size, 0)
        self.page = np.broadcast_to(np.arange(case.batch)[:, None], number.shape)
        self.pages = case.batch
        if self.cache.page_size:
            columns = case.seqlen_k // size
            used = np.zeros((case.batch, columns), bool)
            used[np.nonzero(self.kept)[0], number[self.kept]] = True
            self.pages = int(used.sum()) + 2
            table = np.resize(np.array(UNUSED, np.int64), used.shape)
            table[used] = self.random.permutation(self.pages)[: used.sum()]
            for j, (b, column) in enumerate(self.cache.lost):
                table[b, column] = (-1, -(2**31))[j % 2]
                self.kept[b] &= number[b] != column
            placed = Strided(self.device, table.astype(np.int32).view(np.uint32), used, pad=3)
            self.values |= {"page_table": placed.address, "page_table_stride": placed.strides[0]}
            self.page = np.where(self.kept, np.take_along_axis(table, number, 1), 0)

    def angles(self) -> None:
        """Cosines and sines, with nothing around them that may be read."""
        half = self.new.rotary_dim // 2
        angles = self.random.uniform(0, 7, (self.new.rotary_rows, half))
        self.cos, self.sin = (decode(encode(f(angles), self.dtype), self.dtype) for f in (np.cos, np.sin))
        if half:
            for name, table in (("rotary_cos", self.cos), ("rotary_sin", self.sin)):
                placed = Strided(self.device, encode(table, self.dtype))
                self.values |= {name: placed.address, "rotary_stride": placed.strides[0]}
            self.values["rotary_rows"] = self.new.rotary_rows

    def tensors(self) -> None:
        """k_new, v_new, q and the memory of k, v and q_out."""
        case, order = self.case, (0, 2, 1) if self.case.heads_first else (0, 1, 2)
        self.inputs: dict[str, Array] = {}
        shapes = {
            "k_new": (case.batch, self.new.tokens, case.heads_kv, case.head_dim),
            "v_new": (case.batch, self.new.tokens, case.heads_kv, case.head_dim_v),
            "q": (case.batch, case.seqlen_q, case.heads_q, case.head_dim),
        }
        for name, shape in shapes.items():
            bits = encode(SCALED[case.family] * self.random.standard_normal(shape), self.dtype)
            self.inputs[name] = decode(bits, self.dtype)
            if shape[1]:
                self.values |= Strided(self.device, bits, order=order).named(name, "bsh")
        kind = np.uint8 if self.kv_dtype == "e4m3" else np.uint16
        rows = (self.pages, self.page_size, case.heads_kv)
        if self.cache.halves:
            both = np.full((rows[0], 2, *rows[1:], max(case.head_dim, case.head_dim_v)), 0x55, kind)
            self.both = Strided(self.device, both, False)
            _, stride_half, stride_s, stride_h, _ = self.both.strides
            strides = {"b": self.both.strides[0], "s": stride_s, "h": stride_h}
            for name, half in (("k", 0), ("v", 1)):
                self.values |= {f"{name}_stride_{axis}": stride for axis, stride in strides.items()}
                self.values[name] = self.both.address + half * stride_half * both.itemsize
        else:
            self.apart = [
                Strided(self.device, np.full((*rows, dim), 0x55, kind), False, order)
                for dim in (case.head_dim, case.head_dim_v)
            ]
            self.values |= self.apart[0].named("k", "bsh") | self.apart[1].named("v", "bsh")
        nothing = np.full(shapes["q"], 0xFFFF, np.uint16)
        self.q_out = Strided(self.device, nothing, False, order) if case.seqlen_q else None
        self.values |= self.q_out.named("q_out", "bsh") if self.q_out else {}
        self.descales = np.ones((2, 1, case.heads_kv), np.float32)
        if self.cache.descale:
            self.descales = self.random.uniform(0.5, 2, (2, case.batch, case.heads_kv)).astype(np.float32)
            self.descales = self.descales[:, : 1 if self.cache.descale == "heads" else None]
            for name, rows_of in zip(("k_descale", "v_descale"), self.descales, strict=True):
                stride = case.heads_kv + 1 if self.cache.descale == "batch" else 0
                self.values |= {name: put_exact(self.device, rows_of), f"{name}_stride_b": stride}

    def caches(self) -> tuple[Array, Array]:
        """k and v as the launch left them, in bits."""
        if self.cache.halves:
            both = self.both.result()
            return both[:, 0, ..., : self.case.head_dim], both[:, 1, ..., : self.case.head_dim_v]
        return self.apart[0].result(), self.apart[1].result()

    def stray(self) -> int:
        """Elements that changed though none of the new tokens belongs there."""
        mine = np.zeros((self.pages, self.page_size, 1, 1), bool)
        mine[self.page[self.kept], self.row[self.kept]] = True
        if self.cache.halves:
            dims = np.array([self.case.head_dim, self.case.head_dim_v])[:, None, None, None]
            return self.both.stray(mine[:, None] & (np.arange(dims.max()) < dims))
        return sum(cache.stray(mine) for cache in self.apart)

    def problems(self) -> str:
        """What is wrong with what the launch left behind; '' if nothing is."""
        case, wrong = self.case, {"stray": self.stray() + (self.q_out.stray() if self.q_out else 0)}
        for which, (name, bits) in enumerate(zip(("k_new", "v_new"), self.caches(), strict=True)):
            got = decode(bits[self.page, self.row], self.kv_dtype)
            descales = self.descales[which][:, None, :, None]
            values = [
                self.turned(self.inputs[name][b], b) if name == "k_new" else
                (self.inputs[name][b].astype(np.float64), np.zeros(self.inputs[name][b].shape))
                for b in range(case.batch)
            ]  # fmt: skip
            exact, size = (np.stack(column) / descales for column in zip(*values, strict=True))
            size = size + np.abs(exact) * bool(self.cache.descale)
            wrong[name] = misrounded(got[self.kept], exact[self.kept], size[self.kept], self.kv_dtype)
        if self.q_out:
            turned = [self.turned(self.inputs["q"][b], b, self.still) for b in range(case.batch)]
            exact, size = (np.stack(column) for column in zip(*turned, strict=True))
            wrong["q"] = misrounded(decode(self.q_out.result(), self.dtype), exact, size, self.dtype)
        return ", ".join(f"{count} wrong of {name}" for name, count in wrong.items() if count)

    def turned(self, x: Array, entry: int, still: bool = False) -> tuple[Array, Array]:
        positions = self.positions(entry, len(x), still)
        return rotate(x, self.cos, self.sin, positions, self.new.rotary == "interleaved")


def problems(
    compiled: Compiled, case: Call, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None
) -> str:
    """What is wrong with the result; '' if nothing is."""
    memory = Memory(case, compiled.variant)
    rows = case.batch * (2 * memory.new.tokens * case.heads_kv + case.seqlen_q * case.heads_q)
    try:
        grid = compiled.artifact.grid.blocks({"rows": rows})
        launch(compiled, memory.device, KV_APPEND, memory.values, grid, kernel, changed)
    except PtxError as error:
        return str(error)
    return memory.problems()


@pytest.mark.parametrize("name", CASES)
@of(VARIANTS)
def test_append(variant: Variant, name: str, variant_of: Callable[[str], Compiled]):
    assert problems(variant_of(variant.key), cases(variant)[name]) == ""


@of(SKELETONS)
def test_shifted_bounds(variant: Variant, variant_of: Callable[[str], Compiled]):
    """Every comparison of registers is met with equal sides, and then a shift of it is caught."""
    compiled = variant_of(variant.key)
    kernel, equal = Switchable(compiled.ptx, shifted), {}
    for case in cases(variant).values():
        assert problems(compiled, case, kernel) == ""
        equal[case] = set(kernel.equal)
    assert len(set().union(*equal.values())) == len(kernel.places) >= 5
    left = kernel.survivors(equal, lambda case: problems(compiled, case, kernel))
    assert [kernel.text(number) for number in left] == []


@of(SKELETONS)
def test_pages_taken_for_one(variant: Variant, variant_of: Callable[[str], Compiled]):
    """A page's number decides whether K and V are written: -1 and others below 0 are none."""
    compiled = variant_of(variant.key)
    found = planted(compiled.ptx, r"(setp\.[a-z]+\.s(32|64)\s+%p\d+, %rd?\d+), (0|-1);", lambda m: f"{m[1]}, -{2**30};")
    caught = [fault for fault in found if problems(compiled, cases(variant)["padded-graph"], Kernel(fault.ptx))]
    assert len(caught) == 2, [fault.before for fault in found]


FALSE_PARAMETERS: list[tuple[str, str, dict[str, int]]] = [
    ("room-missing", "full", {"seqlen_k": 31}),
    ("room-beyond", "full", {"seqlen_k": 33}),
    ("tokens", "interleaved", {"seqlen_new": 4}),
    ("queries", "interleaved", {"seqlen_q": 4}),
    ("heads", "interleaved", {"heads_kv": 1}),
    ("heads-of-queries", "interleaved", {"heads_q": 3}),
    ("entries", "plain", {"batch": 2}),
    ("columns", "plain", {"head_dim": 48}),
    ("columns-of-v", "plain", {"head_dim_v": 48}),
    ("columns-beyond", "plain", {"head_dim": 80}),
    ("rotated-columns", "interleaved", {"rotary_dim": 48}),
    ("rows-of-angles", "last-angle", {"rotary_rows": 11}),
    ("rows-of-angles-missing", "last-angle", {"rotary_rows": 9}),
    ("interleaved", "interleaved", {"interleaved": 0}),
    ("still", "interleaved", {"q_still": 1}),
    ("page-size", "interleaved", {"page_size": 4}),
    ("page-division", "interleaved", {"page_magic": fast_divmod(4)[0]}),
    ("page-shift", "interleaved", {"page_shift": fast_divmod(3)[1] + 1}),
    ("lengths", "plain", {"seqused_k": 0}),
    ("table", "plain", {"page_table": 0}),
    ("table-without-lost-pages", "lost-pages", {"page_table_stride": 0}),
    ("no-new", "plain", {"k_new": 0}),
    ("no-queries", "interleaved", {"q": 0}),
    *[
        (name, "interleaved", {name: 48})
        for name in (p.name for p in KV_APPEND.params)
        if "stride" in name and "descale" not in name
    ],
]


@pytest.mark.parametrize(
    ("name", "changed"), [row[1:] for row in FALSE_PARAMETERS], ids=[r[0] for r in FALSE_PARAMETERS]
)
@pytest.mark.variants(SKELETONS[0])
def test_false_parameters(name: str, changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    variant = SKELETONS[0]
    assert problems(variant_of(variant.key), cases(variant)[name], changed=changed) != ""


@pytest.mark.parametrize("changed", [{"k_descale": 0}, {"v_descale": 0}, {"k_descale_stride_b": 0},
                                     {"v_descale_stride_b": 0}], ids=str)  # fmt: skip
@pytest.mark.variants(next(v for v in SKELETONS if kv_dtype(v) == "e4m3"))
def test_false_descales(changed: dict[str, int], variant_of: Callable[[str], Compiled]):
    variant = next(v for v in SKELETONS if kv_dtype(v) == "e4m3")
    assert problems(variant_of(variant.key), cases(variant)["scaled-entries"], changed=changed) != ""


@of(VARIANTS)
def test_parameters_follow_the_abi(variant: Variant, variant_of: Callable[[str], Compiled]):
    program = variant_of(variant.key).kernel.program
    assert tuple(program.params.values()) == KV_APPEND.layout


def test_caches_of_both_kinds():
    assert [kv_dtype(v) for v in VARIANTS] == ["bf16", "e4m3", "fp16", "e4m3"]
