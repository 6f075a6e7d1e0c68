"""What every source checks in an answer before anything is verified: its length, its form, the path asked for."""

from __future__ import annotations

import json
import re
from typing import Any

from registry.contract import TUF_PATH, ContractError, check_arch, check_digest
from runtime.errors import SourceError

MAX_INDEX = 64 << 20  # bytes
MAX_CHANNEL = 1 << 20


def too_long(where: str, cap: int) -> SourceError:
    return SourceError(f"{where}: longer than the {cap} bytes that it may have", reason="too_long")


def as_channel(found: Any, what: str, reason: str) -> dict[str, str]:
    """{arch: digest} if it is that, else SourceError with this reason."""
    try:
        for arch, digest in found.items():
            check_arch(arch)
            check_digest(digest)
        return dict(found)
    except (ContractError, AttributeError) as error:
        raise SourceError(f"{what} is no channel: {error}", reason=reason) from None


def document(body: bytes, what: str, reason: str) -> dict[str, str]:
    """{arch: digest} of a channel document, as servers and mirrors give it, else SourceError with this reason."""
    try:
        found = json.loads(body)["indexes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SourceError(f"{what} is no channel document", reason=reason) from None
    return as_channel(found, what, reason)


def tuf_path(path: str, where: str) -> str:
    """`path` if it names a file below v1/tuf/, else SourceError ('missing'): no source has such a file."""
    if not re.fullmatch(TUF_PATH, path):
        raise SourceError(f"{where}: {path!r:.100} is no name below v1/tuf/", reason="missing")
    return path
