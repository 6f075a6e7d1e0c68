"""The command lines: of the build, and of the two commands of tuning."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

EXIT_CODES = """exit code: 0 done, even if a channel was left alone; 1 a variant or the build failed, or one is not
verified; 2 usage; 130 Ctrl-C; 143 SIGTERM. Interrupted, it keeps every variant that was finished."""
COMMANDS_HELP = """commands of tuning, each with a --help of its own: `candidates` builds what is to be measured,
`accept` puts what was found into the dispatch table. """


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As any usage error, so that --json tells of this one too."""
        from builder.errors import UsageError

        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    p = Parser(
        prog="python -m builder",
        description="Compile SM120 attention kernels into a registry.",
        epilog=COMMANDS_HELP + EXIT_CODES,
        allow_abbrev=False,  # else --js would be --json
    )
    p.add_argument(
        "--arch", action="append", metavar="sm_N", help="architecture to assemble for (default sm_120); repeat"
    )
    p.add_argument(
        "--registry", type=_file, metavar="PATH", help="SQLite file (default: CUBINERY_REGISTRY or user data)"
    )
    p.add_argument("--op", action="append", help="only variants of this op; repeat")
    p.add_argument("--only", metavar="GLOB", help="only variants whose key matches, e.g. 'fwd-bf16-d128-*'")
    _jobs(p)
    p.add_argument(
        "--channel", default="stable", help="name to point at the new index if nothing fails (default stable)"
    )
    p.add_argument(
        "--allow-partial",
        action="store_true",
        help="move the channel even if the new index lacks variants of the table which its current one has, as after a "
        "change of sources and --only, or if a newer release wrote that one; without this it stays, and a line says so",
    )
    p.add_argument("--dry-run", action="store_true", help="list what would be built, build nothing")
    p.add_argument("--json", action="store_true", help="print one JSON object last on stdout; all else goes to stderr")
    p.add_argument(
        "--require-verified",
        action="store_true",
        help="fail unless the ledger shows each indexed PTX as verified: a pass of every test on at least one "
        "architecture, which need not be --arch, and no architecture whose latest result is a fail or a hang; says on "
        "which architectures each is verified",
    )
    return p


def candidates_parser() -> Parser:
    p = Parser(
        prog="python -m builder candidates",
        description="Compile what `benchmarks.tune` is to measure: the space of tiles and the table's own, for sm_120 "
        "and sm_90. What cannot or need not be built is named with its reason.",
        epilog="exit code: 0 done, though some candidates may have been left out; 1 nothing could be built; 2 usage",
        allow_abbrev=False,
    )
    p.add_argument("--op", default="fwd", help="of this op (default fwd)")
    p.add_argument(
        "--dims",
        action="append",
        type=_dims,
        metavar="D,DV",
        help="head_dim and head_dim_v of the table (default: all); repeat",
    )
    p.add_argument("--dtype", default="bf16", help="default bf16")
    p.add_argument(
        "--registry", type=_file, default=Path("candidates.db"), metavar="PATH", help="default candidates.db"
    )
    p.add_argument("--only", metavar="GLOB", default="*", help="only keys that match, and the table's own tiles")
    p.add_argument("--dry-run", action="store_true", help="list the candidates, build nothing")
    _jobs(p)
    return p


def accept_parser() -> Parser:
    p = Parser(
        prog="python -m builder accept",
        description="Put what `benchmarks.tune` measured into the dispatch table: a tile replaces another where it "
        "gains enough with SM120's occupancy emulated.",
        epilog="exit code: 0 done, whether the table changed or not; 1 the results cannot be believed; 2 usage",
        allow_abbrev=False,
    )
    p.add_argument("results", type=Path, help="what benchmarks.tune wrote")
    p.add_argument("--registry", type=_file, metavar="PATH", help="of the candidates: spares compiling their PTX again")
    p.add_argument("--dry-run", action="store_true", help="say what would change, write nothing")
    _jobs(p)
    return p


def _jobs(p: Parser) -> None:
    p.add_argument("--jobs", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="worker processes")


def _file(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is a URL; the builder writes a file")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _dims(text: str) -> tuple[int, int]:
    head_dim, _, head_dim_v = text.partition(",")
    return _positive(head_dim), _positive(head_dim_v or head_dim)
