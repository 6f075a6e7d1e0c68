"""A call made real on a device: its inputs, what the device makes of them, and what is wrong with that.

Whatever a call asks for, its reference is computed on whole, clean arrays of shape (batch, seqlen, heads, head_dim).
The device gets the rows that count, scattered into arrays that are NaN everywhere else.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch

from tests.gpu.inputs import DTYPES, FAR, integers, padded, sinks, slopes, untouched, values
from tests.gpu.yardstick import Expected, Rule, expected, problems
from tests.support.call import CAUSAL, OPEN, Call, Numbers, Tokens


class Side:
    """Where the rows of one side's entries lie, in the device's array and in the reference's (batch, seqlen, …).

    cu_seqlens, seqused, leftpad: int32 tensors, or None where the call has none. lengths: int64 (batch,), rows of each
    entry that count; padding: how many lie in front of them; ends: where they end, from the entry's first row on.
    """

    def __init__(
        self, tokens: Tokens, seqlen: int, device: Any, cu_seqlens: Numbers | None, seqused: Numbers | None,
        leftpad: Numbers | None = None,
    ):  # fmt: skip
        """seqlen: of the reference's array."""
        self.tokens, self.seqlen, self.batch = tokens, seqlen, len(tokens.entries)
        self.lengths, self.padding, first = (
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (
                [part.stop - part.start for _, part in tokens.entries],
                tokens.paddings,
                [part.start for _, part in tokens.entries],
            )
        )
        self.ends = self.padding + self.lengths
        self.cu_seqlens, self.seqused, self.leftpad = (
            None if numbers is None else integers(numbers, device) for numbers in (cu_seqlens, seqused, leftpad)
        )
        entry = torch.repeat_interleave(torch.arange(self.batch, device=device), self.lengths)
        row = torch.arange(entry.numel(), device=device) - (self.lengths.cumsum(0) - self.lengths)[entry]
        self.reference = (entry, row)
        self.device = (first[entry] + row,) if tokens.is_packed else (entry, first[entry] + row)

    def empty(self, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """The device's array, all NaN, amid NaN."""
        rows = (self.tokens.seqlen,) if self.tokens.is_packed else (self.batch, self.seqlen)
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

    def others(self, array: torch.Tensor) -> torch.Tensor:
        """The rows of a device's array that do not count."""
        rest = torch.ones(array.shape[: len(self.device)], dtype=torch.bool, device=array.device)
        rest[self.device] = False
        return array[rest]


class Run:
    """A call of the forward made real: `tensors` q, k, v and out, `options` the keywords of `attn` or `varlen`."""

    def __init__(self, call: Call, device: Any):
        self.call = call
        longest_q, longest_k = call.longest
        self.q = Side(call.queries, longest_q, device, call.cu_seqlens_q, call.seqused_q)
        self.k = Side(call.keys, longest_k, device, call.cu_seqlens_k, call.seqused_k, call.leftpad_k)
        self.clean = values(call, device)
        self.sink = self.slopes = None
        if call.sink:
            dtype = torch.float32 if call.sink == "fp32" else DTYPES[call.dtype]
            self.sink = sinks(call.heads_q, self._typical_score(), dtype, device, call.seed)
        if call.alibi:
            size = (call.heads_q,) if call.alibi == "heads" else (call.batch, call.heads_q)
            self.slopes = slopes(size, device, call.seed)
        self.tensors = {name: (self.q if name == "q" else self.k).scatter(x) for name, x in self.clean.items()}
        self.tensors["out"] = self.q.empty(call.heads_q, call.head_dim_v, DTYPES[call.dtype])

    @property
    def _scale(self) -> float:
        return self.call.head_dim**-0.5 if self.call.softmax_scale is None else self.call.softmax_scale

    def _typical_score(self) -> float:
        """About what a sink must be to compete with the keys."""
        score = -FAR * self._scale * self.call.head_dim**0.5 if self.call.family == "far_below" else 0.0
        cap = self.call.softcap
        return cap * math.tanh(score / cap) if cap else score

    @cached_property
    def options(self) -> dict[str, Any]:
        call = self.call
        asked = {"softmax_scale": call.softmax_scale, "softcap": call.softcap or None, "sink": self.sink}
        asked |= {"alibi_slopes": self.slopes, "causal": True if call.window == CAUSAL else None}
        asked |= {"window": None if call.window in (OPEN, CAUSAL) else call.window}
        for side, name in ((self.q, "q"), (self.k, "k")):
            asked |= {f"cu_seqlens_{name}": side.cu_seqlens, f"seqused_{name}": side.seqused}
            if side.tokens.is_packed and call.max_seqlen:
                asked[f"max_seqlen_{name}"] = side.seqlen
        asked["leftpad_k"] = self.k.leftpad
        return {name: value for name, value in asked.items() if value is not None}

    def given(self) -> dict[str, Any]:
        """Every argument by the name that the function has for it."""
        return {**self.tensors, **self.options, "return_lse": True}

    def function(self, dut: Any) -> Any:
        return dut.varlen if self.call.is_varlen else dut.attn

    def __call__(self, dut: Any, **more: Any) -> Any:
        """What the device returns: (out, lse)."""
        return self.function(dut)(**{**self.given(), **more})

    @cached_property
    def expected(self) -> Any:
        return expected(**self.clean, rule=self.rule())

    def rule(self) -> Rule:
        call = self.call
        used = {"lengths_q": self.q.lengths, "lengths_k": self.k.lengths} if call.is_varlen else {}
        return Rule(self._scale, call.window, call.softcap, self.sink, self.slopes, **used)

    def problems(self, out: torch.Tensor, lse: torch.Tensor) -> list[str]:
        """What is wrong with an output and its LSE, in words."""
        call, tokens = self.call, self.q.tokens
        size = (call.heads_q, tokens.seqlen) if tokens.is_packed else (call.batch, call.heads_q, self.q.seqlen)
        if lse.dtype != torch.float32 or lse.shape != size:
            return [f"lse is {lse.dtype} {tuple(lse.shape)}, not float32 {size}"]
        by_row = lse.transpose(-1, -2)
        found = judged(self.q, out, by_row, self.expected)
        if not bool(self.q.others(by_row).isnan().all()):
            found.append("an LSE of a row that does not count was written")
        if out._base is not None and not untouched(out, self.q.device):
            found.append("something beside the output was written")
        return found

    # ---- many launches ----

    def read(self) -> list[torch.Tensor]:
        """All that a call reads, each array with what surrounds it."""
        read = [x for name, x in self.tensors.items() if name != "out"]
        read += [self.sink, self.slopes, self.q.cu_seqlens, self.k.cu_seqlens, self.q.seqused, self.k.seqused]
        read.append(self.k.leftpad)
        return [x._base for x in read if x is not None]

    def begin(self, dut: Any) -> Any:
        """Start a call into arrays of its own; `end` has its results."""
        return self(dut, out=None)

    def end(self, begun: Any) -> Any:
        return begun

    @staticmethod
    def written(*results: Any) -> list[torch.Tensor]:
        """The arrays that hold the results of a call."""
        out, lse = results
        return [out._base, lse]

    @staticmethod
    def alike(one: Any, other: Any) -> bool:
        """Whether two results have the same bits."""
        return all(map(same, one, other))


def judged(side: Side, out: torch.Tensor, by_row: torch.Tensor, right: Expected) -> list[str]:
    """What is wrong with the rows that count. by_row: the LSE, its heads last."""
    return problems(side.gather(out), side.gather(by_row).transpose(1, 2), right)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit where neither is NaN, and NaN in the same places: rows that do not count hold NaN in both."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
