"""Which artifact serves a call: pure functions of an index and call facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from registry.contract import ALL_DTYPES, Artifact, DispatchRow, Index
from runtime.errors import NoKernelError

NEAR = 6  # rejections that a message shows; the error object carries all
HEAD_DIM_STEP = 32  # of a variant's dims: a panel of shared memory


class Choice(NamedTuple):
    """What a dispatch row picks. pack: whether the query heads of a key/value head share tiles."""

    artifact: Artifact
    pack: bool


def select(index: Index, op: str, facts: Mapping[str, Any], shown: int | None = NEAR) -> Choice:
    """What the first dispatch row whose conditions all hold picks.

    facts: every fact of the call; see docs/design.md. Raises NoKernelError with each row's reason: 'row' if no row
    holds, 'variant' if the row's variant is not in the index (a later row is never taken in its place); its message
    shows the nearest `shown` of them, None: all.
    """
    row = first((row for row in index.rows if row.op == op), facts)
    artifact = index.by_variant.get(row.variant) if row else None
    if row and artifact:
        return Choice(artifact, row.pack)
    raise no_kernel(index, op, facts, shown)


def first(rows: Iterable[DispatchRow], facts: Mapping[str, Any]) -> DispatchRow | None:
    """The first row whose conditions all hold."""
    return next((row for row in rows if all(c.holds(facts) for c in row.when)), None)


def open_rows(rows: Iterable[DispatchRow], facts: Mapping[str, Any]) -> list[DispatchRow]:
    """The rows of an op that could serve a call of which only `facts` are known, with their conditions on the other
    facts."""
    found = []
    for row in rows:
        if all(c.holds(facts) for c in row.when if c.fact in facts):
            row = row.replace(when=tuple(c for c in row.when if c.fact not in facts))
            found.append(row)
            if not row.when:
                break  # it does hold: no call gets past it
    return found


def candidates(index: Index, op: str, facts: Mapping[str, Any]) -> tuple[list[Artifact], list[str]]:
    """(artifacts, keys of missing variants) of every row that could serve a call of which only `facts` are known."""
    found: dict[str, Artifact | None] = {}
    rows = [row for row in index.rows if row.op == op]
    for dtype in ALL_DTYPES:  # apart, so that a row of one dtype can be known to hold
        for row in open_rows(rows, {"dtype": dtype, **facts}):
            found[row.variant] = index.by_variant.get(row.variant)
    return [a for a in found.values() if a is not None], [key for key, a in found.items() if a is None]


def no_arch(capability: tuple[int, int], available: Iterable[str], where: str) -> NoKernelError:
    """The error for a GPU that none of the registry's indexes is for."""
    arch = f"sm_{capability[0]}{capability[1]}"
    have = ", ".join(sorted(available)) or "none"
    command = f"in a checkout of cubinery {release()}: python -m builder --arch {arch}"
    message = f"no kernels for this GPU ({arch}): {where} has indexes for {have}. To build them, {command}"
    return NoKernelError(message, reason="arch")


def release() -> str:
    """The installed distribution's version, or 'of this version' from a checkout that is not installed."""
    from importlib import metadata  # here: only errors need it

    try:
        return metadata.version("cubinery")
    except metadata.PackageNotFoundError:
        return "(this version)"


def _reject(row: DispatchRow, index: Index, facts: Mapping[str, Any]) -> tuple[tuple[int, int], str, str]:
    """((number of conditions that fail, by how much bounds are missed), variant key, why)."""
    failed = [c for c in row.when if not c.holds(facts)]
    missed = sum(abs(facts[c.fact] - c.value) for c in failed if c.op in ("<=", ">="))
    why = "; ".join(f"needs {c}, the call has {facts[c.fact]}" for c in failed)
    return (len(failed), missed), row.variant, why or f"serves this call, but is not in the index for {index.arch}"


def no_kernel(index: Index, op: str, facts: Mapping[str, Any], shown: int | None = NEAR) -> NoKernelError:
    """What is nearest first; the command builds the missing variant, or says that the table must grow first."""
    rows = [row for row in index.rows if row.op == op]
    found = sorted((_reject(row, index, facts) for row in rows), key=lambda rejection: rejection[0])
    rejections = [(key, why) for _, key, why in found]
    checkout = f"in a checkout of cubinery {index.release}: "
    missing = bool(found) and found[0][0][0] == 0
    dims = [-(-facts[name] // HEAD_DIM_STEP) * HEAD_DIM_STEP for name in ("head_dim", "head_dim_v")]
    glob = found[0][1] if missing else f"{op}-{facts['dtype']}-d{dims[0]}-dv{dims[1]}-*"
    command = f"python -m builder --arch {index.arch} --only '{glob}'"
    if missing:
        todo = f"To build it, {checkout}{command}"
    else:
        todo = f"No row of the dispatch table serves it; {checkout}add one in kernels/{op}/, then {command}"
    call = ", ".join(f"{name}={value}" for name, value in facts.items())
    lines = [f"no {op} kernel on {index.arch} for {call}", *(f"  {key}: {why}" for key, why in rejections[:shown])]
    if shown is not None and len(rejections) > shown:
        lines.append(f"  and {len(rejections) - shown} more (python -m runtime explain lists all)")
    return NoKernelError("\n".join([*lines, todo]), reason="variant" if missing else "row", rejections=rejections)
