"""Launch the backward's three kernels in the PTX interpreter, with memory laid out to show every stray access."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from registry.contract import Abi, Variant
from registry.ops.workspaces import ROWS
from tests.kernels import launch
from tests.kernels.arrays import Strided, Tensor, changed_bytes, parts
from tests.kernels.launch import Compiled, dims, placed, sink_values
from tests.ptx.interpreter import Device, Kernel
from tests.reference import Array, Scores, decode, encode, visible, yardstick
from tests.reference_backward import BackwardReference, backward_reference, join_backward
from tests.support.abis import BWD, BWD_POSTPROCESS, BWD_PREPROCESS
from tests.support.call import Call, Grad, Tokens

STRIP, UNIT_COLUMNS = 16, 8  # rows and columns of a unit of dq_accum
ERROR = 5e-6  # of dsink and dalibi, relative to the sums of their terms without signs


def grad(case: Call) -> Grad:
    assert case.grad is not None
    return case.grad


@dataclass(frozen=True)
class Trio:
    """The kernels of a call."""

    preprocess: Compiled
    main: Compiled
    postprocess: Compiled

    @classmethod
    def of(cls, variant: Variant, variant_of: Callable[[str], Compiled]) -> Trio:
        """Those that go with a variant of `bwd`."""
        before, after = (f"bwd_{op}process-{variant.dtype}-d256-dv256-m{ROWS}" for op in ("pre", "post"))
        return cls(variant_of(before), variant_of(variant.key), variant_of(after))


@dataclass(frozen=True)
class Outcome:
    """What a call left behind: values in fp32 of all entries end to end, as in `BackwardReference`.

    dsink: None without a sink; dalibi: None where it is not wanted. stray: bytes changed where nothing belongs;
    dq_accum: (heads_q, ·), as it is in memory; turns: the semaphores, none if the call is not ordered; steps:
    instructions of the main kernel, counted once a block.
    """

    dq: Array
    dk: Array
    dv: Array
    dsink: Array | None
    dalibi: Array | None
    stray: int
    dq_accum: Array
    turns: Array
    steps: int


# ---- workspaces ------------------------------------------------------------------------------------------------------
def first_rows(case: Call) -> list[int]:
    """Where each entry begins in the workspaces, and behind them how many rows they have."""
    if case.cu_seqlens_q is None:
        of_entry = -(-case.seqlen_q // ROWS) * ROWS
        return [b * of_entry for b in range(case.batch + 1)]
    starts = [(part.start // ROWS + b) * ROWS for b, (_, part) in enumerate(case.queries.entries)]
    return [*starts, (case.seqlen_q // ROWS + case.batch) * ROWS]


def existing_rows(case: Call) -> Array:
    """Which rows of the workspaces are queries, (rows,)."""
    places = first_rows(case)
    exists = np.zeros(places[-1], bool)
    for start, (_, part) in zip(places, case.queries.entries, strict=False):
        exists[start : start + part.stop - part.start] = True
    return exists


def units(matrix: Array) -> Array:
    """(…, rows, columns) in the order of dq_accum, flat but for the first axes: units of 16 rows × 8 columns, in each
    4 elements of a lane, as `registry.ops` says."""
    *outer, rows, columns = matrix.shape
    split = matrix.reshape(
        *outer, rows // STRIP, 2, 8, columns // UNIT_COLUMNS, 4, 2
    )  # (strip, half, row, unit, lane, 2)
    axes = [-6, -3, -4, -2, -5, -1]
    ordered = split.transpose(*range(len(outer)), *(split.ndim + axis for axis in axes))
    return np.ascontiguousarray(ordered).reshape(*outer, rows * columns)


def matrix(units_of: Array, columns: int) -> Array:
    """The inverse of `units`: (…, rows, columns). By the lanes' own numbers, so that neither takes over the other's
    mistake."""
    *outer, size = units_of.shape
    lane, element = np.arange(32)[:, None], np.arange(4)
    row, column = lane // 4 + 8 * (element // 2), 2 * (lane % 4) + element % 2
    strips, across = size // columns // STRIP, columns // UNIT_COLUMNS
    split = units_of.reshape(*outer, strips, across, 32, 4)
    found = np.empty((*outer, strips, STRIP, across, UNIT_COLUMNS), units_of.dtype)
    found[..., row, :, column] = np.moveaxis(split, (-2, -1), (0, 1))
    return found.reshape(*outer, strips * STRIP, columns)


# ---- inputs ----------------------------------------------------------------------------------------------------------
def gradients_in(case: Call, variant: Variant) -> tuple[Array, Array | None]:
    """dout as uint16 bits (arrays, seqlen_q, heads_q, head_dim_v), and dlse (arrays, heads_q, seqlen_q) or None."""
    random, arrays = np.random.default_rng(3), case.queries.arrays
    dout = random.standard_normal((arrays, case.seqlen_q, case.heads_q, dims(case, variant)[1]))
    dlse = random.standard_normal((arrays, case.heads_q, case.seqlen_q)).astype(np.float32)
    return encode(dout, variant.dtype), dlse if grad(case).dlse else None


@lru_cache(maxsize=64)
def expected(case: Call, variant: Variant) -> BackwardReference:
    """Every entry by itself, then end to end, as in `Outcome`."""
    q, k, v = (decode(x, variant.dtype) for x in launch.inputs(case, variant))
    bits, dlse = gradients_in(case, variant)
    dout, sink, slopes = decode(bits, variant.dtype), sink_values(case, variant), launch.slopes(case)
    entries = []
    for b, ((i, tokens), (j, keys)) in enumerate(zip(case.queries.entries, case.keys.entries, strict=True)):
        alibi = None if slopes is None else slopes[b % len(slopes)]
        scores = Scores(launch.softmax_scale(case, variant), case.window, case.softcap, alibi, sink)
        inputs = q[i : i + 1, tokens], k[j : j + 1, keys], v[j : j + 1, keys]
        of_lse = None if dlse is None else dlse[i : i + 1, :, tokens]
        entries.append(backward_reference(*inputs, variant.dtype, scores, dout[i : i + 1, tokens], of_lse))
    return join_backward(entries)


def by_array(joined: Array, tokens: Tokens) -> tuple[Array, Array]:
    """(…, tokens of all entries end to end) back to (arrays, …, seqlen), and where there are any, (arrays, seqlen)."""
    placed = np.zeros((tokens.arrays, *joined.shape[:-1], tokens.seqlen), joined.dtype)
    there, at = np.zeros((tokens.arrays, tokens.seqlen), bool), 0
    for i, part in tokens.entries:
        length = part.stop - part.start
        placed[i][..., part], there[i, part] = joined[..., at : at + length], True
        at += length
    return placed, there


class Memory:
    """A call's memory: inputs of all its kernels, poisoned workspaces and outputs, and the parameters by name."""

    def __init__(self, case: Call, variant: Variant):
        self.case, self.variant, self.device = case, variant, Device()
        self.grad = grad(case)
        self.dim, self.dim_v = dims(case, variant)
        self.rows, self.accum_columns = first_rows(case)[-1], variant.head_dim
        self.values: dict[str, Any] = launch.scalars(case, variant) | launch.lengths_on(self.device, case)
        self.values |= {"softmax_scale": launch.softmax_scale(case, variant), "head_dim_accum": self.accum_columns}
        self.values["slope_scale"] = math.log2(math.e) / self.values["scale_log2"]
        self.values |= {"rows": self.rows, "splits": self.grad.splits}
        self._inputs()
        self._workspaces()
        self._outputs()

    def _inputs(self) -> None:
        case, device, right = self.case, self.device, expected(self.case, self.variant)
        self.values |= launch.queries_on(device, case, self.variant) | launch.keys_on(device, case, self.variant)
        options = launch.options_on(device, case, self.variant)
        self.values |= {name: options.get(name, 0) for name in ("alibi_slopes", "alibi_stride_b")}
        dout, dlse = gradients_in(case, self.variant)
        out, there = by_array(np.moveaxis(right.out, 0, -1), case.queries)
        self._tensor("o", case.queries, case.heads_q, self.dim_v, encode(np.moveaxis(out, -1, 1), self.variant.dtype))
        self._tensor("dout", case.queries, case.heads_q, self.dim_v, dout)
        lse, _ = by_array(right.lse, case.queries)
        self._statistics("lse", lse, there[:, None], "bh", (0, 1), 3)
        if dlse is not None:
            self._statistics("dlse", dlse.swapaxes(1, 2)[..., None], there[..., None, None], "bsh", (2, 1, 0), 1)

    def _tensor(self, name: str, tokens: Tokens, heads: int, dim: int, bits: Array | None = None) -> Tensor:
        tensor = Tensor(self.device, self.case, tokens, heads, dim, bits)
        of_keys = name in ("dk", "dv")
        before = 2 * launch.skipped_keys(self.case) * tensor.strides["s"] if of_keys else 0
        self.values |= placed(name, tensor, before)
        return tensor

    def _statistics(self, name: str, values: Array, there: Array, axes: str, order: tuple[int, ...], pad: int) -> None:
        array = Strided(self.device, values.view(np.uint32), np.broadcast_to(there, values.shape), order, pad)
        self.values |= array.named(name, axes)
        if self.case.queries.is_packed:
            self.values[f"{name}_stride_b"] = 0

    def _workspaces(self) -> None:
        heads, device = self.case.heads_q, self.device
        self.lse_log2, self.delta = (device.empty(4 * heads * self.rows) for _ in range(2))
        self.dq_accum = device.empty(4 * heads * self.rows * self.accum_columns)
        self.semaphores = device.empty(4 * heads * self.rows // STRIP) if self.grad.deterministic else 0
        self.values |= {name: getattr(self, name) for name in ("lse_log2", "delta", "dq_accum", "semaphores")}

    def _outputs(self) -> None:
        case, keys = self.case, self.case.keys
        self.dq = self._tensor("dq", case.queries, case.heads_q, self.dim)
        self.dk = self._tensor("dk", keys, case.heads_kv, self.dim)
        self.dv = self._tensor("dv", keys, case.heads_kv, self.dim_v)
        self.partials: dict[str, Strided] = {}
        if self.grad.splits > 1:
            for name, dim in (("dk", self.dim), ("dv", self.dim_v)):
                bits = np.full(
                    (self.grad.splits, keys.arrays * keys.seqlen * case.heads_kv * dim), 0xFFFFFFFF, np.uint32
                )
                array = self.partials[name] = Strided(self.device, bits, False, pad=16)
                before = 4 * launch.skipped_keys(case) * case.heads_kv * dim
                self.values |= {f"{name}_partial": array.address - before, name: 0}
                self.values[f"{name}_partial_stride_split"] = array.strides[0]
        self.tiles = key_tiles(case, self.variant.size("n"))
        self.dalibi = self.device.put(np.zeros((self.tiles[-1], case.heads_q), np.float32)) if self.grad.dalibi else 0
        self.values["dalibi"] = self.dalibi

    def run(
        self, compiled: Compiled, abi: Abi, grid: int, kernel: Kernel | None = None,
        changed: Mapping[str, int] | None = None, order: Sequence[int] | None = None,
    ) -> int:  # fmt: skip
        """Launch one kernel; the instructions that it executed."""
        return launch.launch(compiled, self.device, abi, self.values, grid, kernel, changed, order)

    def blocks(self, compiled: Compiled) -> int:
        """Blocks that the runtime launches, for each split."""
        case = self.case
        facts = {name: getattr(case, name) for name in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k")}
        facts |= {"varlen": int(case.queries.is_packed), "total_q": case.queries.arrays * case.seqlen_q}
        total_k = case.keys.arrays * case.seqlen_k + launch.skipped_keys(case)
        return compiled.artifact.grid.blocks(facts | {"varlen_k": int(case.keys.is_packed), "total_k": total_k})

    def order(self, blocks: int) -> range | None:
        """The blocks to run one by one: of an ordered call all; of one with a million tiles of keys that only the
        address space has, which come first, the others."""
        before = launch.skipped_keys(self.case) // self.variant.size("n") * self.case.heads_kv * self.grad.splits
        return range(before, blocks) if self.grad.deterministic or before else None

    def zero(self) -> None:
        """What the runtime does where there is nothing to launch: outputs are zeros, nothing is partial."""
        self.partials.clear()
        for tensor in (self.dq, self.dk, self.dv):
            for array, base in enumerate(tensor.bases):
                buffer = self.device.get(base, tensor.kind).reshape(tensor.buffer_shape)
                for part in parts(tensor.tokens, array):
                    tensor.inside(buffer)[part] = 0

    # ---- what came of it -----------------------------------------------------------------------------------------
    def keys_result(self, name: str) -> tuple[Array, int]:
        """(dk or dv in fp32, bytes changed where nothing belongs). Partials are added up in fp32, in their order."""
        bits, stray = getattr(self, name).result()
        if name not in self.partials:
            return decode(bits, self.variant.dtype), stray
        keys, array = self.case.keys, self.partials[name]
        shape = (self.grad.splits, keys.arrays, keys.seqlen, self.case.heads_kv, bits.shape[-1])
        there = np.zeros(shape[1:3], bool)
        for i, part in keys.entries:
            there[i, part] = True
        written = np.broadcast_to(there[None, :, :, None, None], shape).reshape(shape[0], -1)
        stray += changed_bytes([bits]) + array.stray(written)
        total = np.zeros(shape[1:], np.float32)
        for part in array.result().view(np.float32).reshape(shape):
            total += part
        entries = np.concatenate([total[i, part] for i, part in keys.entries])
        return decode(encode(entries, self.variant.dtype), self.variant.dtype), stray

    def dalibi_result(self) -> tuple[Array | None, int]:
        """(dalibi, (batch, heads_q); elements of it that no tile of keys has and that changed)."""
        if not self.dalibi:
            return None, 0
        found = self.device.get(self.dalibi, np.float32).reshape(-1, self.case.heads_q)
        n, owned, sums = self.variant.size("n"), np.zeros(len(found), bool), []
        for first, (_, part) in zip(self.tiles, self.case.keys.entries, strict=False):
            tiles = slice(first, first + -(-(part.stop - part.start) // n))
            owned[tiles] = True
            sums.append(found[tiles].astype(np.float64).sum(0))
        return np.stack(sums), int(np.count_nonzero(found[~owned]))

    def dsink_result(self) -> Array | None:
        """(heads_q,), from the workspaces, padding rows and all, as the runtime computes it."""
        if (sink := sink_values(self.case, self.variant)) is None:
            return None
        lse, delta = (self.workspace(name).astype(np.float64) for name in ("lse_log2", "delta"))
        return -(np.exp2(sink[:, None] * math.log2(math.e) - lse) * delta).sum(1)

    def workspace(self, name: str) -> Array:
        """lse_log2 or delta, (heads_q, rows)."""
        return self.device.get(getattr(self, name), np.float32).reshape(self.case.heads_q, self.rows)


def key_tiles(case: Call, n: int) -> list[int]:
    """The number of each entry's first tile of keys among those of all, padding or not, and behind them how many there
    are."""
    if case.cu_seqlens_k is None:
        return [b * -(-case.seqlen_k // n) for b in range(case.batch + 1)]
    whole = Tokens.of(case.seqlen_k, case.batch, case.cu_seqlens_k)
    starts = [part.start // n + b for b, (_, part) in enumerate(whole.entries)]
    return [*starts, case.seqlen_k // n + case.batch]


# ---- runs ------------------------------------------------------------------------------------------------------------
def run(
    trio: Trio, case: Call, kernel: Kernel | None = None, changed: Mapping[str, int] | None = None,
    order: Sequence[int] | None = None,
) -> Outcome:  # fmt: skip
    """Run one case. kernel: another than the main one; changed: parameters of it to falsify; order: another than the
    ascending one of the blocks of an ordered call. Raises PtxError."""
    call, steps = Memory(case, trio.main.variant), 0
    if (blocks := call.blocks(trio.main) * grad(case).splits) and case.queries.seqlen and case.keys.seqlen:
        call.run(trio.preprocess, BWD_PREPROCESS, call.blocks(trio.preprocess))
        steps = call.run(trio.main, BWD, blocks, kernel, changed, order or call.order(blocks))
        call.run(trio.postprocess, BWD_POSTPROCESS, call.blocks(trio.postprocess))
    else:
        call.zero()
    dq, stray = call.dq.result()
    dk, stray_k = call.keys_result("dk")
    dv, stray_v = call.keys_result("dv")
    dalibi, stray_alibi = call.dalibi_result()
    dsink = call.dsink_result() if steps else None
    accum = call.device.get(call.dq_accum, np.float32).reshape(case.heads_q, -1).copy()
    turns = call.device.get(call.semaphores, np.int32).copy() if grad(case).deterministic else np.zeros(0, np.int32)
    return Outcome(
        decode(dq, call.variant.dtype), dk, dv, dsink, dalibi,
        stray + stray_k + stray_v + stray_alibi, accum, turns, steps,
    )  # fmt: skip


def problems(outcome: Outcome, case: Call, variant: Variant, rms_rows: int = 0) -> list[str]:
    """What is wrong with it; empty if nothing is."""
    right = expected(case, variant)
    found = [f"{outcome.stray} stray bytes"] if outcome.stray else []
    for name in ("dq", "dk", "dv"):
        why = yardstick(getattr(outcome, name), getattr(right, name), rms_rows=rms_rows)
        found += [f"{name}: {each}" for each in why]
    for name in ("dsink", "dalibi"):
        if (got := getattr(outcome, name)) is not None:
            wanted, size = getattr(right, name), getattr(right, f"{name}_size")
            if (bad := ~(np.abs(got - wanted) <= ERROR * size)).any():
                found.append(f"{name}: {got[bad]} is not {wanted[bad]}, of size {size[bad]}")
    if outcome.dq[~sees(case)].any():
        found.append("dq of a row that sees no key is not 0")
    return found


def sees(case: Call) -> Array:
    """Which queries see a key, those of all entries end to end."""
    entries = zip(case.queries.entries, case.keys.entries, strict=True)
    each = (visible(q.stop - q.start, k.stop - k.start, case.window).any(1) for (_, q), (_, k) in entries)
    return np.concatenate(list(each))
