"""Which variants are tested, and calls of which they must serve every one."""

from __future__ import annotations

from typing import Any

import pytest

from kernels import dispatch
from registry.contract import Variant
from tests.support.call import Call, Numbers, lengths, packed

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


def cases(variant: Variant) -> dict[str, Call]:
    """A compact set for every variant: each option of the ABI, each kind of window, lengths beside a tile's edges.

    fp16 changes conversions alone: a few calls that have every option between them.
    """
    m, n = variant.size("m"), variant.size("n")
    every = plain_cases(m, n) | option_cases(m, n, variant.head_dim, variant.head_dim_v)
    return {name: case for name, case in every.items() if name in FEW} if variant.dtype == "fp16" else every


FEW = ("causal-gqa4", "left-window", "whole-tiles-no-lse", "sink", "varlen-window", "keys-packed-far", "everything")


def options(case: Call) -> set[tuple[str, Any]]:
    """The options that a case uses, each number and length as one."""
    left, right = case.window
    used: dict[str, Any] = {"window": (left is not None, right is not None)}
    for name in ("family", "lse", "heads_first", "far", "sink", "alibi", "pack"):
        used[name] = getattr(case, name)
    for name in ("head_dim", "head_dim_v", "softcap", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
                 "leftpad_k"):  # fmt: skip
        used[name] = bool(getattr(case, name))
    return set(used.items())


def plain_cases(m: int, n: int) -> dict[str, Call]:
    """Dense calls. m, n: rows and columns of a variant's tile."""
    return {
        "ragged": Call(m + 17, 2 * n + n // 2 + 11, batch=2),
        "causal-gqa4": Call(m // 2 + 9, m // 2 + 9 + n, 4, 1, window=(None, 0), family="times4", heads_first=True),
        "causal-empty-rows": Call(m + n + 9, n + 7, 2, 1, window=(None, 0), family="far_below"),
        "causal-square": Call(m + 1, m + 1, window=(None, 0), batch=2),
        "window-gqa7": Call(m + 5, m + n + 3, 7, 1, window=(n // 2 + 3, 9)),
        "left-window": Call(m - 3, 3 * n + 1, window=(n + 1, None), family="far_below"),
        "right-window": Call(31, 2 * n - 1, window=(None, n + 2), heads_first=True),
        "left-of-all-keys": Call(m // 2, n, window=(None, -n // 2), family="times4"),
        "one-query-mqa": Call(1, 2 * n + 1, 4, 1, batch=2, window=(None, 0), family="far_below", heads_first=True),
        "one-by-one": Call(1, 1, batch=2),
        "no-keys": Call(5, 0, 4, 2),
        "whole-tiles-no-lse": Call(m, 2 * n, 2, 1, batch=2, lse=False, family="times4"),
        "far-batches": Call(19, n + 3, 2, 1, batch=2, far=True),
    }


def option_cases(m: int, n: int, d: int, dv: int) -> dict[str, Call]:
    """Every option beside most others. d, dv: a variant's head dims."""
    return {
        "small-dims-softcap": Call(m // 2 + 3, 2 * n + 5, 1, 1, head_dim=d - 24, head_dim_v=8, softcap=9.0),
        "tiny-dim-alibi": Call(33, n + 9, 2, 1, head_dim=8, head_dim_v=dv - 8, window=(None, 0), alibi="heads"),
        "sink": Call(m // 2, 2 * n + 3, 2, 2, sink="fp32", alibi="heads"),
        "sink-empty-rows": Call(n + 9, n - 7, 4, 1, window=(None, 0), family="far_below", sink="low", softcap=40.0),
        "pack4-one-query": Call(1, 2 * n + 1, 8, 2, window=(None, 0), pack=True, alibi="batch", batch=2),
        "pack7-causal": Call(m // 4 + 3, n + m // 4, 7, 1, window=(None, 0), pack=True, sink="fp32", family="times4"),
        "pack3-window": Call(m // 3 + 9, m // 3 + n + 9, 6, 2, window=(n // 2 + 3, 5), pack=True, head_dim=d - 8),
        "varlen": varlen((m + 9, 0, 1, 20), (n + 30, 17, 2 * n + 1, 0), spare=5, heads_q=2),
        "varlen-causal-pack4": varlen((20, 1, 0, m // 4 + 3), (n + 30, n, 5, 9), heads_q=4, pack=True,
               window=(None, 0), sink="low", lse=False),
        "varlen-window": varlen((m // 2, 33, 7), (m // 2 + n, 40, 5), heads_q=2, alibi="batch",
               window=(n // 2 + 3, 9), family="far_below", heads_first=True),
        "varlen-used-pack7": varlen((9, m // 7 + 9, 3), (n, n + 30, 5), heads_q=7, pack=True,
               seqused_q=(5, m // 7 + 4, 3), seqused_k=(0, n + 20, 5), window=(None, 0), softcap=20.0, alibi="heads"),
        "varlen-40-entries": varlen((1, 0, 2, 5) * 10, (3, 9, 0, 8) * 10, head_dim=8, head_dim_v=8),
        "keys-packed-far": keys_packed(21, (n + 3, 0, n), heads_q=2, far=True, softcap=11.0, family="times4"),
        "used-keys": Call(21, 2 * n, 2, 1, batch=3, seqused_k=(n + 3, 0, 2 * n), window=(None, 0), sink="fp32"),
        "used-queries": Call(m + 9, n + 9, 1, 1, batch=3, seqused_q=(m + 1, 3, 0), seqused_k=(n, n + 9, 4),
             window=(7, 0), heads_first=True),
        "left-padding": Call(m // 2 + 9, 2 * n + 11, 2, 1, batch=5, window=(None, 0), alibi="heads", family="times4",
             leftpad_k=(n + 5, 0, 2 * n + 11, 2**31 - 1, -9)),
        "left-padding-pack3": Call(m // 3 + 9, 2 * n, 3, 1, batch=4, window=(n + 3, 9), pack=True, heads_first=True,
             seqused_k=(n + 9, n, 0, 2 * n), leftpad_k=(n - 1, n, 3, n + 9), alibi="batch", sink="low",
             family="far_below"),
        "left-padding-varlen": varlen((m + 3, 0, 1, 20), (n + 30, 17, 2 * n + 1, 9), spare=5, heads_q=2,
               leftpad_k=(31, 3, n + 2, 9), seqused_k=(n + 30, 17, 2 * n, 9)),
        "everything": varlen((m // 3 + 9, 0, 1), (n + 41, 3, 2), spare=3, heads_q=3, pack=True, family="times4",
               head_dim=d - 8, head_dim_v=dv - 16, softcap=25.0, sink="low", alibi="batch", heads_first=True,
               seqused_q=(m // 3 + 5, 0, 1), seqused_k=(n + 33, 3, 1), leftpad_k=(35, 1, 0), window=(n + 1, 0)),
    }  # fmt: skip


def varlen(lengths_q: Numbers, lengths_k: Numbers, spare: int = 0, **more: Any) -> Call:
    """A call of packed queries and keys of these lengths, `spare` tokens of nobody behind them; by default one head."""
    return Call(0, 0, 1, 1).but(**lengths(lengths_q, lengths_k, spare=spare) | more)


def keys_packed(seqlen_q: int, lengths_k: Numbers, **more: Any) -> Call:
    """As `varlen`, the queries of each entry in an array of their own."""
    seqlen_k, cu_seqlens_k = packed(lengths_k)
    return Call(seqlen_q, seqlen_k, heads_kv=1, batch=len(lengths_k), cu_seqlens_k=cu_seqlens_k, **more)
