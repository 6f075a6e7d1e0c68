"""The table holds only tiles that can be built, and the predicate names what is wrong with others."""

from __future__ import annotations

import pytest

from kernels import dispatch
from kernels.validity import fwd_invalid, fwd_smem
from registry.contract import MAX_SMEM, Variant


@pytest.mark.parametrize("variant", dispatch.variants(), ids=lambda v: v.key)
def test_the_table_is_valid(variant):
    assert fwd_invalid(variant) is None
    assert fwd_smem(variant) <= MAX_SMEM


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("fwd-bf16-d256-dv256-m128-n16-w8-s2", "copy 32 rows"),  # these two crashed a GPU process before the check
        ("fwd-bf16-d128-dv128-m192-n32-w6-s1", "copy 24 rows"),
        ("fwd-bf16-d128-dv128-m128-n128-w8-s2", "bytes of shared memory"),
        ("fwd-bf16-d72-dv72-m64-n64-w4-s1", "multiple of 32"),
        ("fwd-bf16-d128-dv128-m64-n32-w8-s1", "each of 8 warps"),
        ("fwd-bf16-d64-dv64-m64-n64-w4-s3", "stages"),
    ],
)
def test_what_cannot_be_built_says_why(key, reason):
    assert reason in (fwd_invalid(Variant.parse(key)) or "")
