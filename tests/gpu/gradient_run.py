"""A call and its gradients through `torch.autograd.grad`, made real."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from tests.gpu import bwd_yardstick
from tests.gpu.bwd_yardstick import Gradient
from tests.gpu.inputs import DTYPES
from tests.gpu.run import Run, Side
from tests.support.call import Call, Grad

Gradients = dict[str, torch.Tensor]


class GradientRun(Run):
    """`inputs`: what is differentiated, by name: q, k, v, and the sink and slopes that there are.

    dout, dlse: gradients of the outputs as the device gets them, NaN where no row counts.
    """

    def __init__(self, call: Call, device: Any):
        super().__init__(call, device)
        assert call.grad is not None
        self.grad: Grad = call.grad
        generator = torch.Generator(device).manual_seed(call.seed + 1_000_003)
        drawn = torch.randn(call.sizes["o"], generator=generator, device=device).to(DTYPES[call.dtype])
        self.dout, self._dout = self.q.scatter(drawn), _where_counted(drawn, self.q)
        self.dlse = self._dlse = None
        if self.grad.dlse:
            # Of a sum of head_dim_v products, which it is taken off, about the size.
            rows = 4 * torch.randn((*drawn.shape[:3], 1), generator=generator, device=device)
            self._dlse = _where_counted(rows, self.q)[..., 0].transpose(1, 2)
            self.dlse = self.q.scatter(rows)[..., 0].transpose(-1, -2)
        self.inputs = {name: self.tensors[name] for name in "qkv"}
        self.inputs |= {"sink": self.sink} if self.sink is not None else {}
        self.inputs |= {"slopes": self.slopes} if self.slopes is not None else {}

    def leaves(self) -> Gradients:
        """The inputs, each to be differentiated."""
        return {name: x.detach().requires_grad_() for name, x in self.inputs.items()}

    def forward(self, dut: Any, leaves: Gradients, **more: Any) -> tuple[torch.Tensor, ...]:
        """The outputs that have gradients: (out,), or (out, lse)."""
        options = {name: x for name, x in self.options.items() if name not in ("sink", "alibi_slopes")}
        options |= {"alibi_slopes" if name == "slopes" else name: x for name, x in leaves.items()}
        options |= {"deterministic": self.grad.deterministic, "return_lse": self.grad.dlse}
        outputs = self.function(dut)(**{**options, **more})
        return outputs if self.grad.dlse else (outputs,)

    def backward(self, outputs: tuple[torch.Tensor, ...], leaves: Gradients, **more: Any) -> Gradients:
        given = (self.dout,) if self.dlse is None else (self.dout, self.dlse)
        return gradients(outputs, leaves, given, **more)

    def __call__(self, dut: Any, **more: Any) -> tuple[Gradients]:
        """What the device makes of it, with NaN in what the allocator hands out."""
        leaves = self.leaves()
        outputs = self.forward(dut, leaves, **more)
        dut.poison()
        return (self.backward(outputs, leaves),)

    @cached_property
    def expected(self) -> dict[str, Gradient]:
        return bwd_yardstick.expected(**self.clean, dout=self._dout, rule=self.rule(), dlse=self._dlse)

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
                side = self.q if name == "q" else self.k
                found += bwd_yardstick.problems(name, side.gather(d), right)
                if not bool((side.others(d) == 0).all()):
                    found.append(f"d{name} is not 0 in rows that do not count")
        return found

    # ---- many launches ----

    def read(self) -> list[torch.Tensor]:
        return super().read() + [x._base for x in (self.dout, self.dlse) if x is not None]

    def begin(self, dut: Any) -> Any:
        leaves = self.leaves()
        return self.forward(dut, leaves), leaves

    def end(self, begun: Any) -> tuple[Gradients]:
        return (self.backward(*begun),)

    @staticmethod
    def written(*results: Any) -> list[torch.Tensor]:
        (found,) = results
        return list(found.values())

    @staticmethod
    def alike(one: tuple[Gradients], other: tuple[Gradients]) -> bool:
        return bool(same_bits(*one, *other))


def gradients(outputs: Any, leaves: Gradients, given: Any, **more: Any) -> Gradients:
    """Of the leaves, by name."""
    return dict(zip(leaves, torch.autograd.grad(outputs, tuple(leaves.values()), given, **more), strict=True))


def _where_counted(x: torch.Tensor, side: Side) -> torch.Tensor:
    """A reference's array (batch, seqlen, …), 0 in rows that do not count."""
    found = torch.zeros_like(x)
    found[side.reference] = x[side.reference]
    return found


def same_bits(a: Gradients, b: Gradients) -> torch.Tensor:
    """A bool tensor, not read here: whether all gradients have the same bits."""
    return torch.stack([(_bits(a[name]) == _bits(b[name])).all() for name in a]).all()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
