"""What several ops of attention have in common: tensors, numbers and facts that mean the same in each of them.

A null pointer means that an optional tensor is absent. Strides are in elements, lengths in tokens. A packed array has
batch stride 0: cu_seqlens places its entries, and what it and seqused say is clamped to the array. With leftpad_k an
entry still ends where cu_seqlens_k and seqused_k say; it is clamped to 0 … that end, and nothing before it is read.

The kernels count in 32 bits within these ranges; the runtime refuses what lies outside:
- batch and heads_q are below 2**31, seqlen_q + seqlen_k is below 2**30, seqlen_q · pack at most 2**31 − 2**10, so that
  rows of a tile behind the last have numbers too;
- batch · alibi_stride_b + heads_q is below 2**31, and alibi_stride_b is not negative;
- with pages of several tokens, the token strides of k and v are below 2**31 elements;
- num_splits is at most 2**16, of which the runtime asks for at most 256;
- an op whose grid counts rows has at most 2**31 − 32 of them.
A negative page of a key that exists is read as page 0, and is not written. Rows of the backward's workspaces are below
2**31, and heads_q times as many below 2**35: dq_accum would be larger than any memory.
"""

from __future__ import annotations

from registry.ops.describe import Fact, Layout, Letter, Scalar, Tensor, layout

LOW = ("bf16", "fp16")
E4M3 = "e4m3kv"  # the feature of a cache in float8_e4m3fn
DENSE_Q = layout("batch seqlen_q heads_q head_dim", unless="cu_seqlens_q")
PACKED_Q = layout("total_q heads_q head_dim", when="cu_seqlens_q")
DENSE_OUT = layout("batch seqlen_q heads_q head_dim_v", unless="cu_seqlens_q")
PACKED_OUT = layout("total_q heads_q head_dim_v", when="cu_seqlens_q")
DENSE_K = layout("batch seqlen_k heads_kv head_dim", unless="cu_seqlens_k")
PACKED_K = layout("total_k heads_kv head_dim", when="cu_seqlens_k")
DENSE_V = layout("batch seqlen_k heads_kv head_dim_v", unless="cu_seqlens_k")
PACKED_V = layout("total_k heads_kv head_dim_v", when="cu_seqlens_k")
PAGES_K = layout("pages page_size heads_kv head_dim")
PAGES_V = layout("pages page_size heads_kv head_dim_v")
LSE = (layout("batch heads_q seqlen_q", unless="cu_seqlens_q"), layout("heads_q total_q", when="cu_seqlens_q"))
BSH = ("b", "s", "h")

# Dimensions whose sizes may change under a kept plan: lengths, and never what a kernel is chosen or compiled by.
LENGTHS = frozenset(("seqlen_q", "seqlen_k", "total_q", "total_k", "max_pages"))


def vectors(name: str, role: str, dtypes: tuple[str, ...], layouts: tuple[Layout, ...], about: str, *,
         strides: tuple[str, ...] = BSH, optional: bool = False, differentiable: bool = False,
         argument: str = "") -> Tensor:  # fmt: skip
    """A tensor that kernels copy 16 bytes at a time."""
    return Tensor(name, role, dtypes, layouts, about, strides, "vectors", optional, differentiable, argument)


def extra(name: str, dtypes: tuple[str, ...], layouts: tuple[str, ...], about: str, *,
          differentiable: bool = False) -> Tensor:  # fmt: skip
    """An optional input that kernels read element by element."""
    found = tuple(layout(dims) for dims in layouts)
    return Tensor(name, "in", dtypes, found, about, optional=True, differentiable=differentiable)


def workspace(name: str, dims: str, about: str, *, dtype: str = "fp32", strides: tuple[str, ...] = (),
              optional: bool = False, gradient_of: str = "") -> Tensor:  # fmt: skip
    """Memory that a call takes for its own time, 256-byte aligned."""
    return Tensor(name, "workspace", (dtype,), (layout(dims),), about, strides, "vectors", optional,
                  gradient_of=gradient_of)  # fmt: skip


Q = vectors("q", "in", LOW, (DENSE_Q, PACKED_Q), "queries", differentiable=True)
K = vectors("k", "in", ("call",), (DENSE_K, PACKED_K), "keys", differentiable=True)
V = vectors("v", "in", ("call",), (DENSE_V, PACKED_V), "values", differentiable=True)
OUT = vectors("o", "out", ("call",), (DENSE_OUT, PACKED_OUT), "the output", argument="out")
CU_SEQLENS_Q = extra("cu_seqlens_q", ("i32",), ("batch+1",), "where each entry of a packed q starts, and the end")
CU_SEQLENS_K = extra("cu_seqlens_k", ("i32",), ("batch+1",), "where each entry of a packed k starts, and the end")
SEQUSED_Q = extra("seqused_q", ("i32",), ("batch",), "tokens of an entry's queries that count, from its start")
SEQUSED_K = extra("seqused_k", ("i32",), ("batch",), "tokens of an entry's keys that count, from its start")
LEFTPAD_K = extra("leftpad_k", ("i32",), ("batch",), "an entry's first key: those before it are padding")
PAGE_TABLE = extra("page_table", ("i32",), ("batch max_pages",), "the page that holds page_size tokens of an entry")
SINK = extra("sink", ("fp32", "call"), ("heads_q",), "the score of a column without a value", differentiable=True)
ALIBI_SLOPES = extra("alibi_slopes", ("fp32",), ("heads_q", "batch heads_q"), "what distance takes off a score",
                     differentiable=True)  # fmt: skip
K_DESCALE = extra("k_descale", ("fp32",), ("heads_kv", "batch heads_kv"), "factor of an e4m3 cache's keys")
V_DESCALE = extra("v_descale", ("fp32",), ("heads_kv", "batch heads_kv"), "factor of an e4m3 cache's values")

TILE = (
    Letter("m", "query rows"),
    Letter("n", "key columns"),
    Letter("w", "warps"),
    Letter("s", "stages of K and V"),
)
Q_STEPS = Letter("q", "steps of 16 columns of Q that stay in registers", r"[1-9]\d*", optional=True)

NUMBERS = {
    s.name: s
    for s in (
        Scalar("pack_magic", "i64", "n // pack is n · pack_magic >> pack_shift for 0 ≤ n < 2**31"),
        Scalar("page_magic", "i64", "n // page_size is n · page_magic >> page_shift"),
        Scalar("rows", "i64", "rows of a head in the workspaces, a multiple of 128"),
        Scalar("batch", "i32", "entries"),
        Scalar("heads_q", "i32", "query heads"),
        Scalar("heads_kv", "i32", "key/value heads, a divisor of heads_q"),
        Scalar("seqlen_q", "i32", "queries of an entry, or all of a packed array"),
        Scalar("seqlen_k", "i32", "keys of an entry, or all of a packed array"),
        Scalar("head_dim", "i32", "of q and k, at most the variant's"),
        Scalar("head_dim_v", "i32", "of v, at most the variant's"),
        Scalar("window_left", "i32", "keys that a query sees before its diagonal, 2**30 if all"),
        Scalar("window_right", "i32", "and after it; causal is 0"),
        Scalar("pack", "i32", "query heads that share a tile's rows: 1, or all of a group"),
        Scalar("pack_shift", "i32", "see pack_magic"),
        Scalar("sink_low", "i32", "1 if the sink has q's dtype, 0 if it is fp32"),
        Scalar("alibi_stride_b", "i32", "0 for slopes per head alone"),
        Scalar("page_size", "i32", "tokens of a page"),
        Scalar("page_shift", "i32", "see page_magic"),
        Scalar("page_table_stride", "i32", "from an entry's row to the next one's"),
        Scalar("num_splits", "i32", "blocks that share a tile's keys"),
        Scalar("k_descale_stride_b", "i32", "0 for a factor per head alone"),
        Scalar("v_descale_stride_b", "i32", "the same of the values"),
        Scalar(
            "scale_log2", "f32", "log2(e) · softmax_scale, or log2(e) · softcap: a score s weighs 2 ** (s · scale_log2)"
        ),
        Scalar("softcap_scale", "f32", "2 · log2(e) · softmax_scale / softcap, 0 for no softcap"),
        Scalar("softmax_scale", "f32", "factor of a gradient's sum of products"),
    )
}


def numbers(names: str) -> tuple[Scalar, ...]:
    """Several of NUMBERS, in this order."""
    return tuple(NUMBERS[name] for name in names.split())


DTYPE = Fact("dtype", "'bf16' or 'fp16': of q")
KV_DTYPE = Fact("kv_dtype", "dtype, or 'e4m3': of the cache")
HEAD_DIMS = (
    Fact("head_dim", "of q and k; a multiple of 8, of 16 with an e4m3 cache"),
    Fact("head_dim_v", "of v; the same"),
)
CALL_FACTS = (
    DTYPE,
    *HEAD_DIMS,
    Fact("batch", "entries"),
    Fact("heads_q", "query heads"),
    Fact("heads_kv", "key/value heads"),
    Fact("group", "heads_q / heads_kv"),
    Fact("seqlen_q", "queries of an entry; of a packed array max_seqlen_q, or the mean length if it is not given"),
    Fact("seqlen_k", "keys of an entry, likewise; of a cache what a table's row has room for, or max_seqlen_k if less"),
    Fact("total_q", "rows of q: batch · seqlen_q if it is dense"),
    Fact("packed_rows", "seqlen_q · group"),
    Fact("causal", "1 if the window's right side is 0"),
    Fact("window", "1 if its left side is bounded"),
    Fact("varlen", "1 if cu_seqlens_q was given"),
)
BACKWARD_FACTS = (
    *CALL_FACTS,
    Fact("varlen_k", "1 if cu_seqlens_k was given"),
    Fact("total_k", "tokens of k: batch · seqlen_k if it is dense"),
)
COUNTED_ROWS = Fact("rows", "what the call counts itself: a block takes m of them")
