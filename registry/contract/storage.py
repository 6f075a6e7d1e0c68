"""What a registry keeps, in a file or behind a server: its schema, its bounds, how its names look, what its documents
consist of."""

import operator
from collections.abc import Callable
from typing import Any

SCHEMA = 3  # of the registry file, the user_version in its header: the number of registry.store's migrations
MAX_CONTENT = 64 << 20  # bytes of one cubin or PTX text, and of the frame that holds it
CHANNEL = "[a-z0-9][a-z0-9._-]{0,63}"  # what a channel's name looks like, whole
TUF_PATH = r"(targets/)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}"  # of a file below v1/tuf/: no way out of it

FORMAT = 2  # of an index that is one document
PARTED = 3  # of one in parts; a client refuses other formats
INDEX_FIELDS: dict[str, type] = {
    "format": int, "arch": str, "release": str, "artifacts": list, "rows": list, "abis": list,
}  # fmt: skip
PARTED_FIELDS: dict[str, type] = {"format": int, "arch": str, "release": str, "parts": list, "abis": list}
DTYPES = ("bf16", "fp16")  # of queries
ALL_DTYPES = (*DTYPES, "fp32")  # of a variant: fp32 is for outputs alone

# A condition's operator -> a function of (value, fact), the way round that 'in' has it.
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "<=": operator.ge,
    ">=": operator.le,
    "in": operator.contains,
}
