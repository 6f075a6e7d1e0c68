"""The registry's part of the error tree."""

from __future__ import annotations

from registry.contract import CubineryError


class StoreError(CubineryError):
    """The registry file, or something in it, cannot be read or written.

    reason: 'missing', 'not_a_registry', 'empty', 'newer', 'older', 'permission', 'readonly', 'busy', 'full',
    'corrupt', 'integrity', 'not_found', 'argument', 'conflict' or 'store' (anything else that SQLite reports).
    """

    reason = "store"


class ConflictError(StoreError):
    """The same fingerprint is already stored with other content. Nothing was overwritten."""

    reason = "conflict"
