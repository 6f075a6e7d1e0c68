"""The registry as the server sees it: opened once it exists, opened again when the file is replaced."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from registry.store import Store, StoreError

log = logging.getLogger("uvicorn.error.cubinery")  # below uvicorn's own logger, to share its handler

BUSY_TIMEOUT_S = 1.0  # reads never wait for a writer; only for recovery after a crash, and that briefly


class Reader:
    """A read-only connection for each thread that asks: in production one, the event loop's."""

    def __init__(self, path: Path):
        self.path = path
        self._local = threading.local()
        self._reason = ""  # why the registry could not be read when last asked; logged when it changes

    def store(self) -> Store:
        """The calling thread's connection. Raises StoreError while there is no registry to read."""
        try:
            identity = self._identity()
            if identity is None or getattr(self._local, "identity", None) != identity:
                self.close()
                self._local.store = Store(self.path, readonly=True, busy_timeout_s=BUSY_TIMEOUT_S)
                self._local.identity = identity
                log.info("reading %s", self.path)
            self._reason = ""
            store: Store = self._local.store
            return store
        except StoreError as error:
            if error.reason != self._reason:
                log.warning("%s", error)
            self._reason = error.reason
            raise

    def close(self) -> None:
        """End the calling thread's connection."""
        store, self._local.store, self._local.identity = getattr(self._local, "store", None), None, None
        if store is not None:
            store.close()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None  # Store says why
        return found.st_dev, found.st_ino
