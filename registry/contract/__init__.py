"""What builder, registry, server and runtime agree on: names, layouts and the index. Standard library only.

Everything here is immutable, compares by value, and turns into canonical JSON and back without loss. This file hands
on what the files beside it define, and imports each when one of its names is first asked for: a call needs few of them.
`kernels` imports from the files themselves: a fingerprint then covers what a kernel uses.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.contract.abi import PARAM_FORMATS as PARAM_FORMATS
    from registry.contract.abi import WINDOW_OPEN as WINDOW_OPEN
    from registry.contract.abi import Abi as Abi
    from registry.contract.abi import Param as Param
    from registry.contract.arch import ARCH as ARCH
    from registry.contract.arch import MAX_SMEM as MAX_SMEM
    from registry.contract.arch import check_arch as check_arch
    from registry.contract.artifact import ARTIFACT_FIELDS as ARTIFACT_FIELDS
    from registry.contract.artifact import Artifact as Artifact
    from registry.contract.canonical import DIGEST as DIGEST
    from registry.contract.canonical import canonical_json as canonical_json
    from registry.contract.canonical import check_bytes as check_bytes
    from registry.contract.canonical import check_digest as check_digest
    from registry.contract.canonical import check_fields as check_fields
    from registry.contract.canonical import sha256_hex as sha256_hex
    from registry.contract.dispatch import Condition as Condition
    from registry.contract.dispatch import DispatchRow as DispatchRow
    from registry.contract.division import fast_divmod as fast_divmod
    from registry.contract.errors import ContractError as ContractError
    from registry.contract.errors import CubineryError as CubineryError
    from registry.contract.errors import IntegrityError as IntegrityError
    from registry.contract.grid import GRID_RULES as GRID_RULES
    from registry.contract.grid import Grid as Grid
    from registry.contract.index import MAX_WHOLE as MAX_WHOLE
    from registry.contract.index import Index as Index
    from registry.contract.index import Read as Read
    from registry.contract.index import part_digests as part_digests
    from registry.contract.index import verified_part as verified_part
    from registry.contract.opened import OpenIndex as OpenIndex
    from registry.contract.opened import Served as Served
    from registry.contract.parts import ENTRY_FIELDS as ENTRY_FIELDS
    from registry.contract.parts import PART_FIELDS as PART_FIELDS
    from registry.contract.parts import PART_ROWS as PART_ROWS
    from registry.contract.parts import bounds as bounds
    from registry.contract.parts import check_entry as check_entry
    from registry.contract.parts import check_part as check_part
    from registry.contract.parts import common_conditions as common_conditions
    from registry.contract.parts import is_part as is_part
    from registry.contract.parts import parts_of as parts_of
    from registry.contract.parts import read_part as read_part
    from registry.contract.record import Record as Record
    from registry.contract.record import derived as derived
    from registry.contract.storage import ALL_DTYPES as ALL_DTYPES
    from registry.contract.storage import CHANNEL as CHANNEL
    from registry.contract.storage import DTYPES as DTYPES
    from registry.contract.storage import FORMAT as FORMAT
    from registry.contract.storage import INDEX_FIELDS as INDEX_FIELDS
    from registry.contract.storage import MAX_CONTENT as MAX_CONTENT
    from registry.contract.storage import PARTED as PARTED
    from registry.contract.storage import PARTED_FIELDS as PARTED_FIELDS
    from registry.contract.storage import RELATIONS as RELATIONS
    from registry.contract.storage import SCHEMA as SCHEMA
    from registry.contract.storage import TUF_PATH as TUF_PATH
    from registry.contract.variant import Variant as Variant

_FILES = {
    "abi": "PARAM_FORMATS WINDOW_OPEN Param Abi",
    "arch": "MAX_SMEM ARCH check_arch",
    "artifact": "Artifact ARTIFACT_FIELDS",
    "canonical": "DIGEST canonical_json sha256_hex check_bytes check_digest check_fields",
    "dispatch": "Condition DispatchRow",
    "division": "fast_divmod",
    "errors": "CubineryError ContractError IntegrityError",
    "grid": "GRID_RULES Grid",
    "index": "MAX_WHOLE Read Index part_digests verified_part",
    "opened": "Served OpenIndex",
    "parts": "PART_ROWS ENTRY_FIELDS PART_FIELDS parts_of bounds "
    "common_conditions check_entry read_part check_part is_part",
    "record": "derived Record",
    "storage": "SCHEMA MAX_CONTENT CHANNEL TUF_PATH FORMAT "
    "PARTED INDEX_FIELDS PARTED_FIELDS DTYPES ALL_DTYPES RELATIONS",
    "variant": "Variant",
}  # file -> the names that it defines
_FILE_OF = {name: file for file, names in _FILES.items() for name in names.split()}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
