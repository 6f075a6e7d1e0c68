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
    version=1,
    params=(
        # The first five change with every call; the runtime rewrites only them on its hot path.
        *_params("ptr", "q k v o lse"),
        # Slots of later issues, null for now.
        *_params("ptr", "cu_seqlens_q cu_seqlens_k seqused_q seqused_k page_table sink alibi_slopes"),
        *_params("ptr", "o_partial lse_partial k_descale v_descale"),
        *_params("i64", "q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h"),
        *_params("i64", "v_stride_b v_stride_s v_stride_h o_stride_b o_stride_s o_stride_h"),
        # The LSE is contiguous along seqlen_q; its strides may be any number.
        *_params("i64", "lse_stride_b lse_stride_h"),
        *_params("i32", "batch heads_q heads_kv seqlen_q seqlen_k window_left window_right"),
        *_params("i32", "page_size page_table_stride num_splits"),
        # scale_log2 = softmax_scale · log2(e); with softcap > 0, scores are softcap · tanh(scale · s / softcap).
        *_params("f32", "scale_log2 softcap"),
    ),
)

ABIS = {abi.op: abi for abi in (FWD,)}
