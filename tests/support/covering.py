"""Few cases that still meet every pair: a covering array of strength two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def covering(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which every pair of values of every two factors occurs at least once.

    Greedy and deterministic: the two largest factors in full, the others filled in by the pairs still missing, then
    cases for whatever is left.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    missing = {
        (a, x, b, y)
        for a, b in combinations(names, 2)
        for x, y in product(range(len(factors[a])), range(len(factors[b])))
    }
    seeds = list(product(range(len(factors[names[0]])), range(len(factors[names[1]])))) if len(names) > 1 else [(0,)]
    cases: list[dict[str, int]] = []
    while seeds or missing:
        if seeds:
            case = dict(zip(names, seeds.pop(0), strict=False))
        else:
            a, x, b, y = min(missing)
            case = {a: x, b: y}
        for name in names:
            if name not in case:
                # Ties go to the value whose turn it is, so that values spread evenly.
                turn = len(cases)
                size = len(factors[name])
                case[name] = max(
                    range(size), key=lambda v: (_gain(case, name, v, names, missing), -((v - turn) % size))
                )
        missing -= {(a, case[a], b, case[b]) for a, b in combinations(names, 2)}
        cases.append(case)
    return [{name: factors[name][case[name]] for name in factors} for case in cases]


def _gain(case: Mapping[str, int], name: str, value: int, names: Sequence[str], missing: set[Any]) -> int:
    """How many missing pairs the case would meet with `name` = `value`."""
    full = {**case, name: value}
    pairs = ((a, b) for a, b in combinations(names, 2) if name in (a, b) and a in full and b in full)
    return sum((a, full[a], b, full[b]) in missing for a, b in pairs)
