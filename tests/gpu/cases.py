"""One call of the forward: from a case, which is data, to its inputs and to what is wrong with its outputs.

Whatever a case asks for, its reference is computed on whole, clean arrays of shape (batch, seqlen, heads, head_dim).
The device gets the rows that count, scattered into arrays that are NaN everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.inputs import DTYPES, FAR, Shape, integers, padded, sinks, slopes, untouched, values
from tests.gpu.yardstick import MIN_ROWS, Expected, Rule, Window, expected, problems

OPEN: Window = (None, None)
CAUSAL: Window = (None, 0)
Dims = tuple[int, int]  # head_dim, head_dim_v


@dataclass(frozen=True)
class Lengths:
    """How long the entries of a varlen call are.

    q, k: rows that the array has for each entry; all the same if it is not packed. used_q, used_k: rows that count,
    given to the device as seqused; None: all, and seqused is not given. packed_q, packed_k: (tokens, heads, head_dim)
    with cu_seqlens. spare: rows of a packed array behind its last entry. told: whether the call states max_seqlen.
    leftpad: of k, as the device is told: it is cut to the entry's keys; None: not given.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    packed_q: bool = True
    packed_k: bool = True
    spare: int = 0
    told: bool = True
    leftpad: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """sink: '', 'fp32' or 'low' (q's dtype). alibi: '', 'heads' or 'batch', the slopes' leading dimension."""

    shape: Shape
    family: str = "normal"
    seed: int = 0
    window: Window = OPEN
    softmax_scale: float | None = None
    softcap: float = 0.0
    sink: str = ""
    alibi: str = ""
    lengths: Lengths | None = None

    def on(self, device: Any) -> Call:
        return Call(self, device)


def shape_of(
    key: str, batch: int | None, heads: tuple[int, int], seqlen_q: int, seqlen_k: int, dims: Dims | None = None
) -> Shape:
    """The shape of a dense call of a variant.

    heads: (heads_q, heads_kv). batch None: one large enough for the RMS of few queries to mean something. dims: by
    default the variant's.
    """
    variant = Variant.parse(key)
    if batch is None:
        batch = max(1 if seqlen_q * seqlen_k > 2**21 else 2, -(-MIN_ROWS // (heads[0] * max(seqlen_q, 1))))
    dims = dims or (variant.head_dim, variant.head_dim_v)
    return Shape(batch, *heads, seqlen_q, seqlen_k, *dims, variant.dtype)


def varlen(key: str, heads: tuple[int, int], lengths: Lengths, dims: Dims | None = None, **more: Any) -> Case:
    """The case of a variant's call with these lengths. more: the case's other fields."""
    longest = (max(side, default=0) for side in (lengths.q, lengths.k))
    return Case(shape_of(key, len(lengths.q), heads, *longest, dims), lengths=lengths, **more)


class Side:
    """Where the rows of one side's entries lie, in the device's array and in the reference's (batch, seqlen, …).

    cu_seqlens, seqused, leftpad: int32 tensors, or None where the call has none. ends: int64 (batch,), where each
    entry's rows end; padding: how many before do not count; lengths: the others, which the reference has alone.
    """

    def __init__(
        self, rooms: Sequence[int], used: Sequence[int] | None, packed: bool, spare: int, seqlen: int, device: Any,
        leftpad: Sequence[int] | None = None,
    ):  # fmt: skip
        self.packed, self.batch, self.seqlen = packed, len(rooms), seqlen
        self.ends = torch.tensor(rooms if used is None else used, dtype=torch.int64, device=device)
        given = torch.tensor(leftpad or (0,) * len(rooms), dtype=torch.int64, device=device)
        self.padding = torch.minimum(given.clamp(min=0), self.ends)
        self.leftpad = None if leftpad is None else integers(leftpad, device)
        counts = self.ends - self.padding
        starts = [0]
        for room in rooms:
            starts.append(starts[-1] + room)
        self.tokens = starts[-1] + spare
        self.lengths = counts
        self.cu_seqlens = integers(starts, device) if packed else None
        self.seqused = None if used is None else integers(used, device)
        entry = torch.repeat_interleave(torch.arange(self.batch, device=device), counts)
        row = torch.arange(entry.numel(), device=device) - (counts.cumsum(0) - counts)[entry]
        self.reference = (entry, row)
        first = torch.tensor(starts[:-1], dtype=torch.int64, device=device) * packed + self.padding
        self.device = (first[entry] + row,) if packed else (entry, first[entry] + row)

    def empty(self, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """The device's array, all NaN, amid NaN."""
        rows = (self.tokens,) if self.packed else (self.batch, self.seqlen)
        return padded((*rows, heads, dim), dtype, self.lengths.device)

    def scatter(self, source: torch.Tensor) -> torch.Tensor:
        """The rows that count of a reference's array, in a device's array that is NaN elsewhere."""
        target = self.empty(*source.shape[2:], source.dtype)
        target[self.device] = source[self.reference]
        return target

    def gather(self, array: torch.Tensor) -> torch.Tensor:
        """The reference's array of a device's array; NaN where no row counts."""
        rest = array.shape[len(self.device) :]
        target = array.new_full((self.batch, self.seqlen, *rest), math.nan)
        target[self.reference] = array[self.device]
        return target


class Call:
    """A case made real on a device: `tensors` q, k, v and out, `options` the keywords of `attn` or `varlen`."""

    def __init__(self, case: Case, device: Any):
        self.case, self.shape = case, case.shape
        shape, lengths = case.shape, case.lengths
        if lengths is None:
            whole = ((seqlen,) * shape.batch for seqlen in (shape.seqlen_q, shape.seqlen_k))
            lengths = Lengths(*whole, packed_q=False, packed_k=False)
        self.q = Side(lengths.q, lengths.used_q, lengths.packed_q, lengths.spare, shape.seqlen_q, device)
        self.k = Side(
            lengths.k, lengths.used_k, lengths.packed_k, lengths.spare, shape.seqlen_k, device, lengths.leftpad
        )
        self.clean = values(shape, case.family, device, case.seed)
        self.sink = self.slopes = None
        if case.sink:
            dtype = torch.float32 if case.sink == "fp32" else DTYPES[shape.dtype]
            self.sink = sinks(shape.heads_q, self._typical_score(), dtype, device, case.seed)
        if case.alibi:
            size = (shape.heads_q,) if case.alibi == "heads" else (shape.batch, shape.heads_q)
            self.slopes = slopes(size, device, case.seed)
        self.tensors = {name: (self.q if name == "q" else self.k).scatter(x) for name, x in self.clean.items()}
        self.tensors["out"] = self.q.empty(shape.heads_q, shape.head_dim_v, DTYPES[shape.dtype])

    @property
    def _scale(self) -> float:
        return self.shape.head_dim**-0.5 if self.case.softmax_scale is None else self.case.softmax_scale

    def _typical_score(self) -> float:
        """About what a sink must be to compete with the keys."""
        score = -FAR * self._scale * self.shape.head_dim**0.5 if self.case.family == "far_below" else 0.0
        cap = self.case.softcap
        return cap * math.tanh(score / cap) if cap else score

    @cached_property
    def options(self) -> dict[str, Any]:
        case = self.case
        asked = {"softmax_scale": case.softmax_scale, "softcap": case.softcap or None, "sink": self.sink}
        asked |= {"alibi_slopes": self.slopes, "causal": True if case.window == CAUSAL else None}
        asked |= {"window": None if case.window in (OPEN, CAUSAL) else case.window}
        for side, name in ((self.q, "q"), (self.k, "k")):
            asked |= {f"cu_seqlens_{name}": side.cu_seqlens, f"seqused_{name}": side.seqused}
            if side.packed and case.lengths is not None and case.lengths.told:
                asked[f"max_seqlen_{name}"] = side.seqlen
        asked["leftpad_k"] = self.k.leftpad
        return {name: value for name, value in asked.items() if value is not None}

    def __call__(self, dut: Any, **more: Any) -> Any:
        """What the device returns: (out, lse)."""
        function = dut.attn if self.case.lengths is None else dut.varlen
        return function(**{**self.tensors, **self.options, "return_lse": True, **more})

    @cached_property
    def expected(self) -> Expected:
        return expected(**self.clean, rule=self.rule())

    def rule(self) -> Rule:
        case = self.case
        used = {} if case.lengths is None else {"lengths_q": self.q.lengths, "lengths_k": self.k.lengths}
        return Rule(self._scale, case.window, case.softcap, self.sink, self.slopes, **used)

    def problems(self, out: torch.Tensor, lse: torch.Tensor) -> list[str]:
        """What is wrong with an output and its LSE, in words."""
        shape = self.shape
        packed = (shape.heads_q, self.q.tokens) if self.q.packed else (shape.batch, shape.heads_q, shape.seqlen_q)
        if lse.dtype != torch.float32 or lse.shape != packed:
            return [f"lse is {lse.dtype} {tuple(lse.shape)}, not float32 {packed}"]
        by_row = lse.transpose(-1, -2)
        found = problems(self.q.gather(out), self.q.gather(by_row).transpose(1, 2), self.expected)
        rest = torch.ones(by_row.shape, dtype=torch.bool, device=lse.device)
        rest[self.q.device] = False
        if not bool(by_row[rest].isnan().all()):
            found.append("an LSE of a row that does not count was written")
        if out._base is not None and not untouched(out, self.q.device):
            found.append("something beside the output was written")
        return found


def default_scale(tensors: Mapping[str, torch.Tensor]) -> float:
    return tensors["q"].shape[-1] ** -0.5
