"""How much a heavy test does."""

from __future__ import annotations

import os


def full() -> bool:
    """Whether this is `make soak`, not `make test`."""
    return os.environ.get("CUBINERY_SOAK") == "full"


def size(small: int, full_size: int) -> int:
    """`full_size` under `make soak`, else `small`."""
    return full_size if full() else small
