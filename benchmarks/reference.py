"""Attention in float64 on small problems: what every kernel is checked against before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import measure
from benchmarks.cases import Case, dense, varlen

MAX_ERROR = {"bf16": 1e-2, "fp16": 2e-3}  # relative, of a norm: P rounded to the dtype costs about a third of it
MAX_LSE_ERROR = 1e-4
# run(q, k, v, o, lse, case, cu_seqlens): computes the case into o and lse. cu_seqlens: of queries and keys, or None.
Run = Callable[[Any, Any, Any, Any, Any, Case, tuple[Any, Any] | None], object]


def attention(q: Any, k: Any, v: Any, causal: bool, window: int | None = None) -> tuple[Any, Any]:
    """Attention and LSE; masks align bottom-right, an empty row gives 0 and −inf. window: keys left of the diagonal."""
    import torch

    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    seqlen_q, seqlen_k = scores.shape[2:]
    allowed = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if causal or window is not None:
        allowed = allowed.tril(seqlen_k - seqlen_q)
    if window is not None:
        allowed = allowed.triu(seqlen_k - seqlen_q - window)
    scores = scores.masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), lse


def packed(q: Any, k: Any, v: Any, case: Case) -> tuple[Any, Any]:
    """`attention` over the sequences of a varlen case: (tokens, heads, head_dim_v) and (heads, tokens)."""
    import torch

    assert case.lengths is not None
    outs, sums, start = [], [], 0
    for length in case.lengths:
        part_q, part_k, part_v = (x[None, start : start + length] for x in (q, k, v))
        out, lse = attention(part_q, part_k, part_v, case.causal, case.left)
        outs.append(out[0])
        sums.append(lse[0])
        start += length
    return torch.cat(outs), torch.cat(sums, 1)


def checks(dims: tuple[int, int]) -> tuple[Case, ...]:
    """Ragged on both sides, grouped, longer and shorter queries, a window, packed sequences and an empty one."""
    d, dv = dims
    return (
        dense("check", 200, False, 4, 2, d, 2, 333, dv),
        dense("check", 200, True, 4, 2, d, 2, 333, dv),
        dense("check", 385, True, 7, 1, d, 1, 129, dv),
        dense("check", 1, True, 4, 2, d, 2, 1000, dv),
        dense("check", 1024, True, 4, 1, d, 1, None, dv),
        dense("check", 700, False, 4, 2, d, 1, None, dv, window=150),
        varlen("check", (4, 1, d), (5, 0, 300, 129), True, dv),
    )


def errors(run: Run, dims: tuple[int, int], dtype: str) -> list[tuple[str, float, float]]:
    """(case, relative error of the output, largest relative error of the LSE) of every check."""
    return [(case.name, *error(run, case, dtype)) for case in checks(dims)]


def error(run: Run, case: Case, dtype: str) -> tuple[float, float]:
    """Relative error of the output and largest relative error of the LSE on one small problem."""
    import torch

    q, k, v = measure.make_inputs(case, dtype, rotated=1)[0]
    o, lse = outputs(q, v, case)
    cu = None if case.lengths is None else (measure.cu_seqlens(case.lengths),) * 2
    o.fill_(float("nan"))
    lse.fill_(float("nan"))
    run(q, k, v, o, lse, case, cu)
    measure.synchronize()
    expected, expected_lse = (
        attention(q, k, v, case.causal, case.left) if case.lengths is None else packed(q, k, v, case)
    )
    rows = torch.isfinite(expected_lse)
    empty_differ = not torch.equal(torch.isneginf(lse), ~rows)
    lse_error = ((lse - expected_lse)[rows].abs() / expected_lse[rows].abs().clamp(min=1)).max().item()
    return measure.relative_error(o, expected), float("inf") if empty_differ else lse_error


def good(found: list[tuple[str, float, float]], dtype: str) -> bool:
    return all(out <= MAX_ERROR[dtype] and lse <= MAX_LSE_ERROR for _, out, lse in found)


def outputs(q: Any, v: Any, case: Case) -> tuple[Any, Any]:
    """Where a call's output and LSE go, uninitialised."""
    import torch

    shape = (q.shape[0], q.shape[2], q.shape[1]) if case.lengths is None else (q.shape[1], q.shape[0])
    o = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device, dtype=q.dtype)
    return o, torch.empty(shape, device=q.device, dtype=torch.float32)
