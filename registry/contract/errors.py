"""The root of the error tree, and the error of what does not follow the contract."""


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


class ContractError(CubineryError, ValueError):
    """A key, ABI, artifact or index that does not follow the contract."""

    reason = "contract"


class IntegrityError(CubineryError, ValueError):
    """Wrong bytes. reason: size, sha256, zstd, elf, arch, abi, index."""

    reason = "integrity"
