"""The few small backwards that a sanitizer watches (see `small_calls`)."""

from __future__ import annotations

from typing import Any

import torch

from registry.contract import Variant
from tests.gpu.calls import dense, dims_of, varlen
from tests.gpu.dut import Dut
from tests.gpu.harness import made
from tests.gpu.inputs import DTYPES, astray
from tests.gpu.paged_small_calls import tight
from tests.support.call import CAUSAL, Call, lengths


def calls(key: str) -> list[Call]:
    """Several ragged tiles each way, so that every buffer is used again; in order and not; groups in one block and,
    with few keys, in several."""
    modified: dict[str, Any] = {"softcap": 15.0, "alibi": "batch", "dlse": True}
    ragged = lengths((70, 0, 1, 140), (150, 40, 200, 9), (66, 0, 1, 140), (150, 17, 131, 0), spare=5)
    dense_q = lengths((19, 19), (200, 33), (19, 3), packed_q=False)
    padded = lengths((70, 1, 9), (200, 40, 9), None, (170, 40, 7), leftpad_k=(75, -3, 9))
    full = [dims_of(key, turn) for turn in range(5)]
    smaller = [(dim - 8, dim_v - 8) for dim, dim_v in full]
    return [
        dense(key, 1, (2, 2), (150, 200), full[0]),
        dense(key, 1, (2, 1), (150, 200), smaller[1], window=CAUSAL, sink="fp32", deterministic=True, **modified),
        dense(key, 1, (6, 1), (70, 40), full[2], window=(3, 5), dlse=True),
        varlen(key, (3, 1), ragged, smaller[3], window=(33, 7), sink="low", **modified),
        varlen(key, (2, 1), ragged, full[4], window=CAUSAL, alibi="heads", deterministic=True),
        varlen(key, (1, 1), dense_q, full[0], window=CAUSAL),
        varlen(key, (2, 1), padded, smaller[2], alibi="batch"),
    ]


def launch(dut: Dut, key: str, device: str = "cuda") -> None:
    """Every small call, and those whose lengths point far outside their arrays: they only must end."""
    for call in calls(key):
        run = made(call, "cpu")
        run.inputs = {name: tight(x, device) for name, x in run.inputs.items()}
        run.dout = tight(run.dout, device)
        run.dlse = None if run.dlse is None else tight(run.dlse, device)
        run.options.update({name: tight(x, device) for name, x in run.options.items() if torch.is_tensor(x)})
        run(dut)
    for deterministic in (False, True):
        given = astray(dims_of(key, 2), DTYPES[Variant.parse(key).dtype], device)
        leaves = {name: given.pop(name).requires_grad_() for name in "qkv"}
        out = dut.varlen(**leaves, **given, causal=True, deterministic=deterministic)
        torch.autograd.grad(out, tuple(leaves.values()), torch.ones_like(out))
