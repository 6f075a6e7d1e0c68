"""The registry's part of the error tree."""

from __future__ import annotations

from registry.contract.errors import CubineryError


class StoreError(CubineryError):
    """The registry file, or something in it, cannot be read or written.

    reason: 'missing', 'not_a_registry', 'empty', 'newer', 'permission', 'readonly', 'busy', 'full',
    'corrupt', 'too_long', 'integrity', 'not_found', 'argument', 'conflict' or 'store' (anything else).
    """

    reason = "store"


class ConflictError(StoreError):
    """The same fingerprint is already stored with other content. Nothing was overwritten."""

    reason = "conflict"


class ReleaseError(CubineryError):
    """A signed release that cannot be made, or that does not hold.

    reason: 'root' (no usable root metadata), 'signature' (too few valid ones), 'rollback' (a version lower than known),
    'expired', 'mismatch' (length or hash), 'metadata' (anything else in the files), 'no_channel', 'missing' (a file),
    'keys' (too few, unreadable or readable by others), 'argument', 'yanked', 'version' (an upload that does not follow
    on what is there) or 'upload' (the server refused).
    """

    reason = "metadata"
