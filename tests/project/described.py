"""docs/design.md's tables of ops, from their descriptions.

    python -m tests.project.described        # rewrites them

Each table stands between a line `<!-- NAME -->` and the next blank line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from registry import ops
from registry.ops.describe import Op, Tensor
from tests.project.shell import ROOT

DESIGN = ROOT / "docs/design.md"
ALL = [ops.get(name) for name in ops.OPS]


def the_ops() -> list[str]:
    rows = ["| op | ABI | a block computes | PTX | launched with |", "|---|---|---|---|---|"]
    for op in ALL:
        with_others = ", ".join(f"`{name}`" for name in op.launched_with) or "–"
        rows.append(f"| `{op.name}` | {op.version} | {op.computes} | {_targets(op)} | {with_others} |")
    return rows


def _targets(op: Op) -> str:
    return ", ".join([op.ptx, *(f"{op.target([f.name])} with `{f.name}`" for f in op.features if f.ptx)])


def tensors() -> list[str]:
    """A row for each tensor that several ops have alike; where they differ, one for each."""
    rows = ["| tensor | what | dtype | shape | read or written | of |", "|---|---|---|---|---|---|"]
    found: dict[tuple[str, ...], list[str]] = {}
    for op in ALL:
        for tensor in op.tensors:
            found.setdefault(_tensor(tensor), []).append(op.name)
    return rows + [
        f"| {' | '.join(cells)} | {', '.join(f'`{op}`' for op in names)} |" for cells, names in found.items()
    ]


def _named(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _tensor(tensor: Tensor) -> tuple[str, ...]:
    shapes = " or ".join(f"{layout.text}{f' with {layout.when}' if layout.when else ''}" for layout in tensor.layouts)
    how = {"vectors": "16 bytes at a time", "elements": "by elements", "anywhere": "by elements, any strides"}
    optional = "optional " if tensor.optional else ""
    gradient = ", differentiable" if tensor.differentiable else ""
    return (f"`{tensor.name}`", tensor.about, " or ".join(tensor.dtypes), shapes,
            f"{optional}{tensor.role}, {how[tensor.access]}{gradient}")  # fmt: skip


def scalars() -> list[str]:
    rows = ["| number | type | what | of |", "|---|---|---|---|"]
    found: dict[tuple[str, str, str], list[str]] = {}
    for op in ALL:
        for scalar in op.scalars:
            found.setdefault((f"`{scalar.name}`", scalar.type, scalar.about), []).append(op.name)
    return rows + [
        f"| {' | '.join(cells)} | {', '.join(f'`{op}`' for op in names)} |" for cells, names in found.items()
    ]


def letters() -> list[str]:
    rows = ["| op | tile, in a variant's key |", "|---|---|"]
    for op in ALL:
        parts = [f"`{part.letter}` {part.about}{' (optional)' if part.optional else ''}" for part in op.letters]
        parts += [f"`{feature.name}` {feature.about} (optional)" for feature in op.features]
        rows.append(f"| `{op.name}` | {'; '.join(parts)} |")
    return rows


def facts() -> list[str]:
    rows = ["| fact | meaning | of |", "|---|---|---|"]
    found: dict[tuple[str, str], list[str]] = {}
    for op in ALL:
        for fact in op.facts:
            found.setdefault((f"`{fact.name}`", fact.about), []).append(op.name)
    every = [op.name for op in ALL]
    for cells, names in found.items():
        whose = "every op" if names == every else ", ".join(f"`{op}`" for op in names)
        rows.append(f"| {' | '.join(cells)} | {whose} |")
    return rows


TABLES: dict[str, Callable[[], list[str]]] = {
    "ops": the_ops, "tensors": tensors, "scalars": scalars, "letters": letters, "facts": facts,
}  # fmt: skip


def rewritten(text: str) -> str:
    """The document with the tables of the descriptions."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(?=\n\n)", re.DOTALL)
        assert pattern.search(text), f"docs/design.md has no table {name}"
        text = pattern.sub(lambda match, table=table: match[1] + "\n".join(table()), text)  # type: ignore[misc]
    return text


def main(path: Path = DESIGN) -> int:
    path.write_text(rewritten(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
