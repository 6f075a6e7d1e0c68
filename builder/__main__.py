"""python -m builder: compile the dispatch table into a registry. Exit code 0, 1 (a variant or the build failed),
2 (usage) or 130 (Ctrl-C)."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import misplaced

if TYPE_CHECKING:
    from builder.build import Job, Result, Table
    from registry.contract import Variant


def main(argv: Sequence[str] | None = None, table: Callable[[], Table] | None = None) -> int:
    """Run the command line; returns the exit code. table: gives the dispatch table, by default that of `kernels/`."""
    if problem := misplaced("registry"):
        print(f"builder: {problem}", file=sys.stderr)
        return 1
    options = parser().parse_args(argv)
    try:
        from builder.build import Table
        from builder.errors import UsageError
        from registry.contract import CubineryError
    except ModuleNotFoundError as error:
        print(
            f"builder: {error.name} is not installed: pip install -e '.[build,serve]' in the checkout", file=sys.stderr
        )
        return 1
    try:
        return run(options, (table or Table.ours)())
    except UsageError as error:
        print(f"builder: {error}", file=sys.stderr)
        return 2
    except CubineryError as error:
        print(f"builder: {error.reason}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("builder: interrupted; what was built is stored, the channel did not move", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m builder", description="Compile SM120 attention kernels into a registry."
    )
    p.add_argument(
        "--arch", action="append", metavar="sm_N", help="architecture to assemble for (default sm_120); repeat"
    )
    p.add_argument(
        "--registry", type=Path, metavar="PATH", help="SQLite file (default: CUBINERY_REGISTRY or user data)"
    )
    p.add_argument("--op", action="append", help="only variants of this op; repeat")
    p.add_argument("--only", metavar="GLOB", help="only variants whose key matches, e.g. 'fwd-bf16-d128-*'")
    p.add_argument("--jobs", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="worker processes")
    p.add_argument(
        "--channel", default="stable", help="name to point at the new index if nothing fails (default stable)"
    )
    p.add_argument("--dry-run", action="store_true", help="list what would be built, build nothing")
    p.add_argument("--json", action="store_true", help="print one JSON object last on stdout; all else goes to stderr")
    p.add_argument(
        "--require-verified", action="store_true", help="fail if the ledger lacks a pass for any indexed PTX"
    )
    return p


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def run(options: argparse.Namespace, table: Table) -> int:
    """Build as the options say. Raises CubineryError for what keeps the whole build from happening."""
    from builder.build import Build
    from builder.errors import UsageError
    from builder.verified import Verified
    from registry.store import Store, StoreError, check_channel, default_path

    archs = _archs(options.arch or ["sm_120"])
    select = _selection(table, options.op, options.only)
    try:
        check_channel(options.channel)
    except StoreError as error:
        raise UsageError(f"--{error}") from None
    path = options.registry or default_path()
    if options.dry_run:
        return dry_run(options, table, archs, select, path)
    verified = Verified.read() if options.require_verified else None
    with Store(path) as store, _progress() as progress:
        result = Build(table, archs, store).run(
            select, jobs=options.jobs, channel=options.channel, verified=verified, progress=progress
        )
    report(result, archs, options, len(table.variants), path)
    return 1 if result.failed else 0


def dry_run(
    options: argparse.Namespace, table: Table, archs: list[str], select: Callable[[Variant], bool], path: Path
) -> int:
    """List what a build would do. Writes nothing, not even an empty registry."""
    from builder.build import plan
    from builder.toolchain import Toolchain
    from registry.store import Store

    if path.exists():
        with Store(path, readonly=True) as store:
            jobs = plan(table, archs, Toolchain.current(), store)
    else:
        jobs = plan(table, archs, Toolchain.current(), None)
    chosen = [job for job in jobs if select(job.variant)]
    todo = [job for job in chosen if job.missing]
    out = sys.stderr if options.json else sys.stdout
    for job in todo:
        print(f"{job.key}: {', '.join(job.missing)}", file=out)
    print(f"{len(todo)} of {len(chosen)} variants would be built into {path}", file=out)
    if options.json:
        print(json.dumps(_dry_summary(chosen, todo)))
    return 0


def _dry_summary(chosen: list[Job], todo: list[Job]) -> dict[str, Any]:
    would = [{"key": job.key, "archs": list(job.missing)} for job in todo]
    counts = {"variants": len(chosen), "built": 0, "cached": len(chosen) - len(todo), "bytes": 0, "seconds": 0.0}
    return {**counts, "failed": [], "index": None, "would_build": would}


def _archs(given: list[str]) -> list[str]:
    from builder.errors import UsageError
    from builder.nvjitlink import ARCHS

    for arch in given:
        if arch not in ARCHS:
            raise UsageError(f"--arch {arch}: not one of {', '.join(ARCHS)} ('a' and 'f' targets are not shipped)")
    return list(dict.fromkeys(given))


def _selection(table: Table, ops: list[str] | None, pattern: str | None) -> Callable[[Variant], bool]:
    """Which variants --op and --only pick. UsageError if that is none, with the keys that are nearest."""
    from builder.errors import UsageError

    known = sorted({v.op for v in table.variants})
    if unknown := sorted(set(ops or ()) - set(known)):
        raise UsageError(f"--op {', '.join(unknown)}: the table has {', '.join(known)}")

    def select(variant: Variant) -> bool:
        return (not ops or variant.op in ops) and (pattern is None or fnmatch.fnmatchcase(variant.key, pattern))

    if not any(map(select, table.variants)):
        keys = [v.key for v in table.variants if not ops or v.op in ops]
        near = difflib.get_close_matches((pattern or "").replace("*", ""), keys, n=5, cutoff=0.3) or keys[:5]
        raise UsageError(f"--only {pattern!r}: matches none of {len(keys)} variants; near: {', '.join(near)}")
    return select


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, shown only when there is something to build."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[key]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = None

        def show(done: int, total: int, key: str) -> None:
            nonlocal task
            if total:
                task = bar.add_task("", total=total, key="") if task is None else task
                bar.update(task, completed=done, key=key)

        yield show


def report(result: Result, archs: list[str], options: argparse.Namespace, table_size: int, path: Path) -> None:
    """The end table, the failures, the digests; with --json the object, last on stdout."""
    from rich.console import Console

    console = Console(stderr=options.json, soft_wrap=True)
    console.width = max(console.width, 120)  # a log or a narrow terminal gets whole rows, not ellipses
    console.print(_table(result))
    for key, reason in sorted(result.failed.items()):
        console.print(f"FAILED {key}: {reason}", markup=False, highlight=False)
    console.print(
        f"{result.seconds:.1f} s: {len(result.built)} built, {len(result.cached)} cached, {len(result.failed)} failed "
        f"of {result.variants} variants in {path}",
        highlight=False,
    )
    for arch, digest in result.indexes.items():
        moved = f"channel {options.channel} left as it was" if result.failed else f"now channel {options.channel}"
        console.print(
            f"index {arch} {digest} ({result.indexed[arch]} of {table_size} variants, {moved})", highlight=False
        )
    if options.json:
        print(json.dumps(summary(result, archs)))


def summary(result: Result, archs: list[str]) -> dict[str, Any]:
    """What --json prints. bytes: of the selected variants' cubins, all architectures together."""
    index = result.indexes.get(archs[0]) if len(archs) == 1 else {arch: result.indexes.get(arch) for arch in archs}
    return {
        "variants": result.variants,
        "built": len(result.built),
        "cached": len(result.cached),
        "bytes": sum(a.cubin_size for a in result.artifacts.values()),
        "seconds": round(result.seconds, 3),
        "failed": [{"key": key, "reason": reason} for key, reason in sorted(result.failed.items())],
        "index": index,
    }


def _table(result: Result) -> Any:
    from rich.table import Table as RichTable

    table = RichTable(box=None, header_style="bold")
    for name in ("variant", "arch", "state", "regs", "spills", "smem", "blocks/SM", "loop", "HMMA", "cubin"):
        table.add_column(name, justify="left" if name in ("variant", "arch", "state") else "right", no_wrap=True)
    states = dict.fromkeys(result.built, "built") | dict.fromkeys(result.failed, "failed")
    for (key, arch), a in sorted(result.artifacts.items()):
        loop = dict(a.hot_loop)
        numbers = (
            a.registers,
            a.spills,
            a.smem + a.static_smem,
            a.blocks_per_sm,
            sum(loop.values()),
            loop.get("HMMA", 0),
        )
        table.add_row(key, arch, states.get(key, "cached"), *map(str, numbers), str(a.cubin_size))
    return table


if __name__ == "__main__":
    sys.exit(main())
