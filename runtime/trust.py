"""What may be loaded is decided here, and nowhere else.

A registry file counts as local only if this user or root owns it and nobody else can write it, its -wal or its folder;
everything else is remote. A local registry's channels are believed. From a remote one only indexes whose digest was
given, by `configure(index=…)` or CUBINERY_INDEX, are accepted; everything below an index is held by its hashes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from runtime.config import Pins
from runtime.errors import UntrustedError
from runtime.source import EmbeddedSource, Source


def resolve(
    source: Source, channel: str, pins: Pins = (), arch_of: Callable[[str], str] | None = None
) -> dict[str, str]:
    """{arch: index digest} that may be loaded from `source`.

    Given digests (`pins`) are all that counts where there are any; `arch_of(digest)` tells what a digest without an
    architecture is for. Raises UntrustedError for a remote source without given digests.
    """
    if pins:
        return {arch or (arch_of(digest) if arch_of else ""): digest for arch, digest in pins}
    problem = why_remote(source)
    if problem:
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
    if not os.path.exists(real):
        return None  # reading it will say so
    folders = (os.path.dirname(source.path), os.path.dirname(real))  # of a link, and of what it names
    beside = (real + suffix for suffix in ("-wal", "-shm", "-journal"))
    return next(filter(None, map(_writable_by_others, (real, *folders, *beside))), None)


def _writable_by_others(path: str) -> str | None:
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return None  # a -wal of a writer that has just left
    if facts.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {facts.st_uid}, neither to you nor to root (chown it)"
    if facts.st_mode & 0o022:
        return f"{path} can be written by others (chmod go-w it)"
    return None
