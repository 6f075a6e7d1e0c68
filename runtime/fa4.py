"""FlashAttention-4's functions, `flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_combine`, in its order."""

from runtime.api.combine import flash_attn_combine
from runtime.api.fa4 import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func"]
