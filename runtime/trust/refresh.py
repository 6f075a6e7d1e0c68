"""From a remote source and a trusted root to a channel's indexes, through TUF. Runs on a miss and when asked for.

Each refresh works in a private copy of the metadata, and what it has verified is merged into the shared state by
version: processes that refresh at once neither disturb each other nor lower what is known.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from registry.contract import ContractError
from registry.errors import ReleaseError
from runtime.config import Config
from runtime.errors import InstallError, SourceError, UntrustedError
from runtime.trust.state import State, Trusted, read_root

if TYPE_CHECKING:
    from registry.releases.client import Client
    from runtime.sources import Source


def refresh(source: Source, channel: str, settings: Config) -> Trusted:
    """Ask the source for its newest release; what holds is kept and returned.

    A server's release must be fresh. That of a folder or file claims no freshness: signatures, hashes, versions and
    the targets' expiry count. Raises UntrustedError, whose reason says what does not hold, and SourceError.
    """
    try:
        from registry.releases.client import Client, Known, merge
    except ImportError as error:
        raise InstallError(f"signed releases need tuf ({error}): pip install 'cubinery[remote]'") from None
    root = read_root(settings.root)
    state = State(settings.state_folder, source.where, root)

    def fetch(path: str, cap: int) -> bytes | None:
        try:
            return source.tuf(path, cap)
        except SourceError as error:
            if error.reason == "missing":
                return None
            raise

    def combine(stored: bytes | None) -> tuple[bytes, int]:
        merged = merge(root, Known.from_bytes(stored or b""), client.known)
        return merged.to_bytes(), merged.versions()["targets"]

    known = Known.from_bytes(state.metadata() or b"")
    where = f"{source.where}: channel {channel!r}"
    try:
        with Client(fetch, root, known, fresh=settings.remote) as client:
            found = None
            try:
                client.refresh()
                found = _trusted(client, channel)
            finally:
                newest = state.merge(combine, channel, found)
    except ReleaseError as error:
        raise UntrustedError(f"{where}: {error}{_hint(error.reason)}", reason=error.reason) from None
    except ContractError as error:
        raise UntrustedError(f"{where}: {error}", reason="metadata") from None
    assert newest is not None
    return newest


def _trusted(client: Client, name: str) -> Trusted:
    document, targets = client.channel(name), client.targets
    expires, timestamp_expires = targets.expires.timestamp(), client.timestamp.expires.timestamp()
    return Trusted(targets.version, document.indexes, time.time(), expires, timestamp_expires, document.yanked)


def _hint(reason: str) -> str:
    return {
        "expired": "; whoever runs the registry must sign it anew, or this machine's clock is wrong",
        "missing": "; name a registry that is signed, or pin an index",
        "rollback": "; the source is older than what was seen before: a stale mirror, or an attack",
    }.get(reason, "")
