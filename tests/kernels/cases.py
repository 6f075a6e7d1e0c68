"""Which variants are tested, and calls of which they must serve every one."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest

from kernels import dispatch
from registry.contract import Variant
from tests.kernels.launch import Case

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "fwd"]


def skeletons() -> list[Variant]:
    """The smallest variant of each kind of loop: what is not about a tile is checked on these.

    A dtype changes conversions alone, so one stands for both.
    """
    large_first = sorted(VARIANTS, key=lambda v: (-v.size("m"), -v.head_dim, -v.head_dim_v))
    return list({loops(v): v for v in large_first if v.dtype == "bf16"}.values())


def loops(variant: Variant) -> tuple[Any, ...]:
    """What decides a kernel's loops: its stages, whether none, some or all of Q is in registers, carried addresses."""
    q = variant.size("q")
    return variant.size("s"), (q > 0) + (16 * q == variant.head_dim), variant.size("a"), variant.features


def of(variants: list[Variant]) -> pytest.MarkDecorator:
    """Run a test for each of these; one worker of pytest-xdist runs all tests of a variant."""
    params = [pytest.param(v, id=v.key, marks=pytest.mark.xdist_group(v.key)) for v in variants]
    return pytest.mark.parametrize("variant", params)


def cases(variant: Variant) -> list[Case]:
    """A compact set for every variant: each option of the ABI, each kind of window, lengths beside a tile's edges.

    fp16 changes conversions alone: a few calls that have every option between them.
    """
    m, n = variant.size("m"), variant.size("n")
    every = plain_cases(m, n) + option_cases(m, n, variant.head_dim, variant.head_dim_v)
    return [case for case in every if case.name in FEW] if variant.dtype == "fp16" else every


FEW = ("causal-gqa4", "left-window", "whole-tiles-no-lse", "sink", "varlen-window", "keys-packed-far", "everything")


def options(case: Case) -> set[tuple[str, Any]]:
    """The options that a case uses, each number and length as one."""
    left, right = case.window
    used: dict[str, Any] = {"window": (left is not None, right is not None)}
    for name in ("family", "lse", "heads_first", "far", "sink", "alibi", "pack"):
        used[name] = getattr(case, name)
    for name in ("head_dim", "head_dim_v", "softcap", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
                 "leftpad_k"):  # fmt: skip
        used[name] = bool(getattr(case, name))
    return set(used.items())


def plain_cases(m: int, n: int) -> list[Case]:
    """Dense calls. m, n: rows and columns of a variant's tile."""
    return [
        Case("ragged", m + 17, 2 * n + n // 2 + 11, batch=2),
        Case("causal-gqa4", m // 2 + 9, m // 2 + 9 + n, 4, 1, window=(None, 0), family="x4", heads_first=True),
        Case("causal-empty-rows", m + n + 9, n + 7, 2, 1, window=(None, 0), family="low"),
        Case("causal-square", m + 1, m + 1, window=(None, 0), batch=2),
        Case("window-gqa7", m + 5, m + n + 3, 7, 1, window=(n // 2 + 3, 9)),
        Case("left-window", m - 3, 3 * n + 1, window=(n + 1, None), family="low"),
        Case("right-window", 31, 2 * n - 1, window=(None, n + 2), heads_first=True),
        Case("left-of-all-keys", m // 2, n, window=(None, -n // 2), family="x4"),
        Case("one-query-mqa", 1, 2 * n + 1, 4, 1, batch=2, window=(None, 0), family="low", heads_first=True),
        Case("one-by-one", 1, 1, batch=2),
        Case("no-keys", 5, 0, 4, 2),
        Case("whole-tiles-no-lse", m, 2 * n, 2, 1, batch=2, lse=False, family="x4"),
        Case("far-batches", 19, n + 3, 2, 1, batch=2, far=True),
    ]


def option_cases(m: int, n: int, d: int, dv: int) -> list[Case]:
    """Every option beside most others. d, dv: a variant's head dims."""
    return [
        Case("small-dims-softcap", m // 2 + 3, 2 * n + 5, 1, 1, head_dim=d - 24, head_dim_v=8, softcap=9.0),
        Case("tiny-dim-alibi", 33, n + 9, 2, 1, head_dim=8, head_dim_v=dv - 8, window=(None, 0), alibi="heads"),
        Case("sink", m // 2, 2 * n + 3, 2, 2, sink="fp32", alibi="heads"),
        Case("sink-empty-rows", n + 9, n - 7, 4, 1, window=(None, 0), family="low", sink="low", softcap=40.0),
        Case("pack4-one-query", 1, 2 * n + 1, 8, 2, window=(None, 0), pack=True, alibi="entries", batch=2),
        Case("pack7-causal", m // 4 + 3, n + m // 4, 7, 1, window=(None, 0), pack=True, sink="fp32", family="x4"),
        Case("pack3-window", m // 3 + 9, m // 3 + n + 9, 6, 2, window=(n // 2 + 3, 5), pack=True, head_dim=d - 8),
        varlen("varlen", (m + 9, 0, 1, 20), (n + 30, 17, 2 * n + 1, 0), spare=5, heads_q=2),
        varlen("varlen-causal-pack4", (20, 1, 0, m // 4 + 3), (n + 30, n, 5, 9), heads_q=4, pack=True,
               window=(None, 0), sink="low", lse=False),
        varlen("varlen-window", (m // 2, 33, 7), (m // 2 + n, 40, 5), heads_q=2, alibi="entries",
               window=(n // 2 + 3, 9), family="low", heads_first=True),
        varlen("varlen-used-pack7", (9, m // 7 + 9, 3), (n, n + 30, 5), heads_q=7, pack=True,
               seqused_q=(5, m // 7 + 4, 3), seqused_k=(0, n + 20, 5), window=(None, 0), softcap=20.0, alibi="heads"),
        varlen("varlen-40-entries", (1, 0, 2, 5) * 10, (3, 9, 0, 8) * 10, head_dim=8, head_dim_v=8),
        keys_packed("keys-packed-far", 21, (n + 3, 0, n), heads_q=2, far=True, softcap=11.0, family="x4"),
        Case("used-keys", 21, 2 * n, 2, 1, batch=3, seqused_k=(n + 3, 0, 2 * n), window=(None, 0), sink="fp32"),
        Case("used-queries", m + 9, n + 9, 1, 1, batch=3, seqused_q=(m + 1, 3, 0), seqused_k=(n, n + 9, 4),
             window=(7, 0), heads_first=True),
        Case("left-padding", m // 2 + 9, 2 * n + 11, 2, 1, batch=5, window=(None, 0), alibi="heads", family="x4",
             leftpad_k=(n + 5, 0, 2 * n + 11, 2**31 - 1, -9)),
        Case("left-padding-pack3", m // 3 + 9, 2 * n, 3, 1, batch=4, window=(n + 3, 9), pack=True, heads_first=True,
             seqused_k=(n + 9, n, 0, 2 * n), leftpad_k=(n - 1, n, 3, n + 9), alibi="entries", sink="low", family="low"),
        varlen("left-padding-varlen", (m + 3, 0, 1, 20), (n + 30, 17, 2 * n + 1, 9), spare=5, heads_q=2,
               leftpad_k=(31, 3, n + 2, 9), seqused_k=(n + 30, 17, 2 * n, 9)),
        varlen("everything", (m // 3 + 9, 0, 1), (n + 41, 3, 2), spare=3, heads_q=3, pack=True, family="x4",
               head_dim=d - 8, head_dim_v=dv - 16, softcap=25.0, sink="low", alibi="entries", heads_first=True,
               seqused_q=(m // 3 + 5, 0, 1), seqused_k=(n + 33, 3, 1), leftpad_k=(35, 1, 0), window=(n + 1, 0)),
    ]  # fmt: skip


def varlen(name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], spare: int = 0, **more: Any) -> Case:
    """A case of packed queries and keys of these lengths, `spare` tokens of nobody behind them; by default one head."""
    (seqlen_q, cu_seqlens_q), (seqlen_k, cu_seqlens_k) = packed(lengths_q, spare), packed(lengths_k, spare)
    more = {"heads_q": 1, "heads_kv": 1, "batch": len(lengths_q), **more}
    return Case(name, seqlen_q, seqlen_k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **more)


def keys_packed(name: str, seqlen_q: int, lengths_k: tuple[int, ...], **more: Any) -> Case:
    """As `varlen`, the queries of each entry in an array of their own."""
    seqlen_k, cu_seqlens_k = packed(lengths_k)
    return Case(name, seqlen_q, seqlen_k, heads_kv=1, batch=len(lengths_k), cu_seqlens_k=cu_seqlens_k, **more)


def packed(lengths: tuple[int, ...] | list[int], spare: int = 0) -> tuple[int, tuple[int, ...]]:
    """(tokens of the array, cu_seqlens) of entries of these lengths with `spare` tokens behind the last."""
    cu_seqlens = tuple(accumulate(lengths, initial=0))
    return cu_seqlens[-1] + spare, cu_seqlens
