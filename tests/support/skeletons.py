"""PTX instructions that planted faults look for."""

from __future__ import annotations

from kernels import dispatch
from registry.contract import Variant
from tests.kernels.cases import loops

VARIANTS = [variant for variant in dispatch.variants() if variant.op == "fwd_paged"]


def skeletons() -> list[Variant]:
    """The smallest variant of each kind of loop, of bf16."""
    large_first = sorted(VARIANTS, key=lambda v: (-v.size("m"), -v.head_dim, -v.head_dim_v))
    return list({loops(v): v for v in large_first if v.dtype == "bf16"}.values())


SKELETONS = skeletons()
