"""Launch single blocks of calls that are as large as is legal: of their memory only what such a block needs exists.

Every tensor has a region of addresses of its own, and what a block needs of it lies far from where a number that has
wrapped around would lead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from registry.contract import WINDOW_OPEN, fast_divmod
from tests.kernels.launch import Compiled, kv_dtype
from tests.ptx.formats import WORDS
from tests.ptx.interpreter import Device, PtxError
from tests.reference import Array, Scores, decode, encode, reference, yardstick
from tests.support.abis import ABIS

REGION = 2**56  # bytes between the first elements of two tensors
SECTION = 64  # of the schedule, as in kernels/trunk/tile_coord.py
GAP = 2**21  # elements between two heads: more than what lies between two allocations
Values = Mapping[int, int | float]  # of an array, by index: all that may be read of it


class Sparse(Device):
    """Global memory with a region for every tensor. Pieces of a region are put down in the order of their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.regions = 0
        self.tables: list[tuple[int, int, Callable[[Array], Array]]] = []

    def region(self) -> int:
        """The address of a tensor's first element."""
        self.regions += 1
        return self.regions * REGION

    def elements(self, values: Values, kind: type = np.int32) -> int:
        """The address of an array of which these elements exist; reading others is a fault."""

        def value(index: Array) -> Array:
            missing = [i for i in index.tolist() if i not in values]
            if missing:
                raise PtxError(f"global load: element {missing[0]} of an array, which has {list(values)}")
            return np.array([values[i] for i in index.tolist()], kind)

        return self.computed(value, np.dtype(kind).itemsize)

    def computed(self, value: Callable[[Array], Array], size: int = 4) -> int:
        """The address of an array whose elements of so many bytes a function of their index gives."""
        start = self.region()
        self.tables.append((start, size, value))
        return start

    def load(self, address: Array, size: int, what: str) -> Array:
        for start, width, value in self.tables:
            if len(address) and start - REGION // 2 <= int(address.min()) < start + REGION // 2:
                assert size == width
                return value((address.astype(np.int64) - start) // size).view(WORDS[size])
        return super().load(address, size, what)


@dataclass(eq=False)
class Large:
    """A call of `fwd` or `fwd_paged`, and which of its blocks runs: tile (of the entry), entry, head, split.

    Causal, with `left` keys to the left. lengths_q, lengths_k: of packed arrays, {entry: tokens}, all others are empty.
    used_k, leftpad_k: {entry: tokens}, of dense ones. Of fwd_paged: page_size, 0 for no table; page: that of the first
    key, pages of later ones have lower numbers; strides of table and descales.
    """

    entry: int = 0
    head: int = 0
    tile: int = 0
    split: int = 0
    batch: int = 1
    heads_q: int = 1
    heads_kv: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1
    left: int | None = None
    pack: int = 1
    lengths_q: dict[int, int] = field(default_factory=dict)
    lengths_k: dict[int, int] = field(default_factory=dict)
    used_k: dict[int, int] = field(default_factory=dict)
    leftpad_k: dict[int, int] = field(default_factory=dict)
    alibi_stride_b: int | None = None
    sink: bool = False
    splits: int = 1
    page_size: int = 16
    page: int = 9
    table_stride: int = 7
    row_stride: int = 0
    descale_stride: int | None = None

    def tiles(self, tile_m: int) -> int:
        if self.lengths_q:
            return self.seqlen_q * self.pack // tile_m + self.batch
        return -(-self.seqlen_q * self.pack // tile_m)

    def grid(self, tile_m: int) -> int:
        entries = 1 if self.lengths_q else self.batch
        return self.tiles(tile_m) * (self.heads_q // self.pack) * entries * self.splits

    def block(self, tile_m: int) -> int:
        """The number of the block: in sections of 64 tile heads, within one from the last tile to the first."""
        heads = self.heads_q // self.pack
        pair, tile, pairs = self.head // self.pack, self.tile, heads
        if self.lengths_q:
            tile += self.first_q * self.pack // tile_m + self.entry
        else:
            pair, pairs = pair + self.entry * heads, heads * self.batch
        done = pair // SECTION * SECTION
        width, tiles = min(SECTION, pairs - done), self.tiles(tile_m)
        work = done * tiles + (tiles - 1 - tile) * width + pair - done
        return work * self.splits + self.split

    @property
    def first_q(self) -> int:
        """The entry's first token in a packed array."""
        return sum(length for entry, length in self.lengths_q.items() if entry < self.entry)

    @property
    def first_k(self) -> int:
        return sum(length for entry, length in self.lengths_k.items() if entry < self.entry)

    @property
    def queries(self) -> int:
        return self.lengths_q.get(self.entry, 0) if self.lengths_q else self.seqlen_q

    @property
    def keys(self) -> int:
        length = self.lengths_k.get(self.entry, 0) if self.lengths_k else self.seqlen_k
        return self.used_k.get(self.entry, length)

    @property
    def padding(self) -> int:
        return min(self.leftpad_k.get(self.entry, 0), self.keys)

    @property
    def head_kv(self) -> int:
        return self.head // (self.heads_q // self.heads_kv)


class LargeRun:
    """One block of a call: its memory, the launch, what is wrong with what it wrote."""

    def __init__(self, compiled: Compiled, case: Large, head_dim: int = 16):
        self.compiled, self.case, self.dim = compiled, case, head_dim
        variant = compiled.variant
        self.paged, self.tile_m, self.tile_n = variant.op == "fwd_paged", variant.size("m"), variant.size("n")
        self.device, self.random = Sparse(), np.random.default_rng(0)
        self.abi = ABIS[variant.op]
        self.values: dict[str, Any] = dict.fromkeys((p.name for p in self.abi.params), 0)
        start = case.tile * self.tile_m
        self.rows = range(start, min(start + self.tile_m, case.queries * case.pack))
        self.tokens = range(self.rows.start // case.pack, (self.rows.stop - 1) // case.pack + 1)
        offset = case.keys - case.queries
        low = 0 if case.left is None else self.tokens.start + offset - case.left
        self.seen = range(max(low, case.padding, 0), self.tokens.stop + offset)
        self.sizes()
        self.lengths()
        self.queries()
        self.keys()
        self.options()

    def sizes(self) -> None:
        case, names = self.case, ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k")
        self.values |= {name: getattr(case, name) for name in names}
        magic, shift = fast_divmod(case.pack)
        self.values |= {"pack": case.pack, "pack_magic": magic, "pack_shift": shift, "head_dim": self.dim}
        self.values |= {"head_dim_v": self.dim, "window_left": WINDOW_OPEN if case.left is None else case.left}
        self.values |= {"window_right": 0, "scale_log2": self.dim**-0.5 * np.log2(np.e)}

    def lengths(self) -> None:
        case = self.case
        for name, of in (("seqused_k", case.used_k), ("leftpad_k", case.leftpad_k)):
            if of:
                self.values[name] = self.device.elements(of)
        for name, lengths in (("cu_seqlens_q", case.lengths_q), ("cu_seqlens_k", case.lengths_k)):
            if lengths:
                self.values[name] = self.device.computed(self.cumulative(lengths))

    def cumulative(self, lengths: dict[int, int]) -> Callable[[Array], Array]:
        entries, ends = np.array([*lengths]), np.cumsum([0, *lengths.values()])

        def value(index: Array) -> Array:
            if index.min() < 0 or index.max() > self.case.batch:
                raise PtxError(f"global load: entry {index} of cu_seqlens")
            return ends[np.searchsorted(entries, index)].astype(np.int32)

        return value

    def queries(self) -> None:
        """q, o and the LSE: pieces of the tile's tokens of each of its heads."""
        case, n = self.case, len(self.tokens)
        partial = case.splits > 1
        stride_h = -(-case.seqlen_q * self.dim // 16) * 16 + GAP
        stride_b = 0 if case.lengths_q else case.heads_q * stride_h
        array = case.heads_q * stride_h * (1 if case.lengths_q else case.batch)
        first = case.first_q + self.tokens.start
        place = case.entry * stride_b + first * self.dim + case.head * stride_h
        q = self.random.standard_normal((n, case.pack, self.dim))
        q_bits = encode(q, self.compiled.variant.dtype)
        self.q = decode(q_bits, self.compiled.variant.dtype)[None]
        kind = np.uint32 if partial else np.uint16
        self.out_at, self.lse_at = [], []
        bases = {"q": self.device.region(), "o": self.device.region(), "lse": self.device.region()}
        for j in range(case.pack):
            self.device.put(q_bits[:, j], at=bases["q"] + 2 * (place + j * stride_h))
        for j in range(case.pack):
            at = bases["o"] + kind().itemsize * (case.split * array + place + j * stride_h)
            nothing = np.full((n, self.dim), np.iinfo(kind).max, kind)
            self.out_at.append(self.device.put(nothing, np.zeros(nothing.shape, bool), at=at))
        lse_h = -(-case.seqlen_q // 4) * 4 + GAP
        lse_b = 0 if case.lengths_q else case.heads_q * lse_h
        lse_array = case.heads_q * lse_h * (1 if case.lengths_q else case.batch)
        self.lse_skip = first % 4
        for j in range(case.pack):
            at = case.split * lse_array + case.entry * lse_b + (case.head + j) * lse_h + first - self.lse_skip
            nothing = np.full(self.lse_skip + n, 2**32 - 1, np.uint32)
            place_of = bases["lse"] + 4 * at
            self.lse_at.append(self.device.put(nothing, np.zeros(nothing.shape, bool), at=place_of))
        self.values |= bases
        for name in "qo":
            self.values |= {f"{name}_stride_b": stride_b, f"{name}_stride_s": self.dim, f"{name}_stride_h": stride_h}
        self.values |= {"lse_stride_b": lse_b, "lse_stride_h": lse_h}
        if self.paged:
            self.values |= {"num_splits": case.splits, "o_stride_split": array, "lse_stride_split": lse_array}

    def keys(self) -> None:
        """K and V of the blocks of keys that the tile sees, in one piece or page by page."""
        case, n = self.case, self.tile_n
        origin = 0 if self.paged else case.padding  # where blocks are counted from
        begin = self.seen.start if self.paged else origin + (self.seen.start - origin) // n * n
        end = min(origin + -(-(self.seen.stop - origin) // n) * n, case.keys) if self.seen else begin
        kind = kv_dtype(self.compiled.variant) if self.paged else self.compiled.variant.dtype
        bits = [encode(self.random.standard_normal((end - begin, self.dim)), kind) for _ in range(2)]
        mine = slice(self.seen.start - begin, self.seen.stop - begin) if self.seen else slice(0)
        self.kv = [decode(x, kind)[None, mine, None] for x in bits]
        if not self.paged:
            self.dense_keys(begin, bits)
        else:
            self.paged_keys(begin, bits)

    def dense_keys(self, begin: int, tensors: list[Array]) -> None:
        case = self.case
        stride_h = -(-case.seqlen_k * self.dim // 16) * 16 + GAP
        stride_b = 0 if case.lengths_k else case.heads_kv * stride_h
        place = case.entry * stride_b + (case.first_k + begin) * self.dim + case.head_kv * stride_h
        for name, bits in zip("kv", tensors, strict=True):
            self.values[name] = self.device.region()
            if bits.size:
                self.device.put(bits, at=self.values[name] + 2 * place)
            self.values |= {f"{name}_stride_b": stride_b, f"{name}_stride_s": self.dim, f"{name}_stride_h": stride_h}

    def paged_keys(self, begin: int, tensors: list[Array]) -> None:
        case, size = self.case, self.case.page_size or self.case.seqlen_k
        row = case.row_stride or self.dim
        stride_h = size * row + GAP
        token = np.arange(begin, begin + len(tensors[0]))
        pages = case.page - (token // size - begin // size) if case.page_size else np.full(token.shape, case.entry)
        magic, shift = fast_divmod(size)
        self.values |= {"page_size": size, "page_magic": magic, "page_shift": shift}
        if case.page_size:
            table = dict(zip((case.entry * case.table_stride + token // size).tolist(), pages.tolist(), strict=True))
            self.values |= {"page_table": self.device.elements(table), "page_table_stride": case.table_stride}
        for name, bits in zip("kv", tensors, strict=True):
            self.values[name] = start = self.device.region()
            at = start + bits.itemsize * (
                pages * case.heads_kv * stride_h + token % size * row + case.head_kv * stride_h
            )
            runs = np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) != self.dim * bits.itemsize) + 1)
            for run in sorted((run for run in runs if len(run)), key=lambda run: at[run[0]]):
                self.device.put(bits[run], at=int(at[run[0]]))
            strides = {"b": case.heads_kv * stride_h, "s": row, "h": stride_h}
            self.values |= {f"{name}_stride_{axis}": stride for axis, stride in strides.items()}

    def options(self) -> None:
        """Sink, slopes and descales, of the heads of this block alone."""
        case, heads = self.case, range(self.case.head, self.case.head + self.case.pack)
        self.sink = self.slopes = None
        if case.sink:
            self.sink = self.random.standard_normal(case.pack).astype(np.float32)
            values = dict(zip(heads, self.sink.tolist(), strict=True))
            self.values["sink"] = self.device.elements(values, np.float32)
        if case.alibi_stride_b is not None:
            self.slopes = self.random.uniform(-0.03, 0.05, case.pack).astype(np.float32)
            row = case.entry * case.alibi_stride_b
            values = {row + head: slope for head, slope in zip(heads, self.slopes.tolist(), strict=True)}
            self.values["alibi_slopes"] = self.device.elements(values, np.float32)
            self.values["alibi_stride_b"] = case.alibi_stride_b
        if case.descale_stride is not None:
            place = case.entry * case.descale_stride + case.head_kv
            for j, name in enumerate(("k_descale", "v_descale")):
                self.values[name] = self.device.elements({place: 0.5 + j}, np.float32)
                self.values[f"{name}_stride_b"] = case.descale_stride
                self.kv[j] = self.kv[j] * np.float32(0.5 + j)

    def problems(self) -> str:
        """What is wrong with the block's output; '' if nothing is."""
        case, artifact = self.case, self.compiled.artifact
        grid, block = case.grid(self.tile_m), case.block(self.tile_m)
        assert 0 <= block < grid < 2**31
        try:
            self.compiled.kernel.run(
                self.device, grid=(grid, 1, 1), block=(artifact.threads, 1, 1), params=self.abi.pack(self.values),
                smem=artifact.smem, order=[block],
            )  # fmt: skip
        except PtxError as error:
            return str(error)
        dtype = self.compiled.variant.dtype
        scores = Scores(self.dim**-0.5, (case.left, 0), alibi=self.slopes, sink=self.sink)
        keys, values = (x[:, :0] for x in self.kv) if case.split else self.kv
        right = reference(self.q, keys, values, dtype, scores)
        raw = [self.device.get(at, np.uint32 if case.splits > 1 else np.uint16) for at in self.out_at]
        out = np.stack([x.reshape(len(self.tokens), self.dim) for x in raw], axis=1)[None]
        out = out.view(np.float32) if case.splits > 1 else decode(out, dtype)
        if case.splits > 1:
            out = decode(encode(out, dtype), dtype)
        lse = np.stack([self.device.get(at, np.float32)[self.lse_skip :] for at in self.lse_at])[None]
        row = np.array(self.tokens)[:, None] * case.pack + np.arange(case.pack)
        mine = (row >= self.rows.start) & (row < self.rows.stop)
        if not np.isnan(out[0][~mine]).all():
            return "rows of other tiles were written"
        out[0][~mine] = decode(encode(right.out, dtype), dtype)[0][~mine]
        lse[0][~mine.T] = right.lse[0][~mine.T]
        return "; ".join(yardstick(out, right, lse, 10**9))
