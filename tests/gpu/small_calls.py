"""The few small calls that a sanitizer watches: between them they take every path through a variant's kernel."""

from __future__ import annotations

from typing import Any

import torch

from registry.contract import Variant
from tests.gpu import bwd_small_calls, paged_small_calls
from tests.gpu.calls import dense, varlen
from tests.gpu.dut import Dut
from tests.gpu.harness import made
from tests.gpu.inputs import DTYPES, astray
from tests.gpu.paged_small_calls import tight
from tests.support.call import CAUSAL, Call, lengths


def calls(key: str) -> list[Call]:
    """Several ragged tiles each way, so that every buffer is used again; groups of more than one head come packed."""
    variant = Variant.parse(key)
    smaller = (variant.head_dim - 8, variant.head_dim_v - 8)
    modified: dict[str, Any] = {"softcap": 15.0, "alibi": "batch"}
    ragged = lengths((70, 0, 1, 40), (150, 40, 200, 9), (66, 0, 1, 40), (150, 17, 131, 0), spare=5)
    dense_q = lengths((19, 19), (200, 33), (19, 3), packed_q=False)
    padded = lengths((70, 1, 9), (333, 40, 9), None, (300, 40, 7), leftpad_k=(140, -3, 9))
    return [
        dense(key, 1, (2, 2), (150, 333)),
        dense(key, 1, (2, 1), (70, 200), smaller, window=CAUSAL, sink="fp32", **modified),
        varlen(key, (3, 1), ragged, smaller, window=(33, 7), sink="low", **modified),
        varlen(key, (1, 1), dense_q, window=CAUSAL),
        varlen(key, (2, 1), padded, window=CAUSAL, alibi="heads"),
    ]


def launch(dut: Dut, key: str, device: str = "cuda") -> None:
    """Every small call, and one whose lengths point far outside its arrays: no check of values, they only must end.

    Each tensor is an allocation of its own, just as large as it must be: what lies beyond is nobody's.
    """
    op = Variant.parse(key).op
    if op == "fwd":
        _forward(dut, key, device)
    elif op.startswith("bwd"):
        bwd_small_calls.launch(dut, key, device)
    else:
        paged_small_calls.launch(dut, key, device)
    if device == "cuda":
        torch.cuda.synchronize()


def _forward(dut: Dut, key: str, device: str) -> None:
    for call in calls(key):
        run = made(call, "cpu")
        run(dut, **{name: tight(x, device) for name, x in run.given().items() if torch.is_tensor(x)})
    variant = Variant.parse(key)
    given = astray((variant.head_dim, variant.head_dim_v), DTYPES[variant.dtype], device)
    dut.varlen(**given, causal=True, return_lse=True)
