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
    version=2,
    params=(
        # Pointers change with every call and lead the list, so that the runtime rewrites them in one piece.
        *_params("ptr", "q k v o lse"),
        *_params("ptr", "cu_seqlens_q cu_seqlens_k seqused_q seqused_k page_table sink alibi_slopes"),
        # Slots of later issues, null for now.
        *_params("ptr", "o_partial lse_partial k_descale v_descale"),
        # A packed (varlen) array has batch stride 0: cu_seqlens places its entries.
        *_params("i64", "q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h"),
        *_params("i64", "v_stride_b v_stride_s v_stride_h o_stride_b o_stride_s o_stride_h"),
        # The LSE is contiguous along seqlen_q; its strides may be any number.
        *_params("i64", "lse_stride_b lse_stride_h"),
        # n // pack is n · pack_magic >> pack_shift for 0 ≤ n < 2**31 (`registry.contract.division`).
        *_params("i64", "pack_magic"),
        # seqlen_q, seqlen_k: of an entry, or of the whole array (total tokens) where cu_seqlens is given; what
        # cu_seqlens and seqused say is clamped to that. head_dim, head_dim_v: at most the variant's.
        *_params("i32", "batch heads_q heads_kv seqlen_q seqlen_k head_dim head_dim_v window_left window_right"),
        # pack: query heads that share a tile's rows (1, or all of a group: row r is head r % pack of token r // pack).
        *_params("i32", "pack pack_shift"),
        # sink is fp32 or, with sink_low = 1, of q's dtype. alibi_stride_b (any number) is 0 for slopes per head alone.
        *_params("i32", "sink_low alibi_stride_b"),
        *_params("i32", "page_size page_table_stride num_splits"),
        # A score s·scale_log2 is a power of 2. With softcap_scale ≠ 0, s first becomes tanh(s·softcap_scale / 2·ln 2):
        # scale_log2 = softcap · log2(e) and softcap_scale = 2 · log2(e) · softmax_scale / softcap then.
        *_params("f32", "scale_log2 softcap_scale"),
    ),
)

ABIS = {abi.op: abi for abi in (FWD,)}
