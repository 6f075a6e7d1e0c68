"""`python -m registry ls|show|verify` look at a registry file; the other commands release and care for it."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from registry import care
from registry.contract import Artifact, CubineryError, Index
from registry.releases import commands as releases
from registry.store import Store, StoreError, default_path

EPILOG = """\
exit codes: 0 all is well; 1 'verify' found problems, 'show' found nothing; 2 wrong usage, or it cannot be done.
The registry is --registry, else the file that CUBINERY_REGISTRY names, else registry.db in the user's data folder.
"""

_SHOW = (
    "a channel (stable), an index digest, a variant key (fwd-bf16-d128-dv128-m128-n64-w4-s1), an artifact's "
    "fingerprint, or the SHA-256 of a cubin, a frame or a PTX text; digests may be cut to 6 digits or more"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except CubineryError as error:
        print(f"registry: {error} [{error.reason}]", file=sys.stderr)
        return 1 if error.reason == "not_found" else 2
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--registry", metavar="PATH", type=Path, help="the registry file")
    common.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m registry", description=__doc__, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Store, Any], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EPILOG, parents=[common], formatter_class=raw
        )
        sub.set_defaults(run=functools.partial(_reading, run))
        return sub

    command("ls", _ls, "list channels, indexes and artifacts")
    command("show", _show, "show one thing in full").add_argument("what", metavar="WHAT", help=_SHOW)
    command("verify", _verify, "hash and cross-check everything; print one line a problem")
    releases.add_commands(commands)
    care.add_commands(commands)
    return parser


def _reading(run: Callable[[Store, argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command that only reads."""
    with Store(arguments.registry or default_path(), readonly=True) as store:
        return run(store, arguments)


def _ls(store: Store, arguments: argparse.Namespace) -> int:
    counts, channels, artifacts = store.counts(), store.channels(), store.artifacts()
    if arguments.json:
        listed = [{"fingerprint": fingerprint, **a.to_json()} for fingerprint, a in artifacts.items()]
        _print_json(
            {
                "path": str(store.path),
                "counts": counts,
                "channels": channels,
                "indexes": store.indexes(),
                "artifacts": listed,
            }
        )
        return 0
    print(f"{store.path}: {_summary(counts)}")
    targets = [(name, arch, digest) for name, indexes in channels.items() for arch, digest in indexes.items()]
    _print_table(("channel", "arch", "index"), targets)
    named = {digest for _, _, digest in targets}
    _print_table(("other index", "arch"), [item for item in store.indexes().items() if item[0] not in named])
    _print_artifacts(artifacts.values())
    return 0


def _show(store: Store, arguments: argparse.Namespace) -> int:
    kind, value = _find(store, arguments.what)
    if arguments.json:
        _print_json({"kind": kind, "value": value.to_json() if kind == "index" else value})
    elif kind == "channel":
        for arch, digest in value.items():
            print(f"{arguments.what}  {arch}  {digest}")
    elif kind == "index":
        _print_index(value)
    elif kind == "ptx":
        print(value, end="")
    else:
        print("\n\n".join("\n".join(f"{name:14} {_text(v)}" for name, v in a.items()) for a in value))
    return 0


def _find(store: Store, what: str) -> tuple[str, Any]:
    """('channel', {arch: digest}), ('index', an Index), ('artifacts', [JSON]) or ('ptx', text).

    Raises StoreError ('not_found').
    """
    if channel := store.channel(what):
        return "channel", channel
    if digest := _one_of(what, store.indexes(), "index"):
        return "index", store.index(digest)
    artifacts = store.artifacts()
    found = []
    for fingerprint, a in artifacts.items():
        names = (fingerprint, a.variant, a.cubin_sha256, a.frame_sha256)
        if any(what == name or (_is_prefix(what) and name.startswith(what)) for name in names):
            found.append({"fingerprint": fingerprint, **a.to_json()})
    if found:
        return "artifacts", found
    if ptx_sha256 := _one_of(what, {a.ptx_sha256 for a in artifacts.values()}, "PTX"):
        return "ptx", store.ptx_text(ptx_sha256)
    raise StoreError(f"{store.path}: nothing is called {what!r}; WHAT is {_SHOW}", reason="not_found")


def _one_of(what: str, digests: Iterable[str], kind: str) -> str | None:
    """The digest that `what` is, or is the beginning of. Raises StoreError when it could be several."""
    found = [digest for digest in digests if _is_prefix(what) and digest.startswith(what)]
    if len(found) > 1:
        raise StoreError(f"{what!r} begins {len(found)} {kind} digests; give more digits", reason="argument")
    return found[0] if found else None


def _is_prefix(what: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{6,64}", what) is not None


def _verify(store: Store, arguments: argparse.Namespace) -> int:
    problems, counts = store.verify(), store.counts()
    if arguments.json:
        _print_json({"path": str(store.path), "counts": counts, "problems": problems})
    else:
        for line in problems:
            print(line)
        print(f"{store.path}: {'sound' if not problems else f'{len(problems)} problems'}: {_summary(counts)}")
    return 1 if problems else 0


def _summary(counts: dict[str, int]) -> str:
    rows = ", ".join(f"{counts[name]} {name}" for name in ("artifacts", "ptx", "indexes", "blobs"))
    return f"{rows}, {counts['bytes'] / 1e6:.1f} MB"


def _text(value: object) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, sort_keys=True))


def _print_index(index: Index) -> None:
    print(f"index {index.digest}: {index.arch}, release {index.release}, {len(index.artifacts)} artifacts")
    _print_artifacts(index.artifacts)
    _print_table(
        ("variant", "serves a call when"),
        [(row.variant, " and ".join(map(str, row.when))) for row in index.rows],
    )
    _print_table(("abi", "version", "parameters"), [(a.digest, a.version, len(a.params)) for a in index.abis])


def _print_artifacts(artifacts: Iterable[Artifact]) -> None:
    columns = ("variant", "arch", "cubin bytes", "frame bytes", "registers", "spills", "smem", "blocks/SM", "driver")
    _print_table(
        columns,
        [
            (
                a.variant,
                a.arch,
                a.cubin_size,
                a.frame_size,
                a.registers,
                a.spills,
                a.smem,
                a.blocks_per_sm,
                a.min_driver,
            )
            for a in artifacts
        ],
    )


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table, numbers to the right; nothing when there are no rows."""
    rows = [tuple(row) for row in rows]
    if not rows:
        return
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)]
    print()
    for row in [columns, *rows]:
        cells = [
            str(cell).rjust(width) if isinstance(like, int) else str(cell).ljust(width)
            for cell, like, width in zip(row, rows[0], widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
