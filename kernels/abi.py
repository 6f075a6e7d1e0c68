"""The kernels' parameter lists, one per op. No cutlass import.

Order is the order of the kernel's own signature. A null pointer means that the optional input is absent.
Strides are in elements and multiples of 8 unless said otherwise; lengths are in tokens; a window side that is open
is `registry.contract.WINDOW_OPEN`.
"""

from registry.contract import Abi, Param


def _params(kind: str, names: str) -> tuple[Param, ...]:
    return tuple(Param(name, kind) for name in names.split())


FWD = Abi(
    op="fwd",
    version=3,
    params=(
        # Pointers change with every call and lead the list, so that the runtime rewrites them in one piece.
        *_params("ptr", "q k v o lse"),
        # leftpad_k: (batch,) int32; the first keys of an entry that do not exist. Clamped to 0 … the entry's end, which
        # cu_seqlens_k and seqused_k say as without it.
        *_params("ptr", "cu_seqlens_q cu_seqlens_k seqused_q seqused_k leftpad_k sink alibi_slopes"),
        # A packed (varlen) array has batch stride 0: cu_seqlens places its entries.
        *_params("i64", "q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h"),
        *_params("i64", "v_stride_b v_stride_s v_stride_h o_stride_b o_stride_s o_stride_h"),
        # The LSE is contiguous along seqlen_q; its strides may be any number.
        *_params("i64", "lse_stride_b lse_stride_h"),
        # n // pack is n · pack_magic >> pack_shift for 0 ≤ n < 2**31 (`registry.contract.division`).
        *_params("i64", "pack_magic"),
        # seqlen_q, seqlen_k: of an entry, or of the whole array (total tokens) where cu_seqlens is given; what
        # cu_seqlens and seqused say is clamped to that. Together they are below 2**30, and seqlen_q · pack is at
        # most 2**31 − 2**10. head_dim, head_dim_v: at most the variant's.
        *_params("i32", "batch heads_q heads_kv seqlen_q seqlen_k head_dim head_dim_v window_left window_right"),
        # pack: query heads that share a tile's rows (1, or all of a group: row r is head r % pack of token r // pack).
        *_params("i32", "pack pack_shift"),
        # sink is fp32 or, with sink_low = 1, of q's dtype. alibi_stride_b (any number ≥ 0) is 0 for slopes per head
        # alone; batch · alibi_stride_b + heads_q is below 2**31, as are batch and heads_q by themselves.
        *_params("i32", "sink_low alibi_stride_b"),
        # A score s·scale_log2 is a power of 2. With softcap_scale ≠ 0, s first becomes tanh(s·softcap_scale / 2·ln 2):
        # scale_log2 = softcap · log2(e) and softcap_scale = 2 · log2(e) · softmax_scale / softcap then.
        *_params("f32", "scale_log2 softcap_scale"),
    ),
)

FWD_PAGED = Abi(
    op="fwd_paged",
    version=2,
    params=(
        # o: the output or, with num_splits > 1, fp32 partial outputs; lse alike. Their strides say where each split's
        # lie.
        *_params("ptr", "q k v o lse"),
        # leftpad_k as in FWD; of the pages and the table's places before it nothing is read.
        *_params("ptr", "cu_seqlens_q seqused_q seqused_k leftpad_k page_table sink alibi_slopes k_descale v_descale"),
        # k and v are (pages, page_size, heads_kv, head_dim): *_stride_b goes from page to page.
        *_params("i64", "q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h"),
        *_params("i64", "v_stride_b v_stride_s v_stride_h o_stride_b o_stride_s o_stride_h o_stride_split"),
        *_params("i64", "lse_stride_b lse_stride_h lse_stride_split"),
        *_params("i64", "pack_magic page_magic"),
        # seqlen_q as in FWD, and the bounds of lengths. seqlen_k: tokens that a table's row has room for; seqused_k +
        # seqlen_k_new, clamped to that, is how many an entry has. Without seqused_k it has seqlen_k.
        *_params("i32", "batch heads_q heads_kv seqlen_q seqlen_k seqlen_k_new head_dim head_dim_v"),
        *_params("i32", "window_left window_right pack pack_shift sink_low alibi_stride_b"),
        # Without page_table an entry's only page is the one with its number. A negative page of a key that exists is
        # read as page 0. k_stride_s and v_stride_s are below 2**31 where a page has more than one key. num_splits: at
        # most 2**16. Strides of descales: any number.
        *_params("i32", "page_size page_shift page_table_stride num_splits k_descale_stride_b v_descale_stride_b"),
        *_params("f32", "scale_log2 softcap_scale"),
    ),
)

FWD_COMBINE = Abi(
    op="fwd_combine",
    version=1,
    params=(
        # o_partial: fp32, (splits, rows, head_dim_v), row = (b · seqlen + s) · heads + h, contiguous but for its first
        # stride. lse: null if it is not wanted. rows and num_splits: at most 2**31 − 32.
        *_params("ptr", "o_partial lse_partial o lse"),
        *_params("i64", "o_partial_stride_split lse_partial_stride_split"),
        *_params("i64", "lse_partial_stride_b lse_partial_stride_s lse_partial_stride_h"),
        *_params("i64", "o_stride_b o_stride_s o_stride_h lse_stride_b lse_stride_s lse_stride_h"),
        *_params("i32", "num_splits rows seqlen heads head_dim_v"),
    ),
)

KV_APPEND = Abi(
    op="kv_append",
    version=1,
    params=(
        # k_new, v_new (batch, seqlen_new, heads_kv, ·) go into the cache k, v; q (batch, seqlen_q, heads_q, head_dim)
        # goes, rotated, to q_out. Either pair may be absent. Their rows, 2 · batch · seqlen_new · heads_kv and batch ·
        # seqlen_q · heads_q, are at most 2**31 − 32.
        *_params("ptr", "k_new v_new k v q q_out rotary_cos rotary_sin seqused_k page_table k_descale v_descale"),
        *_params("i64", "k_new_stride_b k_new_stride_s k_new_stride_h v_new_stride_b v_new_stride_s v_new_stride_h"),
        *_params("i64", "k_stride_b k_stride_s k_stride_h v_stride_b v_stride_s v_stride_h"),
        *_params("i64", "q_stride_b q_stride_s q_stride_h q_out_stride_b q_out_stride_s q_out_stride_h page_magic"),
        # Token i of k_new belongs at position seqused_k + i, of the cache's row: whatever fwd_paged's leftpad_k says.
        # Positions below 0, from seqlen_k on, or whose page in the table is negative are not written. q's token i
        # is rotated as of position seqused_k + i, or seqused_k with q_still. rotary_cos and _sin: (rotary_rows,
        # rotary_dim / 2), their row stride rotary_stride; positions behind their end take the last row.
        *_params("i32", "batch heads_q heads_kv seqlen_new seqlen_q seqlen_k head_dim head_dim_v"),
        *_params("i32", "rotary_dim rotary_rows rotary_stride interleaved q_still"),
        *_params("i32", "page_size page_shift page_table_stride k_descale_stride_b v_descale_stride_b"),
    ),
)

ROWS = 128

# The backward's workspaces hold rows of queries in tiles of ROWS: entry b of a dense q begins at row
# b · ⌈seqlen_q / ROWS⌉ · ROWS, and of a packed one that begins at token t at row (⌊t / ROWS⌋ + b) · ROWS. rows: of all
# entries. lse_log2 and delta are (heads_q, rows). dq_accum is (heads_q, rows / 16, head_dim / 8, 32, 4): lane l of a
# unit of 16 rows × 8 columns holds rows l // 4 and l // 4 + 8 of columns 2·(l % 4) and the next, as an mma leaves them.
# semaphores: (heads_q, rows / 16), int32.
BWD_PREPROCESS = Abi(
    op="bwd_preprocess",
    version=1,
    params=(
        *_params("ptr", "o dout lse dlse lse_log2 delta dq_accum semaphores"),
        *_params("ptr", "cu_seqlens_q seqused_q"),
        *_params("i64", "o_stride_b o_stride_s o_stride_h dout_stride_b dout_stride_s dout_stride_h"),
        # Of lse and dlse any numbers; rows: a multiple of ROWS.
        *_params("i64", "lse_stride_b lse_stride_h dlse_stride_b dlse_stride_s dlse_stride_h rows"),
        # seqlen_q as in FWD. head_dim_accum: that of dq_accum, a multiple of 32.
        *_params("i32", "batch heads_q seqlen_q head_dim_v head_dim_accum"),
    ),
)

BWD = Abi(
    op="bwd",
    version=1,
    params=(
        *_params("ptr", "q k v dout lse_log2 delta dq_accum dk dv"),
        # dk_partial, dv_partial: fp32 (splits, [batch,] seqlen_k, heads_kv, ·), contiguous but for the first stride,
        # written in place of dk and dv where they are given. semaphores: given, additions to dq_accum are in order.
        # dalibi: (tiles of keys of all entries, heads_q), written where a tile has keys.
        *_params("ptr", "dk_partial dv_partial cu_seqlens_q cu_seqlens_k seqused_q seqused_k alibi_slopes dalibi"),
        *_params("ptr", "semaphores"),
        *_params("i64", "q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h"),
        *_params("i64", "v_stride_b v_stride_s v_stride_h dout_stride_b dout_stride_s dout_stride_h"),
        *_params("i64", "dk_stride_b dk_stride_s dk_stride_h dv_stride_b dv_stride_s dv_stride_h"),
        *_params("i64", "dk_partial_stride_split dv_partial_stride_split rows"),
        # splits: blocks that share the query heads of a key/value head; divides heads_q / heads_kv.
        *_params("i32", "batch heads_q heads_kv seqlen_q seqlen_k head_dim head_dim_v window_left window_right"),
        *_params("i32", "splits alibi_stride_b"),
        # As in FWD; slope_scale is log2(e) / scale_log2; dk is softmax_scale times the sum of its products.
        *_params("f32", "scale_log2 softcap_scale slope_scale softmax_scale"),
    ),
)

BWD_POSTPROCESS = Abi(
    op="bwd_postprocess",
    version=1,
    params=(
        *_params("ptr", "dq_accum dq cu_seqlens_q seqused_q"),
        *_params("i64", "dq_stride_b dq_stride_s dq_stride_h rows"),
        *_params("i32", "batch heads_q seqlen_q head_dim head_dim_accum"),
        # dq is softmax_scale · dq_accum.
        *_params("f32", "softmax_scale"),
    ),
)

ABIS = {abi.op: abi for abi in (FWD, FWD_PAGED, FWD_COMBINE, KV_APPEND, BWD_PREPROCESS, BWD, BWD_POSTPROCESS)}
