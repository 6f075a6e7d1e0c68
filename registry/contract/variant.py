"""Variants of ops, and their keys."""

from __future__ import annotations

import re

from registry.contract.errors import ContractError
from registry.contract.record import Record
from registry.contract.storage import ALL_DTYPES

_KEY = (  # compiled when a key is first read: a first call may read none
    r"(?P<op>[a-z]+(?:_[a-z]+)*)-(?P<dtype>[a-z][a-z0-9]+)-d(?P<d>[1-9]\d{0,3})-dv(?P<dv>[1-9]\d{0,3})"
    r"(?P<tile>(?:-[a-z](?:0|[1-9]\d{0,4}))*)(?P<features>(?:-[a-z][a-z0-9_]*[a-z_])*)"
)


class Variant(Record):
    """An op with its compile-time choices.

    tile: (letter, number) pairs in the op's own order, e.g. (("m", 128), ("n", 64), ("w", 4), ("s", 1)):
    rows of a query tile, columns of a key tile, warps, stages.
    features: sorted names of compiled-in features, e.g. ("paged",); a name ends in a letter.
    """

    op: str
    dtype: str
    head_dim: int
    head_dim_v: int
    tile: tuple[tuple[str, int], ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ALL_DTYPES:
            raise ContractError(f"variant: dtype {self.dtype!r} is none of {', '.join(ALL_DTYPES)}")
        if list(self.features) != sorted(set(self.features)):
            raise ContractError(f"variant: features {self.features} are not sorted and unique")
        if len(dict(self.tile)) != len(self.tile):
            raise ContractError(f"variant: tile {self.tile} names a letter twice")
        if not re.fullmatch(_KEY, self.key):
            raise ContractError(f"variant: {self.key!r} is not a well-formed key")

    def __lt__(self, other: Variant) -> bool:
        return self._values() < other._values()

    @property
    def key(self) -> str:
        """For example 'fwd-bf16-d128-dv128-m128-n64-w4-s1-paged'."""
        tile = "".join(f"-{letter}{number}" for letter, number in self.tile)
        return f"{self.op}-{self.dtype}-d{self.head_dim}-dv{self.head_dim_v}{tile}" + "".join(
            f"-{name}" for name in self.features
        )

    @classmethod
    def parse(cls, key: str) -> Variant:
        """The exact inverse of `key`. Raises ContractError for any other text."""
        match = re.fullmatch(_KEY, key) if isinstance(key, str) else None
        if match is None:
            raise ContractError(f"variant key {key!r:.200} is not like 'fwd-bf16-d128-dv128-m128-n64-w4-s1'")
        tile = tuple((part[0], int(part[1:])) for part in match["tile"].split("-")[1:])
        features = tuple(match["features"].split("-")[1:])
        variant = cls(match["op"], match["dtype"], int(match["d"]), int(match["dv"]), tile, features)
        if variant.key != key:
            raise ContractError(f"variant key {key!r} is not in its canonical form {variant.key!r}")
        return variant

    def size(self, letter: str) -> int:
        """One number of the tile; 0 if it is not written. `registry.ops` says what the letters of an op mean."""
        return dict(self.tile).get(letter, 0)
