"""`fwd_paged`: the forward over a cache, of pages or contiguous, in any number of splits of its keys."""

import registry.ops.attention as a
from registry.ops.describe import Feature, Op, Scalar, Tensor

K = a.vectors("k", "in", ("call", "e4m3"), (a.PAGES_K,), "the cache of keys")
V = a.vectors("v", "in", ("k",), (a.PAGES_V,), "the cache of values")
# With num_splits > 1 the output and its LSE are a workspace of fp32 partial results.
OUT = a.vectors("o", "out", ("call",), (a.DENSE_OUT, a.PACKED_OUT), "the output, or partial outputs",
             strides=(*a.BSH, "split"), argument="out")  # fmt: skip
LSE = Tensor("lse", "out", ("fp32",), a.LSE, "log-sum-exp of the scores, or partial ones",
             strides=("b", "h", "split"), access="anywhere", optional=True)  # fmt: skip

FWD_PAGED = Op(
    name="fwd_paged",
    version=2,
    computes="(query tile, tile head, batch entry) of one split of its keys",
    tensors=(
        *(a.Q, K, V, OUT, LSE),
        *(a.CU_SEQLENS_Q, a.SEQUSED_Q, a.SEQUSED_K, a.LEFTPAD_K, a.PAGE_TABLE, a.SINK, a.ALIBI_SLOPES),
        *(a.K_DESCALE, a.V_DESCALE),
    ),
    scalars=(
        *a.numbers("pack_magic page_magic batch heads_q heads_kv seqlen_q seqlen_k"),
        Scalar("seqlen_k_new", "i32", "keys that the call has appended behind seqused_k", source="seqlen_new"),
        *a.numbers("head_dim head_dim_v window_left window_right pack pack_shift sink_low alibi_stride_b"),
        *a.numbers("page_size page_shift page_table_stride num_splits k_descale_stride_b v_descale_stride_b"),
        *a.numbers("scale_log2 softcap_scale"),
    ),
    letters=(*a.TILE, a.Q_STEPS),
    features=(Feature(a.E4M3, "the cache is float8_e4m3fn", ptx="sm_89"),),
    grid="tiles_heads_batch",
    shared_by="num_splits",
    no_gradient="over a cache",
    facts=(*a.CALL_FACTS, a.KV_DTYPE),
    launched_with=("kv_append", "fwd_combine"),
)
