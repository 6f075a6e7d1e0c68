"""What builder, registry, server and runtime agree on: names, layouts and the index. Standard library only.

Everything here is immutable, compares by value, and turns into canonical JSON and back without loss. This file hands
on what the files beside it define. `kernels` imports from those instead: a fingerprint then covers what a kernel uses.
"""

from registry.contract.abi import PARAM_FORMATS, WINDOW_OPEN, Abi, Param
from registry.contract.arch import ARCH, MAX_SMEM, check_arch
from registry.contract.artifact import ARTIFACT_FIELDS, Artifact
from registry.contract.canonical import DIGEST, canonical_json, check_digest, check_fields, sha256_hex
from registry.contract.dispatch import RELATIONS, Condition, DispatchRow
from registry.contract.division import fast_divmod
from registry.contract.errors import ContractError, CubineryError, IntegrityError
from registry.contract.grid import GRID_RULES, Grid
from registry.contract.index import FORMAT, INDEX_FIELDS, Index
from registry.contract.opened import OpenIndex, Served
from registry.contract.storage import CHANNEL, MAX_CONTENT, SCHEMA, TUF_PATH
from registry.contract.variant import ALL_DTYPES, DTYPES, Variant

__all__ = [
    "ALL_DTYPES",
    "ARCH",
    "ARTIFACT_FIELDS",
    "CHANNEL",
    "DIGEST",
    "DTYPES",
    "FORMAT",
    "GRID_RULES",
    "INDEX_FIELDS",
    "MAX_CONTENT",
    "MAX_SMEM",
    "PARAM_FORMATS",
    "RELATIONS",
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
    "IntegrityError",
    "OpenIndex",
    "Param",
    "Served",
    "Variant",
    "canonical_json",
    "check_arch",
    "check_digest",
    "check_fields",
    "fast_divmod",
    "sha256_hex",
]
