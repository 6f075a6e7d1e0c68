"""The builder's errors, all under `registry.contract.CubineryError`."""

from builder import misplaced

if problem := misplaced("registry"):  # a foreign `registry` has no error tree of ours to raise from
    raise ImportError(problem)

from registry.contract import CubineryError


class BuildError(CubineryError):
    """Root of the builder's errors.

    BuildError
    ├── AssembleError   nvJitLink refuses the PTX
    ├── InspectError    a cubin, nvJitLink's log or nvdisasm's text does not read as expected
    ├── ToolchainError  a tool or package is missing, or `kernels` is somebody else's
    ├── LedgerError     the conformance list or a ledger file does not read as expected
    ├── ResultsError    a tuning result that `accept` cannot believe
    └── UsageError      an argument of the command line that cannot be met
    """

    reason = "build"


class AssembleError(BuildError):
    """nvJitLink refuses the PTX; the message holds its error log."""

    reason = "assemble"


class InspectError(BuildError):
    """A cubin, nvJitLink's log or nvdisasm's text does not read as expected."""

    reason = "inspect"


class ToolchainError(BuildError):
    """A part of the toolchain is missing or is not the one that the builder needs."""

    reason = "toolchain"


class LedgerError(BuildError):
    """tests/gpu/conformance.json or a line of a ledger file does not follow docs/design.md 'Verification'."""

    reason = "ledger"


class ResultsError(BuildError):
    """A tuning result that `accept` cannot believe. reason: 'results' (not one), 'dims' (head dims that the table has
    not), 'stale' (of other PTX than the builder makes now, or against another table)."""

    reason = "results"


class UsageError(BuildError):
    """An argument that cannot be met; the message names what would be accepted."""

    reason = "usage"
