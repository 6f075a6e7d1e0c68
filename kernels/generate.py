"""From a variant to PTX: the one entry point of this room for the builder."""

from __future__ import annotations

from kernels import parts, validity
from kernels.trunk.generated import Generated
from registry.contract.errors import ContractError
from registry.contract.variant import Variant


def generate(variant: Variant, dump_dir: str) -> Generated:
    """Compile one variant to PTX. Imports cutlass: call it in a worker whose CUTE_DSL_ARCH was set before.

    dump_dir: an existing folder of the caller's own, for the DSL's intermediate files. ContractError for a variant that
    cannot be built.
    """
    if reason := validity.invalid(variant):
        raise ContractError(f"{variant.key}: {reason}")
    generated: Generated = parts.part(variant.op, parts.KERNEL).generate(variant, dump_dir)
    return generated
