"""python -m builder: compile the dispatch table into a registry, and the two commands of tuning it."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from builder import misplaced
from builder import options as command_lines

if TYPE_CHECKING:
    from builder.build import Job, Result, Table
    from registry.contract import Variant

PARSERS = {"candidates": command_lines.candidates_parser, "accept": command_lines.accept_parser}
SIGTERM_CODE = 128 + signal.SIGTERM
# What --json states of every run; null where a run ended before it was known. An `error` object comes on top.
FIELDS = (
    "variants", "built", "cached", "bytes", "seconds", "failed", "unverified", "verified", "index", "moved", "lacking"
)  # fmt: skip


def main(argv: Sequence[str] | None = None, table: Callable[[], Table] | None = None) -> int:
    """Run the command line; returns the exit code. table: gives the dispatch table, by default that of `kernels/`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    answer: dict[str, Any] = dict.fromkeys(FIELDS)
    with _terminable():
        code = _guarded(arguments, table, answer)
    if "--json" in arguments:
        print(json.dumps(answer), flush=True)
    return code


def _guarded(arguments: list[str], table: Callable[[], Table] | None, answer: dict[str, Any]) -> int:
    """Run; whatever ends it early becomes a line on stderr, the answer's `error` and an exit code."""

    def failed(code: int, reason: str, message: str, line: str | None = None) -> int:
        answer["error"] = {"reason": reason, "message": message}
        print(f"builder: {line or message}", file=sys.stderr)
        return code

    if problem := misplaced("registry"):
        return failed(1, "toolchain", problem)
    from builder.errors import UsageError
    from registry.contract import CubineryError

    try:
        return _command(arguments, table, answer)
    except ModuleNotFoundError as error:
        return failed(1, "toolchain", f"{error.name} is not installed: pip install -e '.[build,serve]' in the checkout")
    except UsageError as error:
        return failed(2, error.reason, str(error))
    except CubineryError as error:
        return failed(1, error.reason, str(error), f"{error.reason}: {error}")
    except KeyboardInterrupt:
        return failed(130, "interrupted", f"interrupted; {_left(answer)}")
    except SystemExit as error:
        if error.code != SIGTERM_CODE:  # --help
            raise
        return failed(SIGTERM_CODE, "terminated", f"terminated; {_left(answer)}")
    except Exception as error:
        traceback.print_exc()
        return failed(1, "internal", f"{type(error).__name__}: {error}")


def _command(arguments: list[str], table: Callable[[], Table] | None, answer: dict[str, Any]) -> int:
    """Parse, then run the build or the command of tuning that the first argument names."""
    name, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in PARSERS else ("", arguments)
    options = PARSERS[name]().parse_args(rest) if name else command_lines.build_parser().parse_args(rest)
    from builder.build import Table

    given = (table or Table.ours)()
    if not name:
        return run(options, given, answer)
    command = importlib.import_module(f"builder.{name}").command
    with _progress() as progress:
        return int(command(options, given, progress))


def _left(answer: dict[str, Any]) -> str:
    """What an interrupted build leaves behind."""
    if answer["variants"] is None:
        return "nothing was built"
    moved = f"moved for {', '.join(answer['moved'])} alone" if answer["moved"] else "did not move"
    return f"{answer['built'] + answer['cached']} of {answer['variants']} variants are stored, the channel {moved}"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), once, so that workers end and their files go. It has no effect by default on
    process 1 of a container. Signals belong to the main thread: elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end the cleaning up
        raise SystemExit(SIGTERM_CODE)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: argparse.Namespace, table: Table, answer: dict[str, Any]) -> int:
    """Build as the options say and put what --json states into `answer`, also when it is interrupted.

    Raises CubineryError for what keeps the whole build from happening.
    """
    from builder.build import Build
    from builder.errors import UsageError
    from builder.verified import Verified
    from registry.store import Store, StoreError, check_channel

    archs = _archs(options.arch or ["sm_120"])
    select = _selection(table, options.op, options.only)
    try:
        check_channel(options.channel)
    except StoreError as error:
        raise UsageError(f"--{error}") from None
    path = options.registry or _default_file()
    if options.dry_run:
        if options.require_verified:
            raise UsageError("--require-verified is about PTX that was built: it cannot go with --dry-run")
        answer.update(dry_run(options, table, archs, select, path))
        return 0
    verified = Verified.read() if options.require_verified else None
    with Store(path) as store:
        build = Build(table, archs, store)
        try:
            with _progress() as progress:
                result = build.run(
                    select,
                    jobs=options.jobs,
                    channel=options.channel,
                    verified=verified,
                    allow_partial=options.allow_partial,
                    progress=progress,
                )
        finally:
            if build.result is not None:
                answer.update(summary(build.result, archs))
    report(result, options, len(table.variants), path)
    return 1 if result.failed or result.unverified else 0


def _default_file() -> Path:
    """`default_path()`, but UsageError where that passes over a CUBINERY_REGISTRY that the builder cannot write."""
    from builder.errors import UsageError
    from registry.store import default_path

    path, named = default_path(), os.environ.get("CUBINERY_REGISTRY")
    if named and path != Path(named):
        raise UsageError(f"CUBINERY_REGISTRY={named} is a URL or a folder; name the file to write with --registry PATH")
    return path


def dry_run(
    options: argparse.Namespace, table: Table, archs: list[str], select: Callable[[Variant], bool], path: Path
) -> dict[str, Any]:
    """List what a build would do; what --json states of it. Writes nothing, not even an empty registry."""
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
    return _dry_summary(chosen, todo)


def _dry_summary(chosen: list[Job], todo: list[Job]) -> dict[str, Any]:
    would = [{"key": job.key, "archs": list(job.missing)} for job in todo]
    counts = {"variants": len(chosen), "built": 0, "cached": len(chosen) - len(todo), "bytes": 0, "seconds": 0.0}
    return {**counts, "failed": [], "would_build": would}


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


def report(result: Result, options: argparse.Namespace, table_size: int, path: Path) -> None:
    """The end table, the failures, the digests."""
    from rich.console import Console

    from builder.verified import where

    console = Console(stderr=options.json, soft_wrap=True)
    console.width = max(console.width, 120)  # a log or a narrow terminal gets whole rows, not ellipses
    console.print(_table(result))
    for key, reason in sorted(result.failed.items()):
        console.print(f"FAILED {key}: {reason}", markup=False, highlight=False)
    for key, reason in sorted(result.unverified.items()):
        console.print(f"UNVERIFIED {key}: {reason}", markup=False, highlight=False)
    console.print(
        f"{result.seconds:.1f} s: {len(result.built)} built, {len(result.cached)} cached, {len(result.failed)} failed "
        f"of {result.variants} variants in {path}",
        highlight=False,
    )
    if result.verified:
        console.print(where(result.verified, result.indexed), highlight=False)
    if result.unverified:
        console.print(f"not verified: {len(result.unverified)} variants of the index", highlight=False)
    for arch, digest in result.indexes.items():
        moved = (
            f"now channel {options.channel}" if arch in result.moved else f"channel {options.channel} left as it was"
        )
        console.print(
            f"index {arch} {digest} ({result.indexed[arch]} of {table_size} variants, {moved})", highlight=False
        )
    for arch, keys in result.lacking.items():
        console.print(
            f"channel {options.channel} keeps its {arch} index, which also has {', '.join(keys)}: build these too, or "
            "give --allow-partial",
            markup=False,
            highlight=False,
        )
    for arch, number in result.formats.items():
        console.print(_other_format(options.channel, arch, number, arch in result.moved), highlight=False)


def _other_format(channel: str, arch: str, number: int, moved: bool) -> str:
    """About a channel whose index another release wrote."""
    from registry.contract import PARTED

    if moved:
        return (
            f"channel {channel} left its {arch} index of format {number}, which this release does not read; it stays "
            "in the registry under its digest"
        )
    if number > PARTED:
        return (
            f"channel {channel} keeps its {arch} index of format {number}, of a newer release than this (format "
            f"{PARTED}): update the checkout, or give --allow-partial to replace it"
        )
    return f"channel {channel} keeps its {arch} index of format {number}, an older release's, until a build replaces it"


def summary(result: Result, archs: list[str]) -> dict[str, Any]:
    """What --json states of a build. bytes: of the selected variants' cubins, all architectures together."""
    index = result.indexes.get(archs[0]) if len(archs) == 1 else {arch: result.indexes.get(arch) for arch in archs}
    return {
        "variants": result.variants,
        "built": len(result.built),
        "cached": len(result.cached),
        "bytes": sum(a.cubin_size for a in result.artifacts.values()),
        "seconds": round(result.seconds, 3),
        "failed": _reasons(result.failed),
        "unverified": _reasons(result.unverified),
        "verified": result.verified,
        "index": index,
        "moved": result.moved,
        "lacking": result.lacking,
    }


def _reasons(found: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "reason": reason} for key, reason in sorted(found.items())]


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
