"""The lock file: the only indexes and kernels that may be loaded, online or offline, whatever a channel says.

`python -m runtime lock` writes it: canonical JSON, {"format": 1, "indexes": {arch: digest}, "artifacts": [{"variant",
"arch", "sha256", "size", "frame_sha256", "frame_size"}, …], "shapes": [call facts that they serve, …]}; sha256 and size
are the cubin's. Whoever can write it decides what is loaded, so it must not be writable by others.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from registry.contract import Artifact, ContractError, Variant, canonical_json, check_arch, check_digest
from runtime.config import read_trusted
from runtime.errors import ConfigError, NoKernelError

FORMAT = 1
DEFAULT = "cubinery.lock"  # in the working folder, where `lock` writes when nothing names another
MAX_FILE = 16 << 20  # bytes


class Locked(NamedTuple):
    """One kernel of a lock file."""

    variant: str
    arch: str
    sha256: str
    size: int
    frame_sha256: str
    frame_size: int

    @classmethod
    def of(cls, artifact: Artifact) -> Locked:
        a = artifact
        return cls(a.variant, a.arch, a.cubin_sha256, a.cubin_size, a.frame_sha256, a.frame_size)


@dataclass(frozen=True)
class LockFile:
    """indexes: {arch: index digest}. artifacts: by architecture and variant. shapes: partly known call facts."""

    path: str
    indexes: Mapping[str, str]
    artifacts: tuple[Locked, ...]
    shapes: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def _locked(self) -> frozenset[Locked]:
        return frozenset(self.artifacts)

    def names(self, artifact: Artifact) -> bool:
        """Whether these very bytes are locked."""
        return Locked.of(artifact) in self._locked

    def check(self, artifact: Artifact) -> None:
        """NoKernelError ('not_locked') unless the file names these very bytes; says which command would add them."""
        if self.names(artifact):
            return
        v = Variant.parse(artifact.variant)
        shape = f"--op {v.op} --dtype {v.dtype} --head-dim {v.head_dim} --head-dim-v {v.head_dim_v}"
        raise NoKernelError(
            f"{artifact.variant} for {artifact.arch} is not in the lock file {self.path}, and nothing else is loaded. "
            f"To add it: python -m runtime lock --add --lock {shlex.quote(self.path)} --arch {artifact.arch} {shape}",
            reason="not_locked",
        )

    def no_arch(self, capability: tuple[int, int]) -> NoKernelError:
        """The error for a GPU that none of the file's indexes is for."""
        return NoKernelError(
            f"the lock file {self.path} has no index for this GPU (sm_{capability[0]}{capability[1]}), but for "
            f"{', '.join(sorted(self.indexes)) or 'none'}. To lock every architecture that the registry has: "
            f"python -m runtime lock --lock {shlex.quote(self.path)}",
            reason="not_locked",
        )

    def to_bytes(self) -> bytes:
        """Equal locks give equal bytes, whatever order they were put together in."""
        kernels = [locked._asdict() for locked in sorted(self._locked)]
        value = {"format": FORMAT, "indexes": dict(self.indexes), "artifacts": kernels, "shapes": list(self.shapes)}
        return canonical_json(value) + b"\n"

    def write(self) -> None:
        """Replace the file, whole or not at all. ConfigError if it cannot be written."""
        temporary = f"{self.path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                os.fchmod(file.fileno(), 0o644)  # read back only if others cannot write it
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise ConfigError(f"lock: {self.path} cannot be written ({error.strerror})") from None


def read(path: str) -> LockFile:
    """The lock file at `path`. ConfigError if there is none, others can write it, or it is no lock file."""
    try:
        value = json.loads(read_trusted(path, "lock", MAX_FILE))
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ContractError(f"accepted is format {FORMAT}, as `python -m runtime lock` writes it")
        if value.keys() != {"format", "indexes", "artifacts", "shapes"}:
            raise ContractError("it has other keys than format, indexes, artifacts and shapes")
        indexes = {check_arch(arch): check_digest(digest) for arch, digest in value["indexes"].items()}
        for name in ("artifacts", "shapes"):
            if not isinstance(value[name], list) or not all(isinstance(item, dict) for item in value[name]):
                raise ContractError(f"{name} is no list of objects")
        return LockFile(path, indexes, tuple(map(_locked, value["artifacts"])), tuple(value["shapes"]))
    except ConfigError:
        raise
    except (ContractError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise ConfigError(f"lock: {path} is no lock file: {error}") from None


def _locked(item: dict[str, Any]) -> Locked:
    if item.keys() != set(Locked._fields):
        raise ContractError(f"an artifact is not an object of {', '.join(Locked._fields)}")
    for name in ("sha256", "frame_sha256"):
        check_digest(item[name], f"artifact {name}")
    if not all(type(item[name]) is int and item[name] > 0 for name in ("size", "frame_size")):
        raise ContractError("an artifact's size is no positive number")
    check_arch(item["arch"])
    Variant.parse(item["variant"])
    return Locked(**item)


def merged(path: str, old: LockFile | None, indexes: Mapping[str, str], artifacts: Iterable[Artifact],
           shapes: Iterable[Mapping[str, Any]]) -> LockFile:  # fmt: skip
    """What is to be written: with `old`, its kernels and shapes besides."""
    kept, served = (old.artifacts, list(old.shapes)) if old else ((), [])
    served += [shape for shape in shapes if shape not in served]
    return LockFile(path, dict(indexes), tuple({*kept, *map(Locked.of, artifacts)}), tuple(served))
