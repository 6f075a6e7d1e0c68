"""A channel's document: the TUF target that names the index of each architecture. Standard library only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from registry.contract import ContractError, canonical_json, check_arch, check_digest

FORMAT = 1
NAME = re.compile("[a-z0-9][a-z0-9._-]{0,63}")

# Every path below v1/tuf/. Versions have at most nine digits.
ROLE_FILE = re.compile(r"timestamp\.json|(?P<version>[1-9][0-9]{0,8})\.(?P<role>root|snapshot|targets)\.json")
TARGET_FILE = re.compile(rf"targets/(?P<digest>[0-9a-f]{{64}})\.(?P<channel>{NAME.pattern})\.json")


@dataclass(frozen=True)
class Channel:
    """What a channel stands for in one release. indexes: {arch: digest}. yanked: digests that must not be loaded."""

    name: str
    indexes: dict[str, str]
    yanked: tuple[str, ...] = field(default=())

    def to_bytes(self) -> bytes:
        return canonical_json(
            {"format": FORMAT, "name": self.name, "indexes": self.indexes, "yanked": sorted(self.yanked)}
        )

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Channel:
        """The document of the channel `name`. Raises ContractError for anything else."""
        try:
            found = json.loads(data)
            if found["format"] != FORMAT or found["name"] != name:
                raise ContractError(f"format {found['format']!r:.20}, name {found['name']!r:.100}")
            indexes = {check_arch(arch): check_digest(digest) for arch, digest in found["indexes"].items()}
            return cls(name, indexes, tuple(check_digest(digest) for digest in found["yanked"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"channel {name!r:.100}: no document of format {FORMAT} of that name: {error}"
            raise ContractError(message) from None
