"""What may be loaded is decided here, and nowhere else.

A registry file counts as local only if it exists, this user or root owns it and nobody else can write it, its -wal or
its folder; everything else is remote. A local registry's channels are believed. From a remote one are accepted only
indexes whose digest was given, by `configure(index=…)` or CUBINERY_INDEX, and those that a signed release names, whose
root was given by `configure(root=…)` or CUBINERY_ROOT; everything below an index is held by its hashes.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.config import Config, Pins
from runtime.errors import SourceError, UntrustedError
from runtime.sources import Source

if TYPE_CHECKING:
    from runtime.trust.state import Trusted


def resolve(
    source: Source,
    channel: str,
    pins: Pins = (),
    arch_of: Callable[[str], str] | None = None,
    settings: Config | None = None,
    newest: bool = False,
) -> dict[str, str]:
    """{arch: index digest} that may be loaded from `source`.

    Given digests (`pins`) are all that counts where there are any; `arch_of(digest)` tells what a digest without an
    architecture is for. Then a local source's channel, then the release that the root of `settings` vouches for: as it
    was verified last, or with `newest` as the source has it now. Raises UntrustedError for a remote source without
    either, but SourceError ('no_registry') for a missing file: what comes to lie there meanwhile is not opened.
    """
    if pins:
        return {arch or (arch_of(digest) if arch_of else ""): digest for arch, digest in pins}
    problem = why_remote(source)
    if not problem:
        return source.channel(channel)
    source.check_present()
    if settings is not None and settings.root:
        return _signed(source, channel, settings, newest)
    raise UntrustedError(
        f"{source.where}: {problem}, so an index is accepted only if a root that you give vouches for it, "
        "runtime.configure(root='root.json') or CUBINERY_ROOT=root.json, or by a digest that you give: "
        "runtime.configure(index='<digest>') or CUBINERY_INDEX=<digest> (or sm_120=<digest>,sm_90=<digest>). "
        "`python -m registry keys` writes the one, `python -m builder` prints the other; get either from whoever built "
        "the registry, not from the server"
    )


def trusted(source: Source, channel: str, settings: Config) -> Trusted | None:
    """What was verified last of a channel under the given root: no TUF, no network. None if nothing was."""
    from runtime.trust.state import State, read_root  # here: who believes a file or given digests needs no state

    return State(settings.state_folder, source.where, read_root(settings.root)).read(channel)


def _signed(source: Source, channel: str, settings: Config, newest: bool) -> dict[str, str]:
    found = None if newest else trusted(source, channel, settings)
    if found is None or _is_stale(found, settings.max_age):
        if settings.offline and settings.remote:
            what = (
                "was never verified here"
                if found is None
                else f"was last verified more than {settings.max_age:g} s ago"
            )
            message = f"{source.where}: offline, and channel {channel!r} {what}; run `python -m runtime refresh` online"
            raise SourceError(message, reason="offline" if found is None else "stale")
        from runtime.trust.refresh import refresh  # TUF takes 130 ms to import

        found = refresh(source, channel, settings)
    for arch, digest in found.indexes.items():
        if digest in found.yanked:
            message = f"{source.where}: the index of channel {channel!r} for {arch}, {digest}, was yanked"
            raise UntrustedError(message, reason="yanked")
    return found.indexes


def _is_stale(found: Trusted, max_age: float | None) -> bool:
    """A clock that was set back makes it stale too."""
    return max_age is not None and not 0 <= time.time() - found.checked_at <= max_age


def why_remote(source: Source) -> str | None:
    """Why a source does not count as local; None if it does."""
    if source.anyone:
        return source.anyone
    real = os.path.realpath(source.where)
    folders = (os.path.dirname(source.where), os.path.dirname(real))  # of a link, and of what it names
    # Folders first: once nobody else can write them, what is found in them stays as it is judged.
    for path in (*folders, real, *(real + suffix for suffix in ("-wal", "-shm", "-journal"))):
        try:
            problem = _writable_by_others(path, os.stat(path))
        except FileNotFoundError:  # of these files a writer that has just left takes its own with it
            problem = None if path.startswith(real + "-") else f"{path} does not exist"
        except OSError as error:
            problem = f"{path} cannot be examined ({error.strerror})"
        if problem:
            return problem
    return None


def _writable_by_others(path: str, facts: os.stat_result) -> str | None:
    if stat.S_ISDIR(facts.st_mode) and (facts.st_mode & stat.S_ISVTX or facts.st_uid != os.geteuid()):
        cure = "move the registry to a folder of your own"  # /tmp is to stay as it is
    else:
        cure = "chown it, or move the registry" if facts.st_uid != os.geteuid() else "chmod go-w it"
    if facts.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {facts.st_uid}, neither to you nor to root ({cure})"
    if facts.st_mode & 0o022:
        return f"{path} can be written by others ({cure})"
    return None
