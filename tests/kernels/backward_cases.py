"""Which backward variants are tested, and calls of which they must serve every one."""

from __future__ import annotations

from typing import Any

from kernels import dispatch
from registry.contract import Variant
from registry.ops.workspaces import ROWS
from tests.kernels.backward import Backward
from tests.kernels.cases import packed

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


def cases(variant: Variant) -> list[Backward]:
    """Every option and kind of length for the skeletons and the most frequent head dims, a few calls that have most of
    them for the others."""
    m, n = variant.size("m"), variant.size("n")
    every = plain_cases(m, n) + option_cases(m, n, variant.head_dim, variant.head_dim_v)
    main = (variant.dtype, variant.head_dim, variant.head_dim_v) == ("bf16", 128, 128)
    return every if main or variant in skeletons() else [case for case in every if case.name in FEW]


def plain_cases(m: int, n: int) -> list[Backward]:
    """Dense calls. m, n: queries and keys of a variant's tile."""
    return [
        Backward("ragged", 2 * m + 17, n + 11, batch=2),
        Backward(
            "causal-gqa3", m + 9, n + m // 2 + 3, 3, 1, window=(None, 0), family="x4", heads_first=True, dlse=True
        ),
        Backward("causal-unseen-rows", m + n + 9, n + 7, 2, 1, window=(None, 0), family="low"),
        Backward("causal-square", ROWS + 1, ROWS + 1, 1, 1, window=(None, 0), batch=2),
        Backward("window-gqa2", m + n + 5, m + n + 3, 4, 2, window=(n // 2 + 3, 9)),
        Backward("left-window", m - 3, 2 * n + 1, 1, 1, window=(n + 1, None), family="low"),
        Backward("right-window", 31, 2 * n - 1, 2, 2, window=(None, n + 2), heads_first=True),
        Backward("left-of-all-keys", m // 2, n, 1, 1, window=(None, -n // 2), family="x4"),
        Backward("unseen-keys", m // 2, 2 * n + 9, 1, 1, window=(3, 0), dlse=True),
        Backward("one-query-mqa", 1, n + 1, 4, 1, batch=2, window=(None, 0), family="low"),
        Backward("one-by-one", 1, 1, batch=2, dlse=True),
        Backward("no-keys", 5, 0, 4, 2),
        Backward("no-queries", 0, 5, 4, 2),
        Backward("whole-tiles", ROWS, n, 2, 1, batch=2, family="x4"),
        Backward("sections", 3, n + 1, 2, 2, batch=33, head_dim=8, head_dim_v=8),
        Backward("far-batches", 19, n + 3, 2, 1, batch=2, far=True),
    ]


def option_cases(m: int, n: int, d: int, dv: int) -> list[Backward]:
    """Every option beside most others. d, dv: a variant's head dims."""
    return [
        Backward("small-dims-softcap", m // 2 + 3, n + 5, 1, 1, head_dim=d - 24, head_dim_v=8, softcap=9.0),
        Backward("tiny-dim-alibi", 33, n + 9, 2, 1, head_dim=8, head_dim_v=dv - 8, window=(None, 0), alibi="heads"),
        Backward("dalibi", m + 9, n + 9, 2, 1, batch=2, alibi="heads", dalibi=True, softcap=20.0),
        Backward("dalibi-causal", m + 9, m + n // 2, 2, 2, batch=2, alibi="entries", dalibi=True, window=(None, 0)),
        Backward("sink-dlse", m // 2, n + 3, 2, 2, sink="fp32", dlse=True, window=(n // 2, 5)),
        Backward("sink-unseen-rows", n + 9, n - 7, 2, 1, window=(None, 0), family="low", sink="low", softcap=40.0,
                 dlse=True),
        Backward("softcap-dlse", m + 5, n + 3, 2, 1, family="x4", softcap=3.0, dlse=True),
        Backward("splits", m + 3, n + 9, 6, 2, batch=2, splits=3, window=(None, 0)),
        Backward("all-heads-apart", m // 2, n + 9, 4, 1, splits=4, heads_first=True, alibi="heads", dalibi=True),
        Backward("ordered", 2 * m + 3, 2 * n + 9, 2, 2, batch=2, ordered=True),
        Backward("ordered-causal-gqa2", m + n + 3, m + n + 9, 2, 1, ordered=True, window=(None, 0), dlse=True),
        Backward("ordered-window", 2 * m + n, 2 * m + n, 1, 1, ordered=True, window=(n // 2, 3), softcap=9.0),
        Backward("ordered-splits", m + 3, n + 9, 4, 1, ordered=True, splits=2, window=(None, 5)),
        varlen("varlen", (m + 9, 0, 1, 20), (n + 30, 17, 2 * n + 1, 0), spare=5, heads_q=2),
        varlen("varlen-causal-gqa2", (20, 1, 0, ROWS + 3), (n + 30, n, 5, 9), heads_q=2, window=(None, 0), sink="low",
               dlse=True, heads_first=True),
        varlen("varlen-window-dalibi", (m // 2, 33, 7), (m // 2 + n, 40, 5), heads_q=2, alibi="entries", dalibi=True,
               window=(n // 2 + 3, 9), family="low"),
        varlen("varlen-used", (9, m + 9, 3), (n, n + 30, 5), spare=3, heads_q=2, splits=2,
               seqused_q=(5, m + 4, 3), seqused_k=(0, n + 20, 5), window=(None, 0), softcap=20.0, alibi="heads"),
        varlen("varlen-ordered", (m + 9, 0, 20, 5), (n + 30, 5, n + 1, 0), ordered=True, window=(None, 0)),
        varlen("varlen-40-entries", (1, 0, 2, 5) * 10, (3, 9, 0, 8) * 10, head_dim=8, head_dim_v=8),
        keys_packed("keys-packed-far", 21, (n + 3, 0, n), heads_q=2, far=True, softcap=11.0, family="x4"),
        keys_packed("keys-packed-splits", 21, (n + 3, 0, 9), heads_q=2, far=True, splits=2),
        queries_packed("queries-packed", (m + 9, 0, 1), n + 3, heads_q=2, window=(None, 0), alibi="heads", dalibi=True),
        Backward("used-keys", 21, 2 * n, 2, 1, batch=3, seqused_k=(n + 3, 0, 2 * n), window=(None, 0), sink="fp32"),
        Backward("used-queries", m + 9, n + 9, 1, 1, batch=3, seqused_q=(m + 1, 3, 0), seqused_k=(n, n + 9, 4),
                 window=(7, 0), heads_first=True, alibi="entries", dalibi=True),
        Backward("left-padding", m // 2 + 9, 2 * n + 11, 2, 1, batch=5, window=(None, 0), alibi="entries", dalibi=True,
                 leftpad_k=(n + 5, 0, 2 * n + 11, 2**31 - 1, -9), family="x4", sink="fp32", dlse=True),
        Backward("left-padding-splits", 21, 2 * n, 4, 1, batch=4, splits=2, window=(n // 2 + 3, 9), heads_first=True,
                 seqused_k=(n + 9, n, 0, 2 * n), leftpad_k=(n - 1, n, 3, n + 9), family="low"),
        Backward("left-padding-ordered", m + 9, 3 * n + 5, 2, 1, batch=2, ordered=True, leftpad_k=(n + 9, 3)),
        varlen("left-padding-varlen", (m + 3, 0, 1, 20), (n + 30, 17, 3 * n + 1, 9), spare=5, heads_q=2,
               leftpad_k=(31, 3, n + 2, 9), seqused_k=(n + 30, 17, 3 * n, 9), alibi="heads", dalibi=True, splits=2),
        varlen("left-padding-varlen-ordered", (m + 9, 20, 5), (2 * n + 30, n + 7, 0), ordered=True, window=(n + 9, 0),
               leftpad_k=(n + 3, 5, 1)),
        varlen("everything", (m + 9, 0, 1), (n + 41, 3, 2), spare=3, heads_q=2, family="x4",
               head_dim=d - 8, head_dim_v=dv - 16, softcap=25.0, sink="low", alibi="entries", heads_first=True,
               seqused_q=(m + 5, 0, 1), seqused_k=(n + 33, 3, 1), leftpad_k=(5, 1, 0), window=(n + 1, 0), dlse=True,
               dalibi=True, ordered=True, splits=2),
    ]  # fmt: skip


def varlen(name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], spare: int = 0, **more: Any) -> Backward:
    """As `tests.kernels.cases.varlen`."""
    (seqlen_q, cu_seqlens_q), (seqlen_k, cu_seqlens_k) = packed(lengths_q, spare), packed(lengths_k, spare)
    more = {"heads_q": 1, "heads_kv": 1, "batch": len(lengths_q), **more}
    return Backward(name, seqlen_q, seqlen_k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **more)


def keys_packed(name: str, seqlen_q: int, lengths_k: tuple[int, ...], **more: Any) -> Backward:
    """As `varlen`, the queries of each entry in an array of their own."""
    seqlen_k, cu_seqlens_k = packed(lengths_k)
    return Backward(name, seqlen_q, seqlen_k, heads_kv=1, batch=len(lengths_k), cu_seqlens_k=cu_seqlens_k, **more)


def queries_packed(name: str, lengths_q: tuple[int, ...], seqlen_k: int, **more: Any) -> Backward:
    """As `varlen`, the keys of each entry in an array of their own."""
    seqlen_q, cu_seqlens_q = packed(lengths_q)
    return Backward(name, seqlen_q, seqlen_k, heads_kv=1, batch=len(lengths_q), cu_seqlens_q=cu_seqlens_q, **more)
