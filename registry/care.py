"""The commands gc, export, import and backup of `python -m registry`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from registry import gc
from registry.store import Store, default_path


def add_commands(subparsers: Any) -> None:
    """Add the four commands to a parser's sub-parsers. Each sets `run`: a function of the options to an exit code."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--registry", metavar="PATH", type=Path, help="the registry file")
    common.add_argument("--json", action="store_true", help="print one JSON value instead of text")

    def command(name: str, run: Any, text: str) -> Any:
        parser = subparsers.add_parser(name, help=text, description=text, parents=[common])
        parser.set_defaults(run=run)
        return parser

    sub = command("gc", _gc, "forget what no channel, build or the last day needs")
    sub.add_argument("--dry-run", action="store_true", help="only say what would go")
    text = "indexes of each channel and architecture that stay (default: %(default)s)"
    sub.add_argument("--keep", type=_count, default=gc.KEEP_INDEXES, metavar="N", help=text)
    text = "what is younger stays (default: %(default)g)"
    sub.add_argument("--hours", type=_hours, default=gc.KEEP_S / 3600, metavar="H", help=text)

    sub = command("export", _export, "copy a release: to a mirror's folder, or with --db to one file")
    where = sub.add_mutually_exclusive_group(required=True)
    text = "the mirror's folder; only what is new is written"
    where.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=text)
    where.add_argument("--db", type=Path, metavar="FILE", help="one file, for images and hosts without a network")
    text = "only the indexes that it names now; may be repeated"
    sub.add_argument("--channel", action="append", default=[], metavar="NAME", help=text)
    text = "only this architecture; may be repeated"
    sub.add_argument("--arch", action="append", default=[], metavar="ARCH", help=text)

    sub = command("import", _import, "take in a release from a file or folder, held by signatures or by digests")
    sub.add_argument("source", type=Path, metavar="SOURCE", help="what `export` wrote")
    held = sub.add_mutually_exclusive_group(required=True)
    held.add_argument("--root", type=Path, metavar="FILE", help="the trusted root metadata: signatures must hold")
    held.add_argument("--index", action="append", metavar="DIGEST", help="only this index; one for each architecture")
    text = "with --root: only these signed channels; with --index: the channel to point there"
    sub.add_argument("--channel", action="append", default=[], metavar="NAME", help=text)

    sub = command("backup", _backup, "write a compact, verified copy of everything")
    sub.add_argument("file", type=Path, metavar="FILE", help="replaced when the copy is whole")


def _gc(options: argparse.Namespace) -> int:
    with _store(options) as store:
        plan = gc.collect(store, keep_indexes=options.keep, keep_s=options.hours * 3600, dry_run=options.dry_run)
        found = gc.to_json(store, plan, options.dry_run)
    verb = "would forget" if options.dry_run else "forgot"
    counts = ", ".join(f"{found['deleted'][name]} {name}" for name in ("indexes", "artifacts", "ptx", "blobs"))
    _say(options, found, f"{found['path']}: {verb} {counts}, {plan.bytes / 1e6:.1f} MB")
    return 0


def _export(options: argparse.Namespace) -> int:
    from registry.export import to_file, to_folder

    target = options.db or options.folder
    with _store(options, readonly=True) as store:
        done = (to_file if options.db else to_folder)(store, target, options.channel, options.arch)
    held = f"{done.indexes} indexes, {done.blobs} blobs, {done.tuf} files of metadata, {done.channels} channels"
    text = f"{target}: {held}; wrote {done.files} files, {done.bytes / 1e6:.1f} MB, {done.unchanged} were there"
    _say(options, {"path": str(target), **dataclasses.asdict(done)}, text)
    return 0


def _import(options: argparse.Namespace) -> int:
    from registry import imports
    from registry.errors import StoreError

    if options.index and len(options.channel) > 1:
        raise StoreError("--channel: with --index give one", reason="argument")
    with imports.opened(options.source) as bundle, _store(options) as store:
        if options.index:
            done = imports.by_digests(store, bundle, options.index, next(iter(options.channel), None))
        else:
            done = imports.by_signatures(store, bundle, imports.read_root(options.root), options.channel)
    lines = [f"{arch}  {digest}" for digest, arch in sorted(done.indexes.items())]
    lines += [f"{name}  {' '.join(sorted(found))}" for name, found in sorted(done.channels.items())]
    lines.append(f"{store.path}: took in {done.blobs} blobs, {done.tuf} files of metadata")
    _say(options, {"path": str(store.path), **dataclasses.asdict(done)}, "\n".join(lines))
    return 0


def _backup(options: argparse.Namespace) -> int:
    from registry.export import backup

    with _store(options, readonly=True) as store:
        size = backup(store, options.file)
    _say(options, {"path": str(options.file), "bytes": size}, f"{options.file}: {size / 1e6:.1f} MB, sound")
    return 0


def _store(options: argparse.Namespace, readonly: bool = False) -> Store:
    return Store(options.registry or default_path(), readonly=readonly)


def _say(options: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value, indent=1, sort_keys=True) if options.json else text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1: a channel's current index always stays")
    return value


def _hours(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError("hours, 0 or more")
    return value
