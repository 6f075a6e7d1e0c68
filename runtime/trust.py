"""What may be loaded is decided here, and nowhere else.

A registry file counts as local only if it exists, this user or root owns it and nobody else can write it, its -wal or
its folder; everything else is remote. A local registry's channels are believed. From a remote one only indexes whose
digest was given, by `configure(index=…)` or CUBINERY_INDEX, are accepted; everything below an index is held by its
hashes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from runtime.config import Pins
from runtime.errors import UntrustedError
from runtime.source import EmbeddedSource, Source


def resolve(
    source: Source, channel: str, pins: Pins = (), arch_of: Callable[[str], str] | None = None
) -> dict[str, str]:
    """{arch: index digest} that may be loaded from `source`.

    Given digests (`pins`) are all that counts where there are any; `arch_of(digest)` tells what a digest without an
    architecture is for. Raises UntrustedError for a remote source without given digests, but SourceError
    ('no_registry') for a missing file: what comes to lie there meanwhile is not opened.
    """
    if pins:
        return {arch or (arch_of(digest) if arch_of else ""): digest for arch, digest in pins}
    problem = why_remote(source)
    if problem:
        if isinstance(source, EmbeddedSource):
            source.check_present()
        raise UntrustedError(
            f"{source.where}: {problem}, so an index is accepted only by a digest that you give: "
            "runtime.configure(index='<digest>') or CUBINERY_INDEX=<digest> (or sm_120=<digest>,sm_90=<digest>). "
            "`python -m builder` prints it; get it from whoever built the registry, not from the server"
        )
    return source.channel(channel)


def why_remote(source: Source) -> str | None:
    """Why a source does not count as local; None if it does."""
    if not isinstance(source, EmbeddedSource):
        return "it is a server"
    real = os.path.realpath(source.path)
    folders = (os.path.dirname(source.path), os.path.dirname(real))  # of a link, and of what it names
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
