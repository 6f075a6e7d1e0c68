"""What the tuner is to measure: a space of tiles, less those with a reason to be left out.

A space and rules rather than a list: new head dims and a changed kernel get theirs without anybody's guess.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from builder.build import Build, Result, Table
from builder.errors import UsageError
from builder.inspect import SM120_PARTITIONS, blocks_per_sm
from kernels.validity import invalid, smem
from registry.contract import DTYPES, MAX_SMEM, Variant
from registry.store import Store

ARCHS = ("sm_120", "sm_90")
CHANNEL = "candidates"
FWD_SPACE: dict[str, tuple[Any, ...]] = {
    "m": (16, 32, 64, 128),
    "n": (16, 32, 64, 128),
    "w": (1, 2, 4, 8),
    "s": (1, 2),
    "q": ("none", "most", "all"),  # of Q's steps; most: all but two
    "a": (0, 1),
}
ACCUMULATORS = 160  # fp32 of O and of S that a thread has registers for; docs/tuning.md
REGISTERS = 208  # for those and Q, where Q stays in registers


def _accumulators(v: Variant) -> int:
    return v.size("m") * (v.head_dim_v + v.size("n")) // (32 * v.size("w"))


def _q_registers(v: Variant) -> int:
    return v.size("m") * 16 * v.size("q") // (64 * v.size("w"))


def _warps(v: Variant) -> int:
    return v.size("w") * blocks_per_sm(32 * v.size("w"), 1, smem(v))


# (does it concern the variant, why it is left out), tried in this order after what cannot be built at all.
FWD_RULES: tuple[tuple[Callable[[Variant], bool], str], ...] = (
    (lambda v: v.size("m") // v.size("w") > 32, "more than 32 query rows a warp: its accumulators spill"),
    (lambda v: _accumulators(v) > ACCUMULATORS, f"more than {ACCUMULATORS} accumulators a thread: it spills"),
    (
        lambda v: _accumulators(v) + _q_registers(v) > REGISTERS,
        f"more than {REGISTERS} registers a thread for accumulators and Q: it spills",
    ),
    (lambda v: _warps(v) < SM120_PARTITIONS, f"shared memory for fewer than {SM120_PARTITIONS} warps an SM"),
    (
        lambda v: v.size("n") == 16 and 2 * smem(_with_n(v, 32)) <= MAX_SMEM,
        "16 keys a block where 32 leave room for two blocks an SM: twice the barriers for nothing",
    ),
)


def _with_n(v: Variant, n: int) -> Variant:
    return v.replace(tile=tuple((letter, n if letter == "n" else size) for letter, size in v.tile))


def space(dims: tuple[int, int], dtype: str = "bf16") -> tuple[list[Variant], dict[str, str]]:
    """(candidates of the forward, key → why it is none) for these head dims."""
    kept, left_out = [], {}
    steps = {"none": 0, "most": dims[0] // 16 - 2, "all": dims[0] // 16}
    for sizes in product(*FWD_SPACE.values()):
        named = {letter: steps.get(size, size) for letter, size in zip(FWD_SPACE, sizes, strict=True)}
        tile = tuple((letter, size) for letter, size in named.items() if size)  # 0 is not written
        variant = Variant("fwd", dtype, *dims, tile=tile)
        reason = invalid(variant) or next((why for concerns, why in FWD_RULES if concerns(variant)), None)
        if reason:
            left_out[variant.key] = reason
        else:
            kept.append(variant)
    return kept, left_out


def chosen(options: argparse.Namespace, table: Table) -> tuple[list[Variant], dict[str, str]]:
    """(what to build, key → why it is left out). UsageError for an op, dtype or dims that have no candidates."""
    if options.op != "fwd":
        raise UsageError(f"--op {options.op}: tiles are declared for fwd alone")
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype {options.dtype}: not one of {', '.join(DTYPES)}")
    served = {(v.head_dim, v.head_dim_v): None for v in table.variants if v.op == "fwd"}
    found: list[Variant] = []
    left_out: dict[str, str] = {}
    for dims in options.dims or served:
        if dims not in served:
            known = " ".join(f"{d},{dv}" for d, dv in sorted(served))
            raise UsageError(f"--dims {dims[0]},{dims[1]}: the table has {known}")
        kept, out = space(dims, options.dtype)
        own = (options.op, options.dtype, *dims)
        incumbents = [v for v in table.variants if (v.op, v.dtype, v.head_dim, v.head_dim_v) == own]
        found += incumbents + [v for v in kept if fnmatchcase(v.key, options.only)]
        left_out |= {key: why for key, why in out.items() if fnmatchcase(key, options.only)}
    keys = {v.key for v in found}
    return sorted(set(found)), {key: why for key, why in left_out.items() if key not in keys}


def command(options: argparse.Namespace, table: Table, progress: Any) -> int:
    """Build them, and print what was left out and why."""
    variants, left_out = chosen(options, table)
    for key, why in left_out.items():
        print(f"left out: {key}: {why}")
    if options.dry_run:
        print("\n".join(v.key for v in variants))
        print(f"{len(variants)} candidates, {len(left_out)} left out")
        return 0
    result = build(options, replace(table, variants=tuple(variants), rows=()), progress)
    for key, why in sorted(result.failed.items()):
        print(f"left out: {key}: {why}")
    done = len(result.built) + len(result.cached)
    print(f"{done} of {len(variants)} candidates in {options.registry}, {result.seconds:.0f} s")
    return 0 if done else 1


def build(options: argparse.Namespace, table: Table, progress: Any) -> Result:
    """Into a registry of their own: UsageError for one that is served."""
    with Store(options.registry) as store:
        if others := sorted(store.channels().keys() - {CHANNEL}):
            raise UsageError(
                f"--registry {options.registry}: it has the channel {', '.join(others)}; name another file"
            )
        return Build(table, ARCHS, store).run(jobs=options.jobs, channel=CHANNEL, allow_partial=True, progress=progress)
