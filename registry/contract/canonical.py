"""Canonical JSON, its digests, and the checks of what was read from JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from registry.contract.errors import ContractError, IntegrityError

DIGEST = re.compile("[0-9a-f]{64}")  # SHA-256


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def check_bytes(data: bytes, digest: str, what: str) -> None:
    """IntegrityError ('sha256') unless `digest` names these bytes."""
    found = sha256_hex(data)
    if found != digest:
        raise IntegrityError(f"{what} {digest[:12]}…: its bytes hash to {found[:12]}…", reason="sha256")


def check_digest(value: object, what: str = "digest") -> str:
    """`value` if it is a lower-case hex SHA-256, else ContractError."""
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise ContractError(f"{what}: {value!r:.100} is not 64 lower-case hex digits")
    return value


def check_fields(value: Any, what: str, types: Mapping[str, type]) -> None:
    """Exactly these keys with these types, else ContractError."""
    if not isinstance(value, dict):
        raise ContractError(f"{what}: {type(value).__name__} instead of an object")
    if value.keys() != types.keys():
        raise ContractError(f"{what}: fields {sorted(value.keys() ^ types.keys())[:5]} are missing or unknown")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise ContractError(f"{what}: {name} is {type(value[name]).__name__}, expected {kind.__name__}")
