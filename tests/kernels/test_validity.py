"""The table holds only tiles that can be built, and the predicate names what is wrong with others."""

from __future__ import annotations

import pytest

from kernels import dispatch
from kernels.validity import invalid, smem
from registry.contract import MAX_SMEM, Variant


@pytest.mark.parametrize("variant", dispatch.variants(), ids=lambda v: v.key)
def test_the_table_is_valid(variant):
    assert invalid(variant) is None
    assert smem(variant) <= MAX_SMEM


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("fwd-bf16-d256-dv256-m128-n16-w8-s2", "copy 32 rows"),  # these two crashed a GPU process before the check
        ("fwd-bf16-d128-dv128-m192-n32-w6-s1", "copy 24 rows"),
        ("fwd-bf16-d128-dv128-m128-n128-w8-s2", "bytes of shared memory"),
        ("fwd-bf16-d72-dv72-m64-n64-w4-s1", "multiple of 32"),
        ("fwd-bf16-d128-dv128-m64-n32-w8-s1", "each of 8 warps"),
        ("fwd-bf16-d64-dv64-m64-n64-w4-s3", "stages"),
        ("fwd_paged-bf16-d128-dv128-m16-n32-w1-s2-q4", "none of Q stays in registers or all of it"),
        ("fwd_paged-bf16-d128-dv128-m16-n32-w1-s2-e4m3kv", "needs Q in registers"),
        ("fwd_paged-bf16-d96-dv96-m16-n32-w1-s2-q6-e4m3kv", "multiple of 64"),
        ("fwd_paged-bf16-d256-dv256-m64-n64-w4-s2", "bytes of shared memory"),
        ("fwd_paged-bf16-d128-dv128-m64-n16-w8-s2", "copy 32 rows of Q and 32 of K"),
        ("fwd_combine-bf16-d96-dv96-m4", "multiple of 128"),
        ("kv_append-bf16-d128-dv128-m4", "are 256"),
        ("bwd-bf16-d128-dv128-m64-n128-w8-s2", "bytes of shared memory"),
        ("bwd_preprocess-bf16-d128-dv128-m128", "are 256"),
        ("bwd_postprocess-bf16-d256-dv256-m64", "128 rows"),
        ("bwd_sum-bf16-d128-dv128-m8", "are 256"),
        ("bwd_sum-bf16-d256-dv256-m33", "1 to 32 units"),
        ("bwd_sum-fp32-d256-dv256-m8", "dtype fp32: variants of bwd_sum are of bf16, fp16"),
        ("fwd-bf16-d64-dv64-m64-n64-w4", "a tile of fwd is like m…-n…-w…-s…[-q…][-a…]"),
        ("fwd_paged-bf16-d64-dv64-m64-n64-w4-s1-paged", "is like m…-n…-w…-s…[-q…][-e4m3kv]"),
    ],
)
def test_what_cannot_be_built_says_why(key, reason):
    variant = Variant.parse(key)
    assert reason in (invalid(variant) or "")
