"""A seeded mutator: the same seed and corpus give the same cases on every machine."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Sequence
from typing import Any

LONGEST = 16_384  # bytes of a case
NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**200)
TOKENS = (
    *(str(n).encode() for n in NUMBERS),
    *(b"null", b"true", b"NaN", b"1e999", b"[]", b"{}", b'""', b'"', b",", b":", b"[[", b"]", b"}", b"\\ud800"),
    *(b"\\u0000", b"\xff\xfe", b"\xef\xbb\xbf", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", b"\x7fELF\x02\x01"),
    *(b"sm_120", b"-m64"),
)
VALUES = (None, True, 0, 1, -1, 2**31, 2**200, 1.5, float("nan"), "", "a", "\ud800", [], [1], ["a"], {}, {"a": 1})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of keys to every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


class Mutator:
    """Cases made from the `corpus`, by one to five changes each; half of those from JSON stay JSON."""

    def __init__(self, corpus: Sequence[bytes], seed: str):
        self._corpus, self._draw = list(corpus), random.Random(seed)
        self._documents: list[Any] = []
        for data in corpus:
            with contextlib.suppress(ValueError, RecursionError):
                self._documents.append(json.loads(data))
        self._documents = [value for value in self._documents if len(places(value)) > 1]

    def case(self) -> bytes:
        draw = self._draw
        if self._documents and draw.random() < 0.5:
            return self._document()
        data = bytearray(draw.choice(self._corpus))
        for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
            draw.choice((self._flip, self._number, self._token, self._cut, self._repeat, self._splice))(data)
        return bytes(data[:LONGEST])

    def _document(self) -> bytes:
        value = copy.deepcopy(self._draw.choice(self._documents))
        for _ in range(self._draw.choice((1, 1, 2))):
            *path, last = self._draw.choice(places(value)[1:] or [(None,)])
            if last is None:
                break
            inner = value
            for key in path:
                inner = inner[key]
            if self._draw.random() < 0.2:
                del inner[last]
            else:
                inner[last] = copy.deepcopy(self._draw.choice(VALUES))
        return json.dumps(value).encode()[:LONGEST]

    def _at(self, data: bytearray) -> int:
        """Any place, the first bytes (headers) more often."""
        return self._draw.randrange(min(len(data), self._draw.choice((16, 64, LONGEST))) + 1)

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._at(data) % len(data)] ^= 1 << self._draw.randrange(8)

    def _number(self, data: bytearray) -> None:
        """Some bytes become a number at the edge of its range."""
        size, at = self._draw.choice((1, 2, 3, 4, 8)), self._at(data)
        value = self._draw.choice(NUMBERS) % (1 << 8 * size)
        data[at : at + size] = value.to_bytes(size, self._draw.choice(("little", "big")))

    def _token(self, data: bytearray) -> None:
        """In between, or in the place of as many bytes."""
        token, at = self._draw.choice(TOKENS), self._at(data)
        data[at : at + self._draw.choice((0, len(token)))] = token

    def _cut(self, data: bytearray) -> None:
        at = self._at(data)
        del data[at : self._draw.choice((at + 1, at + 8, self._at(data), len(data)))]

    def _repeat(self, data: bytearray) -> None:
        at = self._at(data)
        part = data[at : at + self._draw.choice((1, 4, 64))]
        data[at:at] = part * self._draw.choice((1, 2, 50))

    def _splice(self, data: bytearray) -> None:
        other = self._draw.choice(self._corpus)
        data[self._at(data) :] = other[self._draw.randrange(len(other) + 1) :]
