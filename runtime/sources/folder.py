"""A mirror's folder as a source: `python -m registry export DIR` writes it, with the paths that a server has."""

from __future__ import annotations

import os
import re

from registry.contract import CHANNEL, Artifact, check_digest
from registry.errors import StoreError
from registry.untrusted import read_file
from runtime.errors import SourceError
from runtime.sources.answers import MAX_CHANNEL, MAX_INDEX, document, tuf_path


class FolderSource:
    """A folder that anybody may have written: nothing in it is trusted, and only regular files in it are read.

    Frames are read where they lie, without the disk cache. Raises SourceError: no_registry, unreadable, missing,
    no_channel, too_long.
    """

    anyone = "it is a folder, which may come from anywhere"

    def __init__(self, path: str):
        self.path = os.path.abspath(path)
        self.where = self.path

    def channel(self, name: str) -> dict[str, str]:
        what = f"{self.path}: channel {name!r:.100}"
        if not re.fullmatch(CHANNEL, name):
            raise SourceError(f"{what}: a name is 1 to 64 of a-z 0-9 . _ -", reason="no_channel")
        try:
            body = self._read(os.path.join("channels", name), what, MAX_CHANNEL)
        except SourceError as error:
            if error.reason == "missing":
                error.reason = "no_channel"
            raise
        return document(body, what, "unreadable")

    def index(self, digest: str) -> bytes:
        return self._read(os.path.join("indexes", "sha256", check_digest(digest)), f"index {digest[:12]}…", MAX_INDEX)

    def frame(self, artifact: Artifact) -> bytes:
        path = os.path.join("blobs", "sha256", check_digest(artifact.frame_sha256))
        return self._read(path, artifact.variant, artifact.frame_size)

    def tuf(self, path: str, cap: int) -> bytes:
        return self._read(os.path.join("tuf", tuf_path(path, self.path)), f"tuf/{path}", cap)

    def discard(self, kind: str, digest: str) -> bool:
        return False  # the folder is the only copy

    def close(self) -> None:
        pass  # nothing stays open

    def check_present(self) -> None:
        """SourceError ('no_registry') if there is no folder."""
        if not os.path.isdir(self.path):
            message = f"no mirror at {self.path}: `python -m registry export {self.path}/` writes one"
            raise SourceError(message, reason="no_registry")

    def _read(self, below: str, what: str, cap: int) -> bytes:
        """A regular file's bytes, at most `cap`. Links are followed: what they lead to is verified like all else."""
        path = os.path.join(self.path, "v1", below)
        try:
            data = read_file(path, cap)
        except StoreError as error:
            reason = "too_long" if error.reason == "too_long" else "unreadable"
            raise SourceError(str(error), reason=reason) from None
        if data is None:
            self.check_present()
            raise SourceError(f"{self.path}: holds no {what}", reason="missing")
        return data
