"""The runtime's part of the error tree. Every message names the argument or setting and what would be accepted.

CubineryError                       registry.contract
├── ContractError   (ValueError)    registry.contract: an index or ABI that does not follow the contract
├── ArgumentError   (ValueError)    an argument of a call; `argument` names it
├── ConfigError     (ValueError)    configure() or an environment variable
├── InstallError    (ImportError)   a package is missing, or stands in the wrong place
├── NoKernelError   (LookupError)   no kernel serves this call on this GPU; `rejections` says why
├── CaptureError    (RuntimeError)  a kernel would have to be loaded while a CUDA graph is captured
├── SourceError     (OSError)       a registry, server or cache that cannot give what is asked
│   └── UntrustedError              an index that nothing vouches for
├── IntegrityError  (ValueError)    registry.contract: wrong bytes: size, hash, frame, ELF, architecture, parameters
└── DriverError     (RuntimeError)  the CUDA driver is absent, too old, or refused; `status` is its code
"""

from __future__ import annotations

from collections.abc import Sequence

from registry.contract import ContractError, CubineryError, IntegrityError

__all__ = [
    "ArgumentError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "CubineryError",
    "DriverError",
    "InstallError",
    "IntegrityError",
    "NoKernelError",
    "SourceError",
    "UntrustedError",
]


class ArgumentError(CubineryError, ValueError):
    """An argument that cannot be served. `argument` is its name; reason: type, dtype, rank, device, shape, ..."""

    def __init__(self, argument: str, message: str, *, reason: str):
        super().__init__(f"{argument}: {message}", reason=reason)
        self.argument = argument
        self._message = message

    def renamed(self, argument: str) -> ArgumentError:
        """The same under the name that the caller's function has for the argument."""
        return ArgumentError(argument, self._message, reason=self.reason)


class ConfigError(CubineryError, ValueError):
    """A setting that cannot be used."""

    reason = "config"


class InstallError(CubineryError, ImportError):
    """A package that is missing or comes from the wrong place."""

    reason = "install"


class NoKernelError(CubineryError, LookupError):
    """No kernel for a call. reason: 'arch' (no index for the GPU), 'row' (no dispatch row), 'variant' (not built),
    'not_locked' (not in the lock file).

    rejections: one (variant key, why) for each dispatch row, nearest first.
    """

    reason = "row"

    def __init__(self, message: str, *, reason: str, rejections: Sequence[tuple[str, str]] = ()):
        super().__init__(message, reason=reason)
        self.rejections = tuple(rejections)


class CaptureError(CubineryError, RuntimeError):
    """A load would be needed during CUDA graph capture. Run the call once before capturing."""

    reason = "capture"


class SourceError(CubineryError, OSError):
    """A registry, server or cache that cannot give what is asked.

    reason: no_registry, unreadable, schema, no_channel, missing, offline, url, client, unreachable, status, redirect,
    too_long, deadline, cache_owner, state_owner, stale (the trusted state is older than max_age).
    """

    reason = "source"


class UntrustedError(SourceError):
    """Nothing vouches for an index: the registry is remote, or others can write it, and no digest or root was given
    ('untrusted'), or what a given root should vouch for does not hold.

    reason: untrusted, signature, rollback, expired, mismatch (length or hash), metadata (anything else in it), missing
    (no signed release there), no_channel, yanked.
    """

    reason = "untrusted"


class DriverError(CubineryError, RuntimeError):
    """No driver that serves. reason: no_driver, old_driver, fork, status (then `status` is the driver's code)."""

    reason = "status"

    def __init__(self, message: str, *, reason: str | None = None, status: int = 0):
        super().__init__(message, reason=reason)
        self.status = status
