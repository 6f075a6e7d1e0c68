"""What builder, registry, server and runtime agree on: names, layouts and the index. Standard library only.

Everything here is immutable, compares by value, and turns into canonical JSON and back without loss.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

FORMAT = 2  # of the index; a client refuses an index of another format
SCHEMA = 2  # of the registry file, the user_version in its header: the number of registry.store's migrations

DTYPES = ("bf16", "fp16")  # of queries
ALL_DTYPES = (*DTYPES, "fp32")  # of a variant: fp32 is for outputs alone
PARAM_FORMATS = {"ptr": "Q", "i32": "i", "i64": "q", "f32": "f"}
GRID_RULES = ("tiles_heads_batch", "key_tiles_heads_batch", "rows")
MAX_CONTENT = 64 << 20  # bytes of one cubin or PTX text, and of the frame that holds it
MAX_SMEM = 101_376  # bytes of shared memory a block may use on SM120
WINDOW_OPEN = 2**30  # window_left / window_right of a side that is open; real bounds are below it
ELF_MACHINE_CUDA = 190
ELF_HEADER = 64  # bytes of a 64-bit ELF header


class CubineryError(Exception):
    """Root of every error that Cubinery raises on purpose.

    `reason` is a short stable code for programs; the message is for people.

    CubineryError
    ├── ContractError (ValueError)  a key, ABI or index that does not follow the contract
    ├── registry.errors: StoreError, ConflictError
    ├── builder.errors: BuildError, …
    ├── benchmarks.cubins: BenchmarkError
    └── runtime.errors: ArgumentError, NoKernelError, SourceError, IntegrityError, DriverError, …
    """

    reason = "error"

    def __init__(self, message: str, *, reason: str | None = None):
        super().__init__(message)
        if reason is not None:
            self.reason = reason


CHANNEL = "[a-z0-9][a-z0-9._-]{0,63}"  # what a channel's name looks like, whole
TUF_PATH = r"(targets/)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}"  # of a file below v1/tuf/: no way out of it


class ContractError(CubineryError, ValueError):
    """A key, ABI, artifact or index that does not follow the contract."""

    reason = "contract"


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def check_digest(value: object, what: str = "digest") -> str:
    """`value` if it is a lower-case hex SHA-256, else ContractError."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ContractError(f"{what}: {value!r:.100} is not 64 lower-case hex digits")
    return value


def check_arch(value: object) -> str:
    """`value` if it is an architecture such as 'sm_120', else ContractError. 'a' and 'f' targets are refused."""
    if not isinstance(value, str) or not re.fullmatch(r"sm_[1-9][0-9]{1,2}", value):
        raise ContractError(f"arch: {value!r:.100} is not like 'sm_120' ('a' and 'f' targets are not shipped)")
    return value


def elf_machine(content: bytes) -> tuple[int, str]:
    """(e_machine, architecture) that an ELF file's header states: (190, 'sm_120') for a cubin.

    The architecture means nothing for another machine. ContractError for what is no 64-bit little-endian ELF file, or
    a cubin whose ABI version is not 7 or 8: where its flags hold the architecture depends on that.
    """
    header = content[:ELF_HEADER]
    if len(header) < ELF_HEADER or header[:6] != b"\x7fELF\x02\x01":
        raise ContractError(f"no 64-bit little-endian ELF file: it starts with {header[:6]!r}")
    machine, flags = struct.unpack_from("<18xH28xI", header)
    abi_version = header[8]
    if machine == ELF_MACHINE_CUDA and abi_version not in (7, 8):
        raise ContractError(f"the cubin's ELF ABI version is {abi_version}, this code reads 7 and 8")
    return machine, f"sm_{flags >> 8 & 0xFF if abi_version == 8 else flags & 0xFF}"


_KEY = re.compile(
    r"(?P<op>[a-z]+(?:_[a-z]+)*)-(?P<dtype>[a-z][a-z0-9]+)-d(?P<d>[1-9]\d{0,3})-dv(?P<dv>[1-9]\d{0,3})"
    r"(?P<tile>(?:-[a-z](?:0|[1-9]\d{0,4}))*)(?P<features>(?:-[a-z][a-z0-9_]*[a-z_])*)"
)


@dataclass(frozen=True, order=True)
class Variant:
    """An op with its compile-time choices.

    tile: (letter, number) pairs in the op's own order, e.g. (("m", 128), ("n", 64), ("w", 4), ("s", 1)):
    rows of a query tile, columns of a key tile, warps, stages.
    features: sorted names of compiled-in features, e.g. ("paged",); a name ends in a letter.
    """

    op: str
    dtype: str
    head_dim: int
    head_dim_v: int
    tile: tuple[tuple[str, int], ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ALL_DTYPES:
            raise ContractError(f"variant: dtype {self.dtype!r} is none of {', '.join(ALL_DTYPES)}")
        if list(self.features) != sorted(set(self.features)):
            raise ContractError(f"variant: features {self.features} are not sorted and unique")
        if len(dict(self.tile)) != len(self.tile):
            raise ContractError(f"variant: tile {self.tile} names a letter twice")
        if not _KEY.fullmatch(self.key):
            raise ContractError(f"variant: {self.key!r} is not a well-formed key")

    @property
    def key(self) -> str:
        """For example 'fwd-bf16-d128-dv128-m128-n64-w4-s1-paged'."""
        tile = "".join(f"-{letter}{number}" for letter, number in self.tile)
        return f"{self.op}-{self.dtype}-d{self.head_dim}-dv{self.head_dim_v}{tile}" + "".join(
            f"-{name}" for name in self.features
        )

    @classmethod
    def parse(cls, key: str) -> Variant:
        """The exact inverse of `key`. Raises ContractError for any other text."""
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise ContractError(f"variant key {key!r:.200} is not like 'fwd-bf16-d128-dv128-m128-n64-w4-s1'")
        tile = tuple((part[0], int(part[1:])) for part in match["tile"].split("-")[1:])
        features = tuple(match["features"].split("-")[1:])
        variant = cls(match["op"], match["dtype"], int(match["d"]), int(match["dv"]), tile, features)
        if variant.key != key:
            raise ContractError(f"variant key {key!r} is not in its canonical form {variant.key!r}")
        return variant

    def size(self, letter: str) -> int:
        """One number of the tile; 0 if it is not written. `kernels.validity` says what the letters of an op mean."""
        return dict(self.tile).get(letter, 0)


@dataclass(frozen=True)
class Param:
    """One kernel parameter. type: 'ptr' (8 bytes), 'i32', 'i64' or 'f32'."""

    name: str
    type: str

    def __post_init__(self) -> None:
        if self.type not in PARAM_FORMATS:
            raise ContractError(f"param {self.name!r}: type {self.type!r} is none of {', '.join(PARAM_FORMATS)}")

    @property
    def size(self) -> int:
        return struct.calcsize(PARAM_FORMATS[self.type])


@dataclass(frozen=True)
class Abi:
    """An op's ordered kernel parameters; the same for all variants of the op."""

    op: str
    version: int
    params: tuple[Param, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.params]
        if len(set(names)) != len(names):
            raise ContractError(f"abi of {self.op}: a parameter name occurs twice")

    @cached_property
    def layout(self) -> tuple[tuple[int, int], ...]:
        """(offset, size) in bytes of each parameter: C order, natural alignment, as cuKernelGetParamInfo reports."""
        places, offset = [], 0
        for p in self.params:
            offset = -(-offset // p.size) * p.size
            places.append((offset, p.size))
            offset += p.size
        return tuple(places)

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that holds all parameters."""
        return sum(self.layout[-1]) if self.params else 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, types, order and version: offsets alone would not see two swapped parameters."""
        return sha256_hex(canonical_json(self.to_json()))

    def pack(self, values: Mapping[str, int | float]) -> bytearray:
        """The parameter buffer. `values` must name every parameter and no other."""
        if values.keys() != {p.name for p in self.params}:
            wrong = sorted(values.keys() ^ {p.name for p in self.params})
            raise ContractError(f"abi of {self.op} v{self.version}: parameters {wrong} are missing or unknown")
        buffer = bytearray(self.nbytes)
        for p, (offset, _) in zip(self.params, self.layout, strict=True):
            try:
                struct.pack_into("<" + PARAM_FORMATS[p.type], buffer, offset, values[p.name])
            except (struct.error, OverflowError) as error:
                raise ContractError(f"abi of {self.op}: {p.name}={values[p.name]!r} is no {p.type}: {error}") from None
        return buffer

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "version": self.version, "params": [[p.name, p.type] for p in self.params]}

    @classmethod
    def from_json(cls, value: Any) -> Abi:
        _keys(value, "abi", {"op": str, "version": int, "params": list})
        params = []
        for pair in value["params"]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
                raise ContractError(f"abi: parameter {pair!r:.100} is not [name, type]")
            params.append(Param(*pair))
        return cls(value["op"], value["version"], tuple(params))


@dataclass(frozen=True)
class Grid:
    """How many blocks a call launches, as data.

    rule 'tiles_heads_batch': a block for each query tile, tile head and batch entry, in one dimension. `pack` query
    heads share a tile head. Entries of a packed (varlen) array lie anywhere: the device gives the one that starts at
    token c, number b, the tiles from c·pack // tile_m + b on, which is always enough.
    rule 'key_tiles_heads_batch': the same for tiles of tile_m keys and heads of keys.
    rule 'rows': a block for each tile_m of the rows that the call counts itself.
    """

    rule: str
    tile_m: int

    def __post_init__(self) -> None:
        if self.rule not in GRID_RULES:
            raise ContractError(f"grid: rule {self.rule!r} is none of {', '.join(GRID_RULES)}; update the client")
        if self.tile_m < 1:
            raise ContractError(f"grid: tile_m {self.tile_m} is not positive")

    def blocks(self, facts: Mapping[str, Any], pack: int = 1) -> int:
        """Blocks of a call with these facts. pack: 1, or heads_q / heads_kv."""
        if self.rule == "rows":
            return -(-facts["rows"] // self.tile_m)
        batch: int = facts["batch"]
        if self.rule == "key_tiles_heads_batch":
            heads, total, seqlen = facts["heads_kv"], facts["total_k"] if facts["varlen_k"] else None, facts["seqlen_k"]
        else:
            heads = facts["heads_q"] // pack
            total = facts["total_q"] * pack if facts.get("varlen") else None
            seqlen = facts["seqlen_q"] * pack
        if total is None:
            tiles = -(-seqlen // self.tile_m) * batch
        else:
            tiles = total // self.tile_m + batch if total and batch else 0
        blocks: int = tiles * heads
        return blocks


def division(divisor: int) -> tuple[int, int]:
    """(magic, shift) with n // divisor == n · magic >> shift for 0 ≤ n < 2**31, the product below 2**63.

    Granlund & Montgomery, Division by Invariant Integers using Multiplication, 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


@dataclass(frozen=True)
class Artifact:
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
        _keys(value, "artifact", {name: _FIELD_TYPES[t] for name, t in cls.__annotations__.items()})
        fields = dict(value)
        _keys(fields["grid"], "grid", {"rule": str, "tile_m": int})
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


_LEAST = dict.fromkeys(("cubin_size", "frame_size", "threads"), 1)
_MOST = dict.fromkeys(("cubin_size", "frame_size"), MAX_CONTENT)
_FIELD_TYPES: dict[str, type] = {"str": str, "int": int, "Grid": dict, "tuple[tuple[str, int], ...]": dict}

_CONDITIONS: dict[str, Any] = {
    "==": lambda fact, value: fact == value,
    "<=": lambda fact, value: fact <= value,
    ">=": lambda fact, value: fact >= value,
    "in": lambda fact, value: fact in value,
}


@dataclass(frozen=True)
class Condition:
    """`fact op value`: op is '==', '<=', '>=' or 'in' (value then is a tuple)."""

    fact: str
    op: str
    value: Any

    def __post_init__(self) -> None:
        if self.op not in _CONDITIONS:
            raise ContractError(f"condition: {self.op!r} is none of {', '.join(_CONDITIONS)}; update the client")

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether the fact meets the condition. A fact that the caller does not state is a ContractError."""
        if self.fact not in facts:
            raise ContractError(f"condition on {self.fact!r}, a fact this client does not know; update the client")
        try:
            return bool(_CONDITIONS[self.op](facts[self.fact], self.value))
        except TypeError:  # such as 'bf16' <= 64
            raise ContractError(f"condition {self}: cannot be compared with {facts[self.fact]!r:.100}") from None

    def __str__(self) -> str:
        return f"{self.fact} {self.op} {list(self.value) if isinstance(self.value, tuple) else self.value}"


@dataclass(frozen=True)
class DispatchRow:
    """When all conditions hold, `variant` (a key) serves the call. Rows are ordered: the first that holds wins.

    pack: the query heads of a key/value head share tiles ("packed GQA").
    """

    op: str
    when: tuple[Condition, ...]
    variant: str
    pack: bool = False

    def to_json(self) -> dict[str, Any]:
        when = [[c.fact, c.op, list(c.value) if isinstance(c.value, tuple) else c.value] for c in self.when]
        return {"op": self.op, "when": when, "variant": self.variant, "pack": self.pack}

    @classmethod
    def from_json(cls, value: Any) -> DispatchRow:
        _keys(value, "dispatch row", {"op": str, "when": list, "variant": str, "pack": bool})
        when = []
        for c in value["when"]:
            if not isinstance(c, list) or len(c) != 3 or not isinstance(c[0], str) or not isinstance(c[1], str):
                raise ContractError(f"dispatch row: condition {c!r:.100} is not [fact, op, value]")
            values = c[2] if isinstance(c[2], list) else [c[2]]
            if not all(isinstance(v, (str, int)) for v in values) or isinstance(c[2], list) != (c[1] == "in"):
                raise ContractError(f"dispatch row: condition {c!r:.100} has a value of the wrong type")
            if c[1] in ("<=", ">=") and not isinstance(c[2], int):
                raise ContractError(f"dispatch row: condition {c!r:.100} compares with no number")
            when.append(Condition(c[0], c[1], tuple(c[2]) if isinstance(c[2], list) else c[2]))
        Variant.parse(value["variant"])
        return cls(value["op"], tuple(when), value["variant"], value["pack"])


@dataclass(frozen=True)
class Index:
    """The immutable list of one release's artifacts for one architecture, with dispatch rows and ABIs.

    Addressed by the SHA-256 of `to_bytes()`. No timestamps: equal inputs give equal digests.
    """

    arch: str
    release: str
    artifacts: tuple[Artifact, ...]
    rows: tuple[DispatchRow, ...]
    abis: tuple[Abi, ...]
    by_variant: dict[str, Artifact] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_arch(self.arch)
        object.__setattr__(self, "by_variant", {a.variant: a for a in self.artifacts})
        if len(self.by_variant) != len(self.artifacts):
            raise ContractError("index: a variant is listed twice")
        if len({(abi.op, abi.version) for abi in self.abis}) != len(self.abis):
            raise ContractError("index: an ABI of one op and version is listed twice")
        digests = {abi.digest for abi in self.abis}
        for a in self.artifacts:
            if a.arch != self.arch:
                raise ContractError(f"index: {a.variant} is for {a.arch}, the index for {self.arch}")
            if a.abi not in digests:
                raise ContractError(f"index: {a.variant} names an ABI that the index does not list")

    def abi(self, digest: str) -> Abi:
        return next(a for a in self.abis if a.digest == digest)

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "format": FORMAT,
                "arch": self.arch,
                "release": self.release,
                "artifacts": [a.to_json() for a in sorted(self.artifacts, key=lambda a: a.variant)],
                "rows": [r.to_json() for r in self.rows],
                "abis": [a.to_json() for a in sorted(self.abis, key=lambda a: (a.op, a.version))],
            }
        )

    @cached_property
    def digest(self) -> str:
        return sha256_hex(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Index:
        """Parse and validate. Raises ContractError, and nothing else, for any bytes that are no index."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ContractError(f"index: not JSON: {error}") from None
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise ContractError(f"index: format {value.get('format')!r:.50}, this client reads {FORMAT}; update it")
        _keys(
            value,
            "index",
            {"format": int, "arch": str, "release": str, "artifacts": list, "rows": list, "abis": list},
        )
        return cls(
            value["arch"],
            value["release"],
            tuple(Artifact.from_json(a) for a in value["artifacts"]),
            tuple(DispatchRow.from_json(r) for r in value["rows"]),
            tuple(Abi.from_json(a) for a in value["abis"]),
        )


def _keys(value: Any, what: str, types: Mapping[str, type]) -> None:
    """Exactly these keys with these types, else ContractError."""
    if not isinstance(value, dict):
        raise ContractError(f"{what}: {type(value).__name__} instead of an object")
    if value.keys() != types.keys():
        raise ContractError(f"{what}: fields {sorted(value.keys() ^ types.keys())[:5]} are missing or unknown")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise ContractError(f"{what}: {name} is {type(value[name]).__name__}, expected {kind.__name__}")
