"""`flash_attn_func` and `flash_attn_varlen_func` with FlashAttention-4's arguments, in its order."""

from runtime.api.fa4 import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
