"""Where indexes and frames come from. Nothing that a source gives is trusted or verified here.

A source has `where` (for messages), `channel(name) -> {arch: digest}`, `index(digest) -> bytes` of an index's document
or of a part, `frame(artifact) -> bytes`, `tuf(path, cap) -> bytes` of a file below v1/tuf/, SourceError ('missing') if
it has none, and `discard(kind, digest) -> bool`: whether a cached copy was set aside, so that asking again may give
other bytes. `close()` ends the connections that nobody is using; a source may be used after it. `anyone`: why what it
gives may come from anybody; '' for a file, whose owner and mode say so. `check_present()` raises SourceError
('no_registry') where a file or folder is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from registry.contract import Artifact


class Source(Protocol):
    where: str
    anyone: str

    def channel(self, name: str) -> dict[str, str]: ...
    def index(self, digest: str) -> bytes: ...
    def frame(self, artifact: Artifact) -> bytes: ...
    def tuf(self, path: str, cap: int) -> bytes: ...
    def discard(self, kind: str, digest: str) -> bool: ...
    def check_present(self) -> None: ...
    def close(self) -> None: ...
