"""`kv_append`: new keys and values into the cache, rotated and quantised on their way; queries rotated into a copy."""

import registry.ops.attention as a
from registry.ops.describe import Feature, Letter, Op, Scalar, layout

K = a.vectors("k", "inout", ("call", "e4m3"), (a.PAGES_K,), "the cache of keys")
V = a.vectors("v", "inout", ("k",), (a.PAGES_V,), "the cache of values")
NEW_K, NEW_V = layout("batch seqlen_new heads_kv head_dim"), layout("batch seqlen_new heads_kv head_dim_v")
ROTARY = ("positions rotary_dim/2",)

KV_APPEND = Op(
    name="kv_append",
    version=1,
    computes="m rows, a warp each: K's, then V's, then Q's",
    tensors=(
        a.vectors("k_new", "in", ("call",), (NEW_K,), "keys to append at seqused_k", optional=True),
        a.vectors("v_new", "in", ("call",), (NEW_V,), "values to append", optional=True),
        K,
        V,
        a.Q,
        a.vectors("q_out", "workspace", ("call",), (a.DENSE_Q,), "the rotated copy of q", optional=True),
        a.extra("rotary_cos", ("call",), ROTARY, "cosines of each position, a multiple of 16 / 2 of them"),
        a.extra("rotary_sin", ("call",), ROTARY, "sines, with rotary_cos's row stride"),
        *(a.SEQUSED_K, a.PAGE_TABLE, a.K_DESCALE, a.V_DESCALE),
    ),
    scalars=(
        *a.numbers("page_magic batch heads_q heads_kv"),
        Scalar("seqlen_new", "i32", "tokens that are appended"),
        Scalar("seqlen_q", "i32", "queries that are rotated, 0 for none", source="seqlen_rotated"),
        *a.numbers("seqlen_k head_dim head_dim_v"),
        Scalar("rotary_dim", "i32", "columns that are rotated, 0 for none"),
        Scalar("rotary_rows", "i32", "positions of the tables; those behind take the last"),
        Scalar("rotary_stride", "i32", "from a position to the next"),
        Scalar("interleaved", "i32", "1: columns 2i and 2i + 1 turn together; 0: i and i + rotary_dim / 2"),
        Scalar("q_still", "i32", "1: all queries are rotated as of position seqused_k"),
        *a.numbers("page_size page_shift page_table_stride k_descale_stride_b v_descale_stride_b"),
    ),
    letters=(Letter("m", "rows of a block"),),
    features=(Feature(a.E4M3, "the cache is float8_e4m3fn", ptx="sm_89"),),
    grid="rows",
    facts=(a.DTYPE, a.KV_DTYPE, *a.HEAD_DIMS, a.COUNTED_ROWS),
)
