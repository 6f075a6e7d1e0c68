"""The architectures that artifacts are for: their names, and what their chips give a block."""

import re

from registry.contract.errors import ContractError

MAX_SMEM = 101_376  # bytes of shared memory a block may use on SM120


ARCH = re.compile(r"sm_[1-9][0-9]{1,2}")


def check_arch(value: object) -> str:
    """`value` if it is an architecture such as 'sm_120', else ContractError. 'a' and 'f' targets are refused."""
    if not isinstance(value, str) or not ARCH.fullmatch(value):
        raise ContractError(f"arch: {value!r:.100} is not like 'sm_120' ('a' and 'f' targets are not shipped)")
    return value
