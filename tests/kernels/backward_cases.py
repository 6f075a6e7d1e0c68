"""Which backward variants are tested, and calls of which they must serve every one."""

from __future__ import annotations

from typing import Any

from kernels import dispatch
from registry.contract import Variant
from registry.ops.workspaces import ROWS
from tests.kernels import cases as cases_of_fwd
from tests.support.call import Call, Grad, Numbers, packed

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "bwd"]
FEW = ("ragged", "causal-gqa3", "causal-unseen-rows", "everything")


def loops(variant: Variant) -> tuple[Any, ...]:
    """What decides a kernel's code, its size and where it computes addresses apart: the letters of its tile, but of
    some only whether rows come in chunks, whether warps stand side by side, and whether none, some or all of V is in
    registers."""
    others = tuple((letter, size) for letter, size in variant.tile if letter not in "mnwxrct")
    in_registers = (variant.size("r") > 0) + (16 * variant.size("r") == variant.head_dim_v)
    return others, variant.size("c") > 1, variant.size("x") > 1, in_registers


def skeletons() -> list[Variant]:
    """The smallest variant of each kind of loop: what is not about a tile is checked on these, in bf16."""
    large_first = sorted(VARIANTS, key=lambda v: (-v.size("m") * v.size("n"), -v.head_dim, -v.head_dim_v))
    return list({loops(v): v for v in large_first if v.dtype == "bf16"}.values())


def cases(variant: Variant) -> dict[str, Call]:
    """Every option and kind of length for the skeletons and the most frequent head dims, a few calls that have most of
    them for the others."""
    m, n = variant.size("m"), variant.size("n")
    every = plain_cases(m, n) | option_cases(m, n, variant.head_dim, variant.head_dim_v)
    main = (variant.dtype, variant.head_dim, variant.head_dim_v) == ("bf16", 128, 128)
    return every if main or variant in skeletons() else {name: every[name] for name in every if name in FEW}


def plain_cases(m: int, n: int) -> dict[str, Call]:
    """Dense calls. m, n: queries and keys of a variant's tile."""
    return {
        "ragged": dense(2 * m + 17, n + 11, batch=2),
        "causal-gqa3": dense(
            m + 9, n + m // 2 + 3, 3, 1, window=(None, 0), family="times4", heads_first=True, dlse=True
        ),
        "causal-unseen-rows": dense(m + n + 9, n + 7, 2, 1, window=(None, 0), family="far_below"),
        "causal-square": dense(ROWS + 1, ROWS + 1, 1, 1, window=(None, 0), batch=2),
        "window-gqa2": dense(m + n + 5, m + n + 3, 4, 2, window=(n // 2 + 3, 9)),
        "left-window": dense(m - 3, 2 * n + 1, 1, 1, window=(n + 1, None), family="far_below"),
        "right-window": dense(31, 2 * n - 1, 2, 2, window=(None, n + 2), heads_first=True),
        "left-of-all-keys": dense(m // 2, n, 1, 1, window=(None, -n // 2), family="times4"),
        "unseen-keys": dense(m // 2, 2 * n + 9, 1, 1, window=(3, 0), dlse=True),
        "one-query-mqa": dense(1, n + 1, 4, 1, batch=2, window=(None, 0), family="far_below"),
        "one-by-one": dense(1, 1, batch=2, dlse=True),
        "no-keys": dense(5, 0, 4, 2),
        "no-queries": dense(0, 5, 4, 2),
        "whole-tiles": dense(ROWS, n, 2, 1, batch=2, family="times4"),
        "sections": dense(3, n + 1, 2, 2, batch=33, head_dim=8, head_dim_v=8),
        "far-batches": dense(19, n + 3, 2, 1, batch=2, far=True),
    }


def option_cases(m: int, n: int, d: int, dv: int) -> dict[str, Call]:
    """Every option beside most others. d, dv: a variant's head dims."""
    return {
        "small-dims-softcap": dense(m // 2 + 3, n + 5, 1, 1, head_dim=d - 24, head_dim_v=8, softcap=9.0),
        "tiny-dim-alibi": dense(33, n + 9, 2, 1, head_dim=8, head_dim_v=dv - 8, window=(None, 0), alibi="heads"),
        "dalibi": dense(m + 9, n + 9, 2, 1, batch=2, alibi="heads", dalibi=True, softcap=20.0),
        "dalibi-causal": dense(m + 9, m + n // 2, 2, 2, batch=2, alibi="batch", dalibi=True, window=(None, 0)),
        "sink-dlse": dense(m // 2, n + 3, 2, 2, sink="fp32", dlse=True, window=(n // 2, 5)),
        "sink-unseen-rows": dense(n + 9, n - 7, 2, 1, window=(None, 0), family="far_below", sink="low", softcap=40.0,
                 dlse=True),
        "softcap-dlse": dense(m + 5, n + 3, 2, 1, family="times4", softcap=3.0, dlse=True),
        "splits": dense(m + 3, n + 9, 6, 2, batch=2, splits=3, window=(None, 0)),
        "all-heads-apart": dense(m // 2, n + 9, 4, 1, splits=4, heads_first=True, alibi="heads", dalibi=True),
        "ordered": dense(2 * m + 3, 2 * n + 9, 2, 2, batch=2, deterministic=True),
        "ordered-causal-gqa2": dense(m + n + 3, m + n + 9, 2, 1, deterministic=True, window=(None, 0), dlse=True),
        "ordered-window": dense(2 * m + n, 2 * m + n, 1, 1, deterministic=True, window=(n // 2, 3), softcap=9.0),
        "ordered-splits": dense(m + 3, n + 9, 4, 1, deterministic=True, splits=2, window=(None, 5)),
        "varlen": varlen((m + 9, 0, 1, 20), (n + 30, 17, 2 * n + 1, 0), spare=5, heads_q=2),
        "varlen-causal-gqa2": varlen((20, 1, 0, ROWS + 3), (n + 30, n, 5, 9), heads_q=2, window=(None, 0), sink="low",
               dlse=True, heads_first=True),
        "varlen-window-dalibi": varlen((m // 2, 33, 7), (m // 2 + n, 40, 5), heads_q=2, alibi="batch", dalibi=True,
               window=(n // 2 + 3, 9), family="far_below"),
        "varlen-used": varlen((9, m + 9, 3), (n, n + 30, 5), spare=3, heads_q=2, splits=2,
               seqused_q=(5, m + 4, 3), seqused_k=(0, n + 20, 5), window=(None, 0), softcap=20.0, alibi="heads"),
        "varlen-ordered": varlen((m + 9, 0, 20, 5), (n + 30, 5, n + 1, 0), deterministic=True, window=(None, 0)),
        "varlen-40-entries": varlen((1, 0, 2, 5) * 10, (3, 9, 0, 8) * 10, head_dim=8, head_dim_v=8),
        "keys-packed-far": keys_packed(21, (n + 3, 0, n), heads_q=2, far=True, softcap=11.0, family="times4"),
        "keys-packed-splits": keys_packed(21, (n + 3, 0, 9), heads_q=2, far=True, splits=2),
        "queries-packed": queries_packed((m + 9, 0, 1), n + 3, heads_q=2, window=(None, 0), alibi="heads", dalibi=True),
        "used-keys": dense(21, 2 * n, 2, 1, batch=3, seqused_k=(n + 3, 0, 2 * n), window=(None, 0), sink="fp32"),
        "used-queries": dense(m + 9, n + 9, 1, 1, batch=3, seqused_q=(m + 1, 3, 0), seqused_k=(n, n + 9, 4),
                 window=(7, 0), heads_first=True, alibi="batch", dalibi=True),
        "left-padding": dense(m // 2 + 9, 2 * n + 11, 2, 1, batch=5, window=(None, 0), alibi="batch", dalibi=True,
                 leftpad_k=(n + 5, 0, 2 * n + 11, 2**31 - 1, -9), family="times4", sink="fp32", dlse=True),
        "left-padding-splits": dense(21, 2 * n, 4, 1, batch=4, splits=2, window=(n // 2 + 3, 9), heads_first=True,
                 seqused_k=(n + 9, n, 0, 2 * n), leftpad_k=(n - 1, n, 3, n + 9), family="far_below"),
        "left-padding-ordered": dense(m + 9, 3 * n + 5, 2, 1, batch=2, deterministic=True, leftpad_k=(n + 9, 3)),
        "left-padding-varlen": varlen((m + 3, 0, 1, 20), (n + 30, 17, 3 * n + 1, 9), spare=5, heads_q=2,
               leftpad_k=(31, 3, n + 2, 9), seqused_k=(n + 30, 17, 3 * n, 9), alibi="heads", dalibi=True, splits=2),
        "left-padding-varlen-ordered": varlen((m + 9, 20, 5), (2 * n + 30, n + 7, 0), deterministic=True,
               window=(n + 9, 0), leftpad_k=(n + 3, 5, 1)),
        "everything": varlen((m + 9, 0, 1), (n + 41, 3, 2), spare=3, heads_q=2, family="times4",
               head_dim=d - 8, head_dim_v=dv - 16, softcap=25.0, sink="low", alibi="batch", heads_first=True,
               seqused_q=(m + 5, 0, 1), seqused_k=(n + 33, 3, 1), leftpad_k=(5, 1, 0), window=(n + 1, 0), dlse=True,
               dalibi=True, deterministic=True, splits=2),
    }  # fmt: skip


def dense(seqlen_q: int, seqlen_k: int, heads_q: int = 2, heads_kv: int = 2, **more: Any) -> Call:
    """A call whose gradients are wanted. more: other fields of it and of its `Grad`."""
    return Call(seqlen_q, seqlen_k, heads_q, heads_kv, grad=Grad()).but(**more)


def varlen(lengths_q: Numbers, lengths_k: Numbers, spare: int = 0, **more: Any) -> Call:
    """As `tests.kernels.cases.varlen`."""
    return cases_of_fwd.varlen(lengths_q, lengths_k, spare, grad=Grad()).but(**more)


def keys_packed(seqlen_q: int, lengths_k: Numbers, **more: Any) -> Call:
    """As `varlen`, the queries of each entry in an array of their own."""
    return cases_of_fwd.keys_packed(seqlen_q, lengths_k, grad=Grad()).but(**more)


def queries_packed(lengths_q: Numbers, seqlen_k: int, **more: Any) -> Call:
    """As `varlen`, the keys of each entry in an array of their own."""
    seqlen_q, cu_seqlens_q = packed(lengths_q)
    return dense(seqlen_q, seqlen_k, heads_kv=1, batch=len(lengths_q), cu_seqlens_q=cu_seqlens_q).but(**more)
