"""What builder, registry, server and runtime agree on: names, layouts and the index. Standard library only.

Everything here is immutable, compares by value, and turns into canonical JSON and back without loss. This file hands
on what the files beside it define. `kernels` imports from those instead: a fingerprint then covers what a kernel uses.
"""

from registry.contract.abi import PARAM_FORMATS, WINDOW_OPEN, Abi, Param
from registry.contract.arch import MAX_SMEM, check_arch
from registry.contract.artifact import Artifact
from registry.contract.canonical import canonical_json, check_digest, check_fields, sha256_hex
from registry.contract.dispatch import Condition, DispatchRow
from registry.contract.division import fast_divmod
from registry.contract.elf import ELF_HEADER, ELF_MACHINE_CUDA, elf_machine
from registry.contract.errors import ContractError, CubineryError
from registry.contract.grid import GRID_RULES, Grid
from registry.contract.index import FORMAT, Index
from registry.contract.storage import CHANNEL, MAX_CONTENT, SCHEMA, TUF_PATH
from registry.contract.variant import ALL_DTYPES, DTYPES, Variant

__all__ = [
    "ALL_DTYPES",
    "CHANNEL",
    "DTYPES",
    "ELF_HEADER",
    "ELF_MACHINE_CUDA",
    "FORMAT",
    "GRID_RULES",
    "MAX_CONTENT",
    "MAX_SMEM",
    "PARAM_FORMATS",
    "SCHEMA",
    "TUF_PATH",
    "WINDOW_OPEN",
    "Abi",
    "Artifact",
    "Condition",
    "ContractError",
    "CubineryError",
    "DispatchRow",
    "Grid",
    "Index",
    "Param",
    "Variant",
    "canonical_json",
    "check_arch",
    "check_digest",
    "check_fields",
    "elf_machine",
    "fast_divmod",
    "sha256_hex",
]
