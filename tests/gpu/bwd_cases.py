"""One call and its gradients: from a case, which is data, to what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from registry.contract import Variant
from tests.gpu import bwd_yardstick
from tests.gpu.bwd_yardstick import Gradient
from tests.gpu.cases import Call, Case, Dims, Lengths, Side, shape_of
from tests.gpu.cases import varlen as varlen_case
from tests.gpu.inputs import DTYPES

# What the ops around `bwd`, which serve all, are checked with: the pairs that the table of `bwd` has.
ALL_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BwdCase:
    """forward: the call, whose sink and slopes are differentiated too. dlse: whether there is a gradient of the LSE."""

    forward: Case
    dlse: bool = False
    deterministic: bool = False

    def on(self, device: Any) -> BwdCall:
        return BwdCall(self, device)


def dims_of(key: str, turn: int) -> Dims:
    """The head dims of call number `turn`: a `bwd` variant's own; of the others, those of the table in turn."""
    variant = Variant.parse(key)
    return (variant.head_dim, variant.head_dim_v) if variant.op == "bwd" else ALL_DIMS[turn % len(ALL_DIMS)]


def dense(
    key: str,
    batch: int | None,
    heads: tuple[int, int],
    seqlens: tuple[int, int],
    dims: Dims,
    *,
    dlse: bool = False,
    deterministic: bool = False,
    **more: Any,
) -> BwdCase:
    """A case without lengths. more: fields of the forward's case."""
    return BwdCase(Case(shape_of(key, batch, heads, *seqlens, dims), **more), dlse, deterministic)


def varlen(
    key: str,
    heads: tuple[int, int],
    lengths: Lengths,
    dims: Dims,
    *,
    dlse: bool = False,
    deterministic: bool = False,
    **more: Any,
) -> BwdCase:
    return BwdCase(varlen_case(key, heads, lengths, dims, **more), dlse, deterministic)


class BwdCall:
    """A case made real on a device. `inputs`: what is differentiated, by name: q, k, v, sink, slopes.

    dout, dlse: gradients of the outputs as the device gets them, NaN where no row counts.
    """

    def __init__(self, case: BwdCase, device: Any):
        self.case, self.call = case, Call(case.forward, device)
        shape, side = case.forward.shape, self.call.q
        generator = torch.Generator(device).manual_seed(case.forward.seed + 1_000_003)
        drawn = torch.randn(shape.sizes()["o"], generator=generator, device=device).to(DTYPES[shape.dtype])
        self.dout, self._dout = side.scatter(drawn), _where_counted(drawn, side)
        self.dlse = self._dlse = None
        if case.dlse:
            # Of a sum of head_dim_v products, which it is taken off, about the size.
            rows = 4 * torch.randn((*drawn.shape[:3], 1), generator=generator, device=device)
            self._dlse = _where_counted(rows, side)[..., 0].transpose(1, 2)
            self.dlse = side.scatter(rows)[..., 0].transpose(-1, -2)
        self.inputs = {name: self.call.tensors[name] for name in "qkv"}
        self.inputs |= {"sink": self.call.sink} if self.call.sink is not None else {}
        self.inputs |= {"slopes": self.call.slopes} if self.call.slopes is not None else {}

    def leaves(self) -> Gradients:
        """The inputs, each to be differentiated."""
        return {name: x.detach().requires_grad_() for name, x in self.inputs.items()}

    def forward(self, dut: Any, leaves: Gradients, **more: Any) -> tuple[torch.Tensor, ...]:
        """The outputs that have gradients: (out,), or (out, lse)."""
        options = {name: x for name, x in self.call.options.items() if name not in ("sink", "alibi_slopes")}
        options |= {"alibi_slopes" if name == "slopes" else name: x for name, x in leaves.items()}
        function = dut.attn if self.case.forward.lengths is None else dut.varlen
        options |= {"deterministic": self.case.deterministic, "return_lse": self.case.dlse}
        outputs = function(**{**options, **more})
        return outputs if self.case.dlse else (outputs,)

    def backward(self, outputs: tuple[torch.Tensor, ...], leaves: Gradients, **more: Any) -> Gradients:
        given = (self.dout,) if self.dlse is None else (self.dout, self.dlse)
        found = torch.autograd.grad(outputs, tuple(leaves.values()), given, **more)
        return dict(zip(leaves, found, strict=True))

    def __call__(self, dut: Any, **more: Any) -> tuple[Gradients]:
        """What the device makes of it, with NaN in what the allocator hands out."""
        leaves = self.leaves()
        outputs = self.forward(dut, leaves, **more)
        dut.poison()
        return (self.backward(outputs, leaves),)

    @cached_property
    def expected(self) -> dict[str, Gradient]:
        return bwd_yardstick.expected(**self.call.clean, dout=self._dout, rule=self.call.rule(), dlse=self._dlse)

    def problems(self, got: Gradients) -> list[str]:
        """What is wrong with the gradients, in words."""
        found = []
        for name, right in self.expected.items():
            d, of = got[name], self.inputs[name]
            if d.dtype != of.dtype or d.shape != of.shape:
                found.append(f"d{name} is {d.dtype} {tuple(d.shape)}, not {of.dtype} {tuple(of.shape)}")
            elif name in ("sink", "slopes"):
                found += bwd_yardstick.problems(name, d.reshape(-1, 1, d.shape[-1], 1), right)
            else:
                side = self.call.q if name == "q" else self.call.k
                found += bwd_yardstick.problems(name, side.gather(d), right)
                found += [] if _zero_elsewhere(d, side) else [f"d{name} is not 0 in rows that do not count"]
        return found


def _where_counted(x: torch.Tensor, side: Side) -> torch.Tensor:
    """A reference's array (batch, seqlen, …), 0 in rows that do not count."""
    found = torch.zeros_like(x)
    found[side.reference] = x[side.reference]
    return found


def _zero_elsewhere(d: torch.Tensor, side: Side) -> bool:
    rest = torch.ones(d.shape[: len(side.device)], dtype=torch.bool, device=d.device)
    rest[side.device] = False
    return bool((d[rest] == 0).all())


def same(a: Gradients, b: Gradients) -> torch.Tensor:
    """A bool tensor, not read here: whether all gradients have the same bits."""
    return torch.stack([(_bits(a[name]) == _bits(b[name])).all() for name in a]).all()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def reseeded(case: BwdCase, seed: int) -> BwdCase:
    return replace(case, forward=replace(case.forward, seed=seed))
