"""The root of the error tree, and what all rooms share of it."""

from __future__ import annotations

from typing import Any


class CubineryError(Exception):
    """Root of every error that Cubinery raises on purpose.

    `reason` is a short stable code for programs; the message is for people.

    CubineryError
    ├── ContractError (ValueError)  a key, ABI or index that does not follow the contract
    ├── IntegrityError (ValueError) bytes that are not those that a digest names
    ├── registry.errors: StoreError, ConflictError, ReleaseError
    ├── builder.errors: BuildError, …
    ├── benchmarks.cubins: BenchmarkError
    └── runtime.errors: ArgumentError, NoKernelError, SourceError, DriverError, …
    """

    reason = "error"

    def __init__(self, message: str, *, reason: str | None = None):
        super().__init__(message)
        if reason is not None:
            self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which would call __init__ with `args` alone: an error in a worker of a pool would then
        end the pool's own thread."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[CubineryError], args: tuple[Any, ...], state: dict[str, Any]) -> CubineryError:
    error = kind.__new__(kind, *args)
    builtin = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    vars(builtin)["__init__"](error, *args)  # OSError's args and ImportError's msg are made there
    error.__dict__.update(state)
    return error


class ContractError(CubineryError, ValueError):
    """A key, ABI, artifact or index that does not follow the contract."""

    reason = "contract"


class IntegrityError(CubineryError, ValueError):
    """Wrong bytes. reason: size, sha256, zstd, elf, arch, abi, index."""

    reason = "integrity"
