"""A variant assembled for one architecture, as an index lists it."""

from __future__ import annotations

from typing import Any

from registry.contract.arch import check_arch
from registry.contract.canonical import check_digest, check_fields
from registry.contract.errors import ContractError
from registry.contract.grid import Grid
from registry.contract.record import Record
from registry.contract.storage import MAX_CONTENT

_LEAST = dict.fromkeys(("cubin_size", "frame_size", "threads"), 1)
_MOST = dict.fromkeys(("cubin_size", "frame_size"), MAX_CONTENT)
_JSON_TYPES: dict[str, type] = {"str": str, "int": int, "Grid": dict, "tuple[tuple[str, int], ...]": dict}


class Artifact(Record):
    """A variant assembled for one architecture.

    cubin_sha256/cubin_size: identity, conflict checks, cache name. frame_sha256/frame_size: its one zstd frame
    (blob address, ETag). smem: dynamic shared memory in bytes. spills: bytes of spill stores + loads.
    blocks_per_sm: at SM120's limits. hot_loop: instructions that every iteration of the hottest loop executes.
    min_driver: the oldest driver as cuDriverGetVersion states it (12080 is CUDA 12.8).
    """

    variant: str
    arch: str
    symbol: str
    abi: str
    grid: Grid
    threads: int
    smem: int
    static_smem: int
    registers: int
    spills: int
    stack: int
    blocks_per_sm: int
    hot_loop: tuple[tuple[str, int], ...]
    cubin_sha256: str
    cubin_size: int
    frame_sha256: str
    frame_size: int
    ptx_sha256: str
    toolchain: str
    min_driver: int

    def to_json(self) -> dict[str, Any]:
        value = dict(self.__dict__)
        value["grid"] = {"rule": self.grid.rule, "tile_m": self.grid.tile_m}
        value["hot_loop"] = dict(self.hot_loop)
        return value

    @classmethod
    def from_json(cls, value: Any) -> Artifact:
        from registry.contract.variant import Variant  # here: clients, who trust a digest, read no keys

        check_fields(value, "artifact", ARTIFACT_FIELDS)
        fields = dict(value)
        check_fields(fields["grid"], "grid", {"rule": str, "tile_m": int})
        fields["grid"] = Grid(**fields["grid"])
        if not all(type(n) is int for n in fields["hot_loop"].values()):
            raise ContractError("artifact: hot_loop counts must be integers")
        fields["hot_loop"] = tuple(sorted(fields["hot_loop"].items()))
        for name in ("abi", "cubin_sha256", "frame_sha256", "ptx_sha256"):
            check_digest(fields[name], f"artifact {name}")
        for name, kind in cls.__annotations__.items():
            if kind == "int" and not _LEAST.get(name, 0) <= fields[name] <= _MOST.get(name, 2**31 - 1):
                raise ContractError(f"artifact: {name} {fields[name]!r:.50} is out of range")
        check_arch(fields["arch"])
        Variant.parse(fields["variant"])
        return cls(**fields)


ARTIFACT_FIELDS = {name: _JSON_TYPES[kind] for name, kind in Artifact.__annotations__.items()}  # in JSON
